"""`hess-patch show` and `compare` on profiles made here: what they print, write and refuse."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result

from hess_plugin import Profile
from hess_plugin.cli import main
from hess_plugin.scoring import ERROR_NAMES, NORMALISATIONS, ROWS, TRACES
from hess_plugin.sites import PROJECTIONS

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="hess-patch")

    return run


def write(path: str, scenes: int = 6, layers: int = 3, heads: int = 8, seed: int = 0, **changes: Any) -> Profile:
    """Write a profile with patch rows whose scenes agree roughly."""
    generator = torch.Generator().manual_seed(seed)
    traces = {}
    for error in ERROR_NAMES:
        for projection in PROJECTIONS:
            for rows in ("", ".patch"):
                truth = torch.randn(1, layers, heads, dtype=torch.float64, generator=generator)
                noise = torch.randn(scenes, layers, heads, dtype=torch.float64, generator=generator)
                traces[f"{error}.{projection}{rows}"] = (truth + 0.4 * noise).exp()
    fields: dict[str, Any] = {
        "adapter": "vggt",
        "sites": tuple(f"aggregator.global_blocks.{i}.attn" for i in range(layers)),
        "num_heads": heads,
        "scenes": tuple(f"{Path(path).stem}-{i}" for i in range(scenes)),
        "traces": traces,
        "camera_weight": 0.5,
        "fingerprint": "a" * 16,
        "metadata": {"weights": "x.pt", "camera_weight_source": "the family's"},
    }
    profile = Profile(**(fields | changes))
    profile.save(path)
    return profile


def left_behind() -> list[str]:
    return sorted(str(path) for path in Path().iterdir())


def assert_one_sentence(result: Result, *words: str, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    sentence = result.stderr.partition("Error: ")[2].strip()
    assert "\n" not in sentence and "Traceback" not in result.output
    for word in words:
        assert word in sentence, sentence


# ---------------------------------------------------------------- show


def test_show_lists_heads_with_their_interval_and_both_errors(invoke: Invoke) -> None:
    profile = write("a.hess")
    result = invoke("show", "a.hess", "--heads", 2)
    assert result.exit_code == 0, result.output
    rows = re.findall(
        r"^  (\S+\.attn) +(\d+)  (0\.\d+)  (0\.\d+) to (0\.\d+)  (0\.\d+)  (0\.\d+)$", result.stdout, re.MULTILINE
    )
    assert len(rows) == 4 and result.stdout.count("95% interval  camera  points") == 2
    scores, camera, points = profile.scores(), profile.scores(1.0), profile.scores(0.0)
    order = scores.flatten().argsort(descending=True).tolist()
    for row, index in zip(rows, [*order[:2], order[-1], order[-2]], strict=True):
        layer, head = divmod(index, 8)
        assert row[:2] == (profile.sites[layer], str(head))
        shown = [f"{values[layer, head]:.4f}" for values in (scores, camera, points)]
        assert [row[2], *row[5:]] == shown and float(row[3]) < float(row[2]) < float(row[4])
    assert "rank stability: random halves" in result.stdout and "Spearman-Brown" in result.stdout
    assert re.search(r"^scenes: (enough|more) scenes", result.stdout, re.MULTILINE)
    assert left_behind() == ["a.hess", "a.hess.png"]


def test_show_makes_the_score_asked_for(invoke: Invoke) -> None:
    profile = write("a.hess")
    options = ("--camera-weight", 0.2, "--projection", "v", "--normalisation", "log", "--rows", "patch")
    result = invoke("show", "a.hess", "--heads", 1, "--draws", 100, *options)
    assert "score: camera weight 0.2, projection v, normalisation log, rows patch" in result.stdout
    assert f"  {profile.scores(0.2, 'v', 'log', 'patch').max():.4f}  " in result.stdout
    assert f"  {profile.scores().max():.4f}  " not in result.stdout


def test_more_draws_give_other_intervals(invoke: Invoke) -> None:
    write("a.hess")
    few, many = (invoke("show", "a.hess", "--draws", draws).stdout for draws in (100, 2000))
    assert few != many and few == invoke("show", "a.hess", "--draws", 100).stdout


def test_a_profile_is_weighed_anew_without_calibrating(invoke: Invoke) -> None:
    profile = write("a.hess")
    result = invoke("show", "a.hess", "--camera-weight", 0.9, "-o", "new/b.hess", "--png", "b.png")
    assert result.exit_code == 0 and "wrote new/b.hess" in result.stdout
    weighed = Profile.load("new/b.hess")
    assert weighed.camera_weight == 0.9 and weighed.metadata == {"weights": "x.pt", "camera_weight_source": "given"}
    assert torch.equal(weighed.scores(), profile.scores(0.9))
    assert all(torch.equal(weighed.traces[name], trace) for name, trace in profile.traces.items())
    assert left_behind() == ["a.hess", "b.png", "new"] and Profile.load("a.hess").camera_weight == 0.5
    assert invoke("show", "a.hess", "--camera-weight", 0.1, "-o", "a.hess").exit_code == 0  # its own place
    assert Profile.load("a.hess").camera_weight == 0.1


def test_a_weight_that_could_not_be_used_is_not_written(invoke: Invoke) -> None:
    whole = write("a.hess")
    lost = torch.full((6, 3, 8), torch.nan, dtype=torch.float64)
    traces = {name: lost.clone() if name.startswith("camera.q") else trace for name, trace in whole.traces.items()}
    write("b.hess", traces=traces)
    result = invoke("show", "b.hess", "--camera-weight", 1, "--projection", "k", "-o", "c.hess")
    assert_one_sentence(result, "with camera_weight 1.0 the profile has no gradient")
    assert left_behind() == ["a.hess", "b.hess"]
    result = invoke("show", "b.hess", "--heads", 1)
    assert result.exit_code == 0 and "interval  points\n" in result.stdout and "camera  points" not in result.stdout


def test_show_refuses_what_it_cannot_do(invoke: Invoke) -> None:
    whole = write("a.hess")
    old = {name: trace for name, trace in whole.traces.items() if not name.endswith(".patch")}
    write("old.hess", traces=old)
    assert_one_sentence(invoke("show", "old.hess", "--rows", "patch"), "calibrate again, or take rows 'all'")
    assert_one_sentence(invoke("show", "a.hess", "-o", "b.hess"), "give --camera-weight", code=2)
    assert_one_sentence(invoke("show", "a.hess", "--draws", "10"), "--draws", code=2)
    assert_one_sentence(invoke("show", "a.hess", "--normalisation", "max"), "'max' is not one of", code=2)
    assert left_behind() == ["a.hess", "old.hess"]


@pytest.mark.parametrize("scenes", [1, 3])
def test_show_of_few_scenes_cannot_tell(invoke: Invoke, scenes: int) -> None:
    write("a.hess", scenes=scenes)
    result = invoke("show", "a.hess", "--heads", 1)
    assert result.exit_code == 0 and "scenes: cannot tell: " in result.stdout
    assert ("rank stability: cannot tell" in result.stdout) == (scenes == 1)
    assert ("  -  " in result.stdout) == (scenes == 1)  # no interval of a single scene


# ---------------------------------------------------------------- compare


def test_compare_prints_every_layer_and_the_mean(invoke: Invoke) -> None:
    first, second = write("a.hess"), write("b.hess", seed=1, fingerprint="b" * 16)
    result = invoke("compare", "a.hess", "b.hess", "--png", "ab.png")
    assert result.exit_code == 0, result.output
    moved = (first.scores() - second.scores()).abs().sum(1) / 2
    lines = result.stdout.splitlines()
    for site, share in zip(first.sites, moved.tolist(), strict=True):
        assert any(line.startswith(site) and f" {share:.1%} " in line for line in lines)
    assert any(line.startswith("mean ") and f" {moved.mean():.1%} " in line for line in lines)
    assert "A: a.hess" in lines and "B: b.hess" in lines and "different weights" in result.stdout
    assert Path("ab.png").read_bytes().startswith(b"\x89PNG") and left_behind() == ["a.hess", "ab.png", "b.hess"]


def test_compare_of_a_profile_with_itself(invoke: Invoke) -> None:
    write("a.hess")
    result = invoke("compare", "a.hess", "a.hess")
    assert re.search(r"^mean +\+1\.00 +100\.0% +0\.0% ", result.stdout, re.MULTILINE)
    assert "6 scene names are in both" in result.stdout and left_behind() == ["a.hess"]


def test_compare_makes_the_score_asked_for(invoke: Invoke) -> None:
    profile = write("a.hess")
    options = ("--projection", "k", "--normalisation", "linear", "--rows", "patch", "--camera-weight", 0.9)
    away = (profile.scores(0.9, "k", "linear", "patch") - 1 / 8).abs().sum(1).mean() / 2
    assert f"{away:.1%}" in invoke("compare", "a.hess", "a.hess", *options).stdout
    assert f"{away:.1%}" not in invoke("compare", "a.hess", "a.hess").stdout


def test_compare_refuses_what_it_cannot_compare(invoke: Invoke) -> None:
    whole = write("a.hess")
    write("b.hess", heads=4)
    write("old.hess", traces={name: trace for name, trace in whole.traces.items() if not name.endswith(".patch")})
    assert_one_sentence(invoke("compare", "a.hess", "b.hess"), "8 heads a site, the second 4")
    assert_one_sentence(invoke("compare", "a.hess", "none.hess"), "none.hess is not a file")
    assert_one_sentence(invoke("compare", "a.hess", "a.hess", "--png", "x.pdf"), ".png")
    assert_one_sentence(invoke("compare", "a.hess"), "SECOND", code=2)
    assert_one_sentence(invoke("compare", "a.hess", "old.hess", "--rows", "patch"), "old.hess: rows 'patch' needs")
    assert left_behind() == ["a.hess", "b.hess", "old.hess"]


def test_random_weights_are_warned_of(invoke: Invoke) -> None:
    write("a.hess")
    write("b.hess", metadata={"weights": "random"})
    assert "WARNING: random weights" in invoke("compare", "a.hess", "b.hess").stderr
    assert "WARNING" not in invoke("compare", "a.hess", "a.hess").stderr


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("command", ["show", "compare", "evaluate", "verify"])
def test_every_command_that_makes_a_score_takes_the_same_options(command: str) -> None:
    """The choices are spelt out on the command line, where importing the library would take a second."""
    options = {option.name: option for option in main.commands[command].params}
    assert isinstance(options["camera_weight"].type, click.FloatRange)
    for name, known in (("projection", TRACES), ("normalisation", NORMALISATIONS), ("rows", ROWS)):
        choice = options[name].type
        assert isinstance(choice, click.Choice) and tuple(choice.choices) == known
        assert options[name].default == known[0]
