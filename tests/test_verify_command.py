"""`hess-patch verify`: what it prints and writes, and that a mistake is one sentence and leaves the profile alone."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import hess_plugin
from hess_plugin import Profile, calibrate
from hess_plugin.cli import main
from hess_plugin.demo.model import load_demo_model
from hess_plugin.demo.scenes import RoomScenes
from hess_plugin.scenes.scene import Scene
from hess_plugin.scenes.writing import write_folder
from hess_plugin.verified_profiles import verifications

Invoke = Callable[..., Result]
TEST, VIEWS = 8, 5
BLOCKS = ("--block-q", 8, "--block-k", 8)


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
    """Five test rooms and one of the calibration, in folders called like them."""
    root = tmp_path_factory.mktemp("scenes")
    for scene in (*RoomScenes("test", TEST, VIEWS), *RoomScenes("calibration", 1, VIEWS)):
        write_folder(scene, root / scene.name)
    return f"folder:{root}"


@pytest.fixture(scope="module")
def honest() -> Profile:
    metadata = {"weights": "shipped", "model": "demo"}
    return calibrate(load_demo_model(), RoomScenes("calibration", 2, VIEWS), metadata=metadata)


@pytest.fixture
def path(invoke: Invoke, honest: Profile) -> Path:
    """The profile as a file in the working folder."""
    honest.save("demo.hess")
    return Path("demo.hess")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused early is refused before the model is loaded."""
    monkeypatch.setattr("hess_plugin.plugins.load_model", lambda *_, **__: pytest.fail("the model was loaded"))


def verify(invoke: Invoke, data: str, profile: object, *arguments: object) -> Result:
    return invoke("verify", "--model", "demo", "--data", data, "--profile", profile, *BLOCKS, *arguments)


