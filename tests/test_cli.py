"""The command line: what it prints and writes, and that a user's mistake is one sentence and leaves nothing behind."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hess_plugin import Profile, ProfileError
from hess_plugin.cli import main
from hess_plugin.demo.rooms import make_scene
from hess_plugin.scenes.writing import write_folder

Invoke = Callable[..., Result]
COMMANDS = sorted(main.commands)


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run a command in an empty folder."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="hess-patch")

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two rooms on disk, in folders that are not called like the scenes in them."""
    root = tmp_path_factory.mktemp("scenes")
    for index, seed in enumerate((31, 32)):
        write_folder(make_scene(seed, views=3), root / f"scene{index}")
    return f"folder:{root}"


@pytest.fixture(scope="module")
def profile(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile that the command wrote."""
    path = tmp_path_factory.mktemp("profile") / "demo.hess"
    result = CliRunner().invoke(main, ["calibrate", "--model", "demo", "--data", data, "-o", str(path)])
    assert result.exit_code == 0, result.output
    return path


def assert_one_sentence(result: Result, *words: str, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    assert result.stderr.count("Error: ") == 1 and "Traceback" not in result.output
    sentence = result.stderr.partition("Error: ")[2].strip()
    assert "\n" not in sentence and len(sentence) > 20
    for word in words:
        assert word in sentence, sentence
    assert isinstance(result.exception, SystemExit)


def left_behind() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


# ---------------------------------------------------------------- what works


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_reads_well_in_80_columns(invoke: Invoke, command: str) -> None:
    """No line is longer, and in the list of commands no summary is cut off."""
    text = invoke(*([command] if command else []), "--help").stdout
    assert max(len(line) for line in text.splitlines()) <= 80 and "\\b" not in text
    assert "..." not in text.partition("Commands:")[2]


def test_commands_are_listed_in_the_order_of_the_work(invoke: Invoke) -> None:
    listed = [
        line.split()[0] for line in invoke("--help").stdout.partition("Commands:")[2].splitlines() if line.strip()
    ]
    assert listed == list(main.commands) and listed[:3] == ["demo", "calibrate", "show"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_completion(invoke: Invoke, shell: str) -> None:
    script = invoke("completion", shell)
    assert script.exit_code == 0 and "_HESS_PATCH_COMPLETE" in script.stdout


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("",), {"calibrate", "run", "completion"}),
        (("run", "--all"), {"--allocation"}),
        (("sites", "--model", "v"), {"vggt", "vggt-omega"}),
        (("bench", "--memory", ""), {"plain", "lean"}),
    ],
)
def test_words_are_completed_without_torch(words: tuple[str, ...], found: set[str]) -> None:
    code = "import sys\nfrom hess_plugin.cli import main\ntry:\n    main(prog_name='hess-patch')\nfinally:\n"
    code += "    print('torch' in sys.modules, file=sys.stderr)"
    variables = {
        "_HESS_PATCH_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["hess-patch", *words]),
        "COMP_CWORD": str(len(words)),
    }
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert found <= {line.partition(",")[2] for line in ran.stdout.splitlines()}
    assert ran.stderr.strip() == "False"


def test_model_names_that_are_completed_are_those_of_the_adapters() -> None:
    """The names are written out there, because importing adapters takes too long for a shell."""
    from hess_plugin.commands.options import MODELS
    from hess_plugin.plugins import BUILT_IN

    root = Path(__file__).resolve().parents[1]
    sources = {name: (root / "adapters" / f"{name}.py") for name in ("vggt", "pi3", "da3", "vggt_omega", "mapanything")}
    written = {name for path in sources.values() for name in MODELS if f'"{name}"' in path.read_text(encoding="utf-8")}
    assert written | {"demo"} == set(MODELS) and {"vggt", "pi3", "vggt-omega", "mapanything"} <= set(BUILT_IN)


def test_help_of_everything(invoke: Invoke) -> None:
    result = invoke("--help")
    assert result.exit_code == 0 and all(command in result.stdout for command in COMMANDS)
    assert {"calibrate", "compare", "demo", "evaluate", "plugins", "show", "sites"} <= set(COMMANDS)
    for command in COMMANDS:
        for flag in ("--help", "-h"):
            result = invoke(command, flag)
            assert result.exit_code == 0 and f"Usage: hess-patch {command}" in result.stdout
    assert left_behind() == []


def test_every_option_says_what_it_is_for() -> None:
    for name, command in main.commands.items():
        assert command.help, name
        for option in command.params:
            if option.param_type_name == "option" and option.name not in {"calibration_scenes", "test_scenes", "views"}:
                assert getattr(option, "help", None) or name == "demo", (name, option.name)


def test_version(invoke: Invoke) -> None:
    from hess_plugin import __version__

    assert invoke("--version").stdout == f"hess-patch, version {__version__}\n"


def test_plugins_are_json(invoke: Invoke) -> None:
    result = invoke("plugins")
    assert result.exit_code == 0
    assert {"vggt", "pi3", "demo"} <= {plugin["name"] for plugin in json.loads(result.stdout)}


def test_sites_of_the_demo_model(invoke: Invoke) -> None:
    result = invoke("sites", "--model", "demo")
    assert result.exit_code == 0 and result.stderr == ""
    assert "adapter vggt claims TinyVGGT: 4 sites" in result.stdout
    assert "aggregator.global_blocks.3.attn" in result.stdout and "multiples of 10" in result.stdout


def test_calibrate_and_show(invoke: Invoke, profile: Path, tmp_path: Path) -> None:
    loaded = Profile.load(profile)
    assert loaded.scenes == ("scene0", "scene1") and loaded.metadata["skipped"] == {}
    assert loaded.metadata["weights"] == "shipped" and loaded.metadata["model"] == "demo"
    assert [path.name for path in profile.parent.iterdir()] == [profile.name]
    result = invoke("show", profile, "--png", "heads.png", "--heads", 3, "--camera-weight", 1)
    assert result.exit_code == 0 and "WARNING" not in result.output
    assert "adapter vggt, 4 sites of 8 heads, 2 scenes, camera weight 0.5" in result.stdout
    assert "score: camera weight 1, projection q" in result.stdout and "wrote heads.png" in result.stdout
    assert result.stdout.count("\n  aggregator.") == 6 and "scenes: cannot tell: 2 scenes" in result.stdout
    assert Path("heads.png").read_bytes().startswith(b"\x89PNG") and left_behind() == ["heads.png"]


def test_show_draws_beside_the_profile_by_default(invoke: Invoke, profile: Path) -> None:
    Path("mine.hess").write_bytes(profile.read_bytes())
    assert invoke("show", "mine.hess").exit_code == 0
    assert left_behind() == ["mine.hess", "mine.hess.png"]


def test_a_command_calibrates_like_the_function(invoke: Invoke, profile: Path, data: str) -> None:
    import torch

    arguments = ("calibrate", "--model", "demo", "--data", data, "--scenes", 1, "--views", 2, "--seed", 3)
    result = invoke(*arguments, "--resolution", 40, "--camera-weight", 0.25, "-o", "new/folder/a.hess")
    assert result.exit_code == 0 and "wrote new/folder/a.hess" in result.stdout
    loaded = Profile.load("new/folder/a.hess")
    assert len(loaded.scenes) == 1 and loaded.camera_weight == 0.25
    given = {name: loaded.metadata[name] for name in ("views", "seed", "resolution", "data")}
    assert given == {"views": 2, "seed": 3, "resolution": 40, "data": data}
    assert left_behind() == ["new", "new/folder", "new/folder/a.hess"]
    assert invoke(*arguments, "--resolution", 40, "-o", "b.hess").exit_code == 0
    again = Profile.load("b.hess")
    assert all(torch.equal(again.traces[name], loaded.traces[name]) for name in again.traces)


def test_random_weights_are_warned_of_loudly(invoke: Invoke, data: str) -> None:
    result = invoke("sites", "--model", "demo", "--weights", "random")
    assert result.exit_code == 0 and "WARNING: random weights" in result.stderr
    arguments = ("--data", data, "--scenes", 1, "--eps", 1e6, "--camera-weight", 0, "-o", "a.hess")
    result = invoke("calibrate", "--model", "demo", "--weights", "random", *arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("WARNING: random weights") == 2 and "WARNING" not in result.stdout
    result = invoke("show", "a.hess")
    assert result.exit_code == 0 and "WARNING: random weights" in result.stderr
    assert "means nothing" in result.stderr


def test_the_demo_in_small(invoke: Invoke) -> None:
    result = invoke("demo", "-o", "out", "--calibration-scenes", 1, "--test-scenes", 2, "--views", 3)
    assert result.exit_code == 0, result.output
    files = {"demo.hess", "results.csv", "table.md", "heads.png", "trade_off.png"}
    assert {path.name for path in Path("out").iterdir()} == files
    assert "| dense" in result.stdout and "| hess" in result.stdout and "2 test scenes x 3 views" in result.stdout
    assert all(f"wrote out/{name}" in result.stdout for name in files)
    Profile.load("out/demo.hess")


# ---------------------------------------------------------------- a user's mistakes


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("sites", "--model", "nope"), ("no adapter loads a model called 'nope'", "demo", "pi3", "vggt")),
        (("sites", "--model", "demo", "--weights", "none.pt"), ("none.pt does not exist", "`random`")),
        (("sites", "--model", "demo", "--weights", "org/name"), ("cannot be loaded from 'org/name'",)),
        (("calibrate", "--model", "demo", "--data", "co4d:/x", "-o", "a.hess"), ("'co4d:/x'", "folder")),
        (("calibrate", "--model", "demo", "--data", "folder:", "-o", "a.hess"), ("name no folder",)),
        (("calibrate", "--model", "demo", "--data", "folder:/no/where", "-o", "a.hess"), ("/no/where does not exist",)),
        (("calibrate", "--model", "demo", "--data", "folder:.", "-o", "a.hess"), ("holds no scene", "cameras.json")),
        (("calibrate", "--model", "nope", "--weights", "random", "--data", "{data}", "-o", "a.hess"), ("'nope'",)),
        (("show", "none.hess"), ("none.hess is not a file", "hess-patch calibrate")),
        (("show", "."), ("is not a file",)),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    invoke: Invoke, data: str, arguments: tuple[str, ...], words: object
) -> None:
    assert isinstance(words, tuple)
    assert_one_sentence(invoke(*(argument.format(data=data) for argument in arguments)), *words)
    assert left_behind() == []


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("calibrate", "--model", "vggt", "--data", "{data}", "-o", "a.hess"), ("--weights is missing", "`random`")),
        (("sites", "--model", "demo", "--device", "nonsense"), ("--device nonsense cannot be used here",)),
        (("sites", "--model", "demo", "--device", "meta"), ("--device meta cannot be used here",)),
        (("sites", "--model", "demo", "--dtype", "int8"), ("--dtype",)),
        (("sites", "--model", "demo", "--repo", "/no/where"), ("/no/where",)),
        (("sites",), ("--model",)),
        (("calibrate", "--model", "demo", "--data", "{data}"), ("--output",)),
        (("calibrate", "--model", "demo", "--data", "{data}", "-o", "."), ("is a directory",)),
        (("calibrate", "--model", "demo", "--data", "{data}", "-o", "a", "--camera-weight", "2"), ("--camera-weight",)),
        (("calibrate", "--model", "demo", "--data", "{data}", "-o", "a", "--scenes", "0"), ("--scenes",)),
        (("calibrate", "--model", "demo", "--data", "{data}", "-o", "a", "--eps", "0"), ("--eps",)),
        (("demo", "--views", "2"), ("--views",)),
        (("nonsense",), ("nonsense",)),
    ],
)
def test_wrong_options_are_told_with_exit_code_2(
    invoke: Invoke, data: str, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    result = invoke(*(argument.format(data=data) for argument in arguments))
    assert_one_sentence(result, *words, code=2)
    assert "Usage: hess-patch" in result.stderr and left_behind() == []


def test_a_gpu_that_is_not_there(invoke: Invoke) -> None:
    import torch

    device = f"cuda:{torch.cuda.device_count()}" if torch.cuda.is_available() else "cuda"
    assert_one_sentence(invoke("sites", "--model", "demo", "--device", device), f"--device {device}", code=2)


def test_an_upstream_model_that_cannot_be_imported_points_to_repo(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vggt", None)  # as if it were not installed
    monkeypatch.setattr(sys, "path", list(sys.path))
    result = invoke("sites", "--model", "vggt")
    assert_one_sentence(result, "cannot import vggt.models.vggt", "https://github.com/facebookresearch/vggt", "--repo")
    (tmp_path / "checkout").mkdir()
    result = invoke("sites", "--model", "vggt", "--repo", tmp_path / "checkout")
    assert_one_sentence(result, "cannot import vggt.models.vggt")


@pytest.mark.parametrize("keep", [0, 8, 300, -1])
def test_a_truncated_profile(invoke: Invoke, profile: Path, keep: int) -> None:
    Path("cut.hess").write_bytes(profile.read_bytes()[:keep])
    assert_one_sentence(invoke("show", "cut.hess"), "cut.hess is truncated or not a profile", "calibrate again")
    assert left_behind() == ["cut.hess"]


def test_a_picture_of_an_unknown_kind_is_one_sentence(invoke: Invoke, profile: Path) -> None:
    for name in ("heads.nonsense", "heads", "heads.pdf"):
        assert_one_sentence(invoke("show", profile, "--png", name), f"{name} was given as output", ".png")
    assert left_behind() == []


def test_an_output_under_a_file_is_one_sentence_and_leaves_the_file(invoke: Invoke, data: str) -> None:
    Path("file").write_text("mine")
    result = invoke("calibrate", "--model", "demo", "--data", data, "--scenes", 1, "-o", "file/a.hess")
    assert_one_sentence(result, "file")
    assert left_behind() == ["file"] and Path("file").read_text() == "mine"


@pytest.mark.parametrize("wrong", ["image", "pose", "json"])
def test_a_broken_scene_names_its_file_and_writes_no_profile(invoke: Invoke, wrong: str) -> None:
    folder = write_folder(make_scene(31, views=3), Path("data/room"))
    cameras = folder / "cameras.json"
    record = json.loads(cameras.read_text())
    if wrong == "image":
        (folder / record["frames"][1]["image"]).write_bytes(b"\x89PNG not quite")
    elif wrong == "pose":
        record["frames"][1]["c2w"][0][0] = 7.0
        cameras.write_text(json.dumps(record))
    else:
        cameras.write_text(cameras.read_text()[:-20])
    result = invoke("calibrate", "--model", "demo", "--data", "folder:data", "-o", "a.hess")
    assert_one_sentence(result, "data/room")
    assert not Path("a.hess").exists() and not Path("a.hess.partial").exists()


def test_scenes_that_give_no_error_leave_no_file(invoke: Invoke, data: str) -> None:
    arguments = ("calibrate", "--model", "demo", "--data", data, "-o", "a.hess", "--eps", 1e-9)
    assert_one_sentence(invoke(*arguments), "none of 2 scenes gave a usable error")
    assert left_behind() == []


def test_an_old_profile_survives_a_calibration_that_fails(invoke: Invoke, data: str, profile: Path) -> None:
    Path("a.hess").write_bytes(profile.read_bytes())
    assert invoke("calibrate", "--model", "demo", "--data", data, "-o", "a.hess", "--eps", 1e-9).exit_code == 1
    assert left_behind() == ["a.hess"] and Path("a.hess").read_bytes() == profile.read_bytes()


def test_a_partial_file_of_another_calibration_is_told(invoke: Invoke, data: str) -> None:
    Path("a.hess.partial").write_bytes(b"damaged")
    arguments = ("calibrate", "--model", "demo", "--data", data, "-o", "a.hess")
    assert_one_sentence(invoke(*arguments), "a.hess.partial is damaged", "delete a.hess.partial to start again")
    assert left_behind() == ["a.hess.partial"]


def test_a_camera_weight_that_is_no_number_is_one_sentence(invoke: Invoke, profile: Path) -> None:
    assert_one_sentence(invoke("show", profile, "--camera-weight", "nan", "--png", "a.png"), "camera_weight nan")
    assert left_behind() == []


def test_verbose_gives_the_error_itself(invoke: Invoke) -> None:
    result = invoke("--verbose", "show", "none.hess")
    assert result.exit_code == 1 and isinstance(result.exception, ProfileError)


def test_a_calibration_prints_no_progress_where_nobody_watches(invoke: Invoke, data: str) -> None:
    result = invoke("calibrate", "--model", "demo", "--data", data, "--scenes", 1, "--views", 2, "-o", "a.hess")
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout.endswith("wrote a.hess\n") and "\x1b" not in result.stdout
    assert left_behind() == ["a.hess"]


@pytest.mark.parametrize("verbose", [False, True])
def test_in_a_shell_a_mistake_is_one_line_and_verbose_shows_the_traceback(tmp_path: Path, verbose: bool) -> None:
    command = [sys.executable, "-m", "hess_plugin.cli", *(["--verbose"] if verbose else []), "show", "none.hess"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == "" and os.listdir(tmp_path) == []
    assert "none.hess is not a file; give a profile written by" in done.stderr
    if verbose:
        assert done.stderr.startswith("Traceback") and "ProfileError" in done.stderr
    else:
        assert done.stderr.startswith("Error: none.hess") and done.stderr.count("\n") == 1


def test_evaluate_measures_every_arm(invoke: Invoke, data: str, profile: Path) -> None:
    options = ["--model", "demo", "--data", data, "--block-q", "8", "--block-k", "8", "--profile", profile]
    arms = ["--arm", "uniform", "--arm", "reverse", "--arm", "uncapped", "--sparsity", "0.5", "--sparsity", "0.8"]
    result = invoke("evaluate", *options, *arms, "-o", "a.csv")
    assert result.exit_code == 0, result.output
    assert result.output.count("| reverse") == 4 and result.output.count("| dense") == 2  # two tables
    with Path("a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["arm"] for row in rows} == {"dense", "uniform", "reverse", "uncapped"} and len(rows) == 2 * 7
    matched = [row for row in rows if row["arm"] in ("uniform", "reverse")]
    assert all(float(row["sparsity"]) == pytest.approx(float(row["row"]), abs=0.02) for row in matched)
    assert {(row["profile"], row["camera_weight"], row["normalisation"]) for row in rows} == {
        (str(profile), "0.5", "sum")
    }


def test_evaluate_divides_by_the_score_asked_for(invoke: Invoke, data: str, profile: Path) -> None:
    options = ["--model", "demo", "--data", data, "--scenes", "1", "--block-q", "8", "--block-k", "8"]
    chosen = ["--projection", "k", "--normalisation", "softmax", "--camera-weight", "0.9"]
    found = []
    for index, score in enumerate(([], chosen)):
        result = invoke("evaluate", *options, "--profile", profile, "--sparsity", "0.8", *score, "-o", f"{index}.csv")
        assert result.exit_code == 0, result.output
        with Path(f"{index}.csv").open() as file:
            found.append({row["arm"]: row for row in csv.DictReader(file)})
    assert "score: camera weight 0.9, projection k, normalisation softmax, rows all" in result.output
    method, ablation = found
    assert method["uniform"]["ate"] == ablation["uniform"]["ate"] and method["hess"]["ate"] != ablation["hess"]["ate"]
    names = ("camera_weight", "projection", "normalisation", "rows")
    assert [ablation["hess"][name] for name in names] == ["0.9", "k", "softmax", "all"]


def test_evaluate_refuses_a_score_without_a_profile(invoke: Invoke, data: str) -> None:
    for score in (("--normalisation", "log"), ("--rows", "patch"), ("--projection", "v"), ("--camera-weight", "0")):
        result = invoke("evaluate", "--model", "demo", "--data", data, *score)
        assert_one_sentence(result, "made of a profile, and none was given; add --profile", code=2)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (("--sparsity", "1.2"), "sparsity is 1.2"),
        (("--arm", "best"), "allocation is 'best', wanted one of uniform"),
    ],
)
def test_evaluate_refuses_an_arm_before_it_runs(invoke: Invoke, data: str, wrong: tuple[str, ...], words: str) -> None:
    assert_one_sentence(invoke("evaluate", "--model", "demo", "--data", data, *wrong, "-o", "a.csv"), words)
    assert left_behind() == []


def test_evaluate_asks_for_the_profile_of_an_arm(invoke: Invoke, data: str) -> None:
    result = invoke("evaluate", "--model", "demo", "--data", data, "--arm", "hess", "-o", "a.csv")
    assert_one_sentence(result, "--arm hess divides budgets by a profile", "add --profile", code=2)
    assert left_behind() == []


@pytest.mark.parametrize("command", ["calibrate", "evaluate", "sites"])
def test_an_adapter_that_does_not_claim_the_model_is_told(invoke: Invoke, data: str, command: str) -> None:
    scenes = () if command == "sites" else ("--data", data)
    output = ("-o", "a.hess") if command == "calibrate" else ()
    result = invoke(command, "--model", "demo", "--adapter", "pi3", *scenes, *output)
    assert_one_sentence(result, "adapter 'pi3' does not claim TinyVGGT", "leave the adapter out")


def test_photographs_beside_scenes_are_refused_before_anything_is_measured(invoke: Invoke, data: str) -> None:
    photos = data.replace("folder:", "images:") + "/scene0/images"
    result = invoke("calibrate", "--model", "demo", "--data", data, "--data", photos, "-o", "a.hess")
    assert_one_sentence(result, "cannot be averaged", "--target self", code=2)
    assert not list(Path().iterdir())


def test_fewer_scenes_than_asked_for_are_told(invoke: Invoke, data: str) -> None:
    result = invoke("calibrate", "--model", "demo", "--data", data, "--scenes", "9", "--dry-run")
    assert result.exit_code == 0 and "Warning: 9 scenes asked for, 2 found." in result.stderr


def test_a_profile_of_other_weights_is_told_before_the_first_forward(
    invoke: Invoke, data: str, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    replace(Profile.load(profile), fingerprint="0" * 16).save("other.hess")
    monkeypatch.setattr("hess_plugin.evaluation.comparison.Runner.predict", lambda *_: pytest.fail("it ran"))
    result = invoke("evaluate", "--model", "demo", "--data", data, "--profile", "other.hess")
    assert_one_sentence(result, "other weights", "--any-weights")