def assert_one_sentence(result: Result, *words: str, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    sentence = result.stderr.partition("Error: ")[2].strip()
    assert "\n" not in sentence and len(sentence) > 20 and "Traceback" not in result.output
    for word in words:
        assert word in sentence, sentence


def reverse(profile: Profile) -> Profile:
    """Hand each layer's traces round so that the ranking of the heads is reversed."""
    import torch

    order = profile.scores().argsort(-1)
    heads = torch.empty_like(order).scatter_(-1, order, order.flip(-1)).expand(len(profile.scenes), -1, -1)
    return dataclasses.replace(profile, traces={name: t.gather(-1, heads) for name, t in profile.traces.items()})


def test_a_harmful_profile_is_verified_shown_and_stepped_aside_from(
    invoke: Invoke, data: str, honest: Profile, room: Scene
) -> None:
    reverse(honest).save("a.hess")
    result = verify(invoke, data, "a.hess", "--sparsity", 0.85, "--seed", 3)
    assert result.exit_code == 0 and result.stderr == "", result.output
    assert "left out 1 of 9 scenes, which the profile was calibrated on: room-20000000" in result.stdout
    assert [result.stdout.count(f"| {arm} ") for arm in ("dense", "uniform", "hess", "reverse")] == [1, 1, 1, 0]
    (verdict,) = re.findall(r"^verdict: (.*)$", result.stdout, re.MULTILINE)
    assert verdict.startswith("harms at sparsity 0.85 on 8 held-out scenes: against uniform budgets AUC@30 -")
    assert result.stdout.endswith("\nwrote a.hess\n") and os.listdir() == ["a.hess"]
    (found,) = verifications(Profile.load("a.hess"))
    assert found.text == verdict and (found.block_q, found.block_k) == (8, 8)
    assert found.data == f"{data}, seed 3" and found.fingerprint == honest.fingerprint
    shown = invoke("show", "a.hess", "--heads", 1)
    assert shown.exit_code == 0 and f"\nverified: {verdict} Measured " in shown.stdout
    assert "'traces'" not in shown.stdout and "verdicts" not in shown.stdout  # the record is told, not dumped
    with pytest.warns(UserWarning, match="Budgets are uniform, because this profile harms"):
        handle = hess_plugin.patch(load_demo_model(), profile="a.hess", sparsity=0.85, block_q=8, block_k=8)
    assert handle.report().allocation == "uniform"


def test_an_honest_profile_at_two_sparsities(invoke: Invoke, data: str, path: Path, honest: Profile) -> None:
    arguments = ("--sparsity", 0.5, "--sparsity", 0.8, "--scenes", 2, "--views", 3, "--camera-weight", 0.25)
    result = verify(invoke, data, path, *arguments)
    assert result.exit_code == 0, result.output
    found = verifications(Profile.load(path))
    assert [v.sparsity for v in found] == [0.5, 0.8] and all(v.scoring.camera_weight == 0.25 for v in found)
    assert all(v.outcome == "undecided" and v.views == (3, 3) for v in found)
    assert result.stdout.count("verdict: undecided at") == 2 and "score: camera weight 0.25" in result.stdout
    assert all(bool((t == honest.traces[name]).all()) for name, t in Profile.load(path).traces.items())
    assert verify(invoke, data, path, *arguments[:2], *arguments[4:]).exit_code == 0
    assert [v.sparsity for v in verifications(Profile.load(path))] == [0.8, 0.5]  # the older one is replaced


def test_without_a_record_the_profile_stays_as_it_is(invoke: Invoke, data: str, path: Path) -> None:
    before = path.read_bytes()
    arguments = ("--scenes", 2, "--views", 3, "--no-record")
    result = verify(invoke, data, path, *arguments)
    assert result.exit_code == 0 and "verdict: " in result.stdout and "wrote" not in result.stdout
    strict = verify(invoke, data, path, *arguments, "--strict")
    assert strict.exit_code == 1 and "verdict: undecided" in strict.stdout and strict.stderr == ""
    assert path.read_bytes() == before and os.listdir() == ["demo.hess"]


def test_strict_is_content_with_a_profile_that_helps(
    invoke: Invoke, data: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hess_plugin.verification import Verification

    outcomes = iter(["helps", "helps", "helps", "mixed"])
    monkeypatch.setattr(Verification, "outcome", property(lambda self: next(outcomes)))
    monkeypatch.setattr(Verification, "text", "")
    arguments = ("--sparsity", 0.5, "--sparsity", 0.8, "--scenes", 1, "--views", 2, "--no-record", "--strict")
    assert [verify(invoke, data, path, *arguments).exit_code for _ in range(2)] == [0, 1]


def test_other_weights(invoke: Invoke, data: str, honest: Profile) -> None:
    dataclasses.replace(honest, fingerprint="0" * 16).save("other.hess")
    before = Path("other.hess").read_bytes()
    arguments = ("--scenes", 1, "--views", 3)
    assert_one_sentence(verify(invoke, data, "other.hess", *arguments), "other weights", "--any-weights")
    assert Path("other.hess").read_bytes() == before
    result = verify(invoke, data, "other.hess", *arguments, "--any-weights")
    assert result.exit_code == 0, result.output
    assert verifications(Profile.load("other.hess"))[0].fingerprint == honest.fingerprint
    assert f"verified: with other weights ({honest.fingerprint}), undecided" in invoke("show", "other.hess").stdout


def test_random_weights_are_warned_of(invoke: Invoke, data: str, path: Path) -> None:
    result = verify(invoke, data, path, "--weights", "random", "--any-weights", "--scenes", 1, "--views", 3)
    assert result.exit_code == 0 and result.stderr.count("WARNING: random weights") == 2


# ---------------------------------------------------------------- mistakes


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "arguments, words, code",
    [
        (("--sparsity", 0), ("--sparsity", "0<x<1"), 2),
        (("--sparsity", 1), ("--sparsity", "0<x<1"), 2),
        (("--sparsity", "nan"), ("sparsity nan cannot be verified",), 1),
        (("--block-k", 0), ("--block-k",), 2),
        (("--normalisation", "max"), ("'max' is not one of",), 2),
    ],
)
def test_wrong_options_are_told_before_the_model_is_loaded(
    invoke: Invoke, data: str, path: Path, arguments: tuple[object, ...], words: tuple[str, ...], code: int
) -> None:
    before = path.read_bytes()
    assert_one_sentence(verify(invoke, data, path, *arguments), *words, code=code)
    assert path.read_bytes() == before


@pytest.mark.usefixtures("no_model")
def test_a_profile_that_cannot_be_used_is_told_before_the_model_is_loaded(
    invoke: Invoke, data: str, path: Path, honest: Profile
) -> None:
    assert_one_sentence(verify(invoke, data, "none.hess"), "none.hess is not a file")
    assert_one_sentence(invoke("verify", "--model", "demo", "--data", data), "--profile", code=2)
    old = {name: trace for name, trace in honest.traces.items() if not name.endswith(".patch")}
    dataclasses.replace(honest, traces=old).save("old.hess")
    assert_one_sentence(verify(invoke, data, "old.hess", "--rows", "patch"), "calibrate again, or take rows 'all'")


@pytest.mark.usefixtures("no_model")
def test_a_read_only_profile_is_told_before_the_model_is_loaded(
    invoke: Invoke, data: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.chmod(0o444)
    writable = os.access
    if os.access(path, os.W_OK):  # as root everything is

        def access(where: object, mode: int) -> bool:
            return not (mode == os.W_OK and Path(str(where)).suffix == ".hess") and writable(where, mode)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "access", access)
    assert_one_sentence(verify(invoke, data, path), "demo.hess is read-only", "--no-record")


def test_only_scenes_of_the_calibration(invoke: Invoke, data: str, path: Path) -> None:
    folder = f"{data}/room-20000000"
    assert_one_sentence(verify(invoke, folder, path), "none of 1 scenes is held out", "names of their own")


def test_too_few_patches_for_the_blocks(invoke: Invoke, data: str, path: Path) -> None:
    before = path.read_bytes()
    options = ("--model", "demo", "--data", data, "--profile", path, "--scenes", 1, "--views", 2)
    assert_one_sentence(invoke("verify", *options), "nothing was dropped", "blocks of 128 x 64")
    assert path.read_bytes() == before
