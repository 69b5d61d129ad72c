"""Budgets over all layers from the command line: curves are measured, and followed by every command that takes arms."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from hess_plugin import Profile, calibrate
from hess_plugin.calibration.harm import HarmSettings
from hess_plugin.calibration.measuring import Protocol
from hess_plugin.cli import main
from hess_plugin.demo.model import load_demo_model
from hess_plugin.demo.scenes import RoomScenes

BLOCKS = ("--block-q", "8", "--block-k", "8")
CALIBRATE = ("calibrate", "--model", "demo", "--data", "rooms:calibration,count=2,size=4")
MEASURE = ("--model", "demo", "--data", "rooms:test,count=2,size=4", *BLOCKS, "--max-points", "500")


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "demo.hess"
    result = hess_patch(*CALIBRATE, "--harm", *BLOCKS, "-o", path)
    assert result.exit_code == 0, result.output
    return path


def hess_patch(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(part) for part in arguments], prog_name="hess-patch")


def assert_refused(result: Result, sentence: str) -> None:
    assert result.exit_code in (1, 2) and result.stderr.count("Error: ") == 1, result.output
    assert sentence in " ".join(result.stderr.split()) and "Traceback" not in result.output


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("without") / "demo.hess"
    calibrate(load_demo_model(), RoomScenes("calibration", 1, 4), output=path)
    return path


def test_the_command_measures_what_the_function_does(profile: Path) -> None:
    found = Profile.load(profile)
    wanted = calibrate(load_demo_model(), RoomScenes("calibration", 2, 4), harm=HarmSettings(block_q=8, block_k=8))
    assert found.metadata["harm"] == wanted.metadata["harm"]
    assert sorted(found.scenes) == sorted(wanted.scenes)  # the command shuffles them
    for name, curves in wanted.harm.items():
        by_scene = dict(zip(wanted.scenes, curves, strict=True))
        wanted_curves = torch.stack([by_scene[scene] for scene in found.scenes])
        torch.testing.assert_close(found.harm[name], wanted_curves, rtol=1e-2, atol=0.0)
    shown = hess_patch("show", profile, "--heads", 1)
    assert shown.exit_code == 0 and "\npreset: hess (blocks chosen by mass; budgets by score)\n" in shown.stdout
    assert "harm measured keeping 2 to " in shown.stdout
    parts = re.search(
        r"\nharm: of what leaving out blocks of 8 x 8 chosen by mass does, keeping 0\.111 to 0\.778 .* have (.*)%\.\n",
        shown.stdout,
    )
    assert parts is not None and 97 <= sum(int(part) for part in parts[1].split("%, ")) <= 103
    compared = hess_patch("compare", profile, profile)
    assert compared.exit_code == 0, compared.output


def test_a_dry_run_rehearses_the_measurement_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def rehearse(model: object, scenes: object, protocol: Protocol, *_: object, **__: object) -> str:
        asked.append(protocol.harm)
        return "little"

    monkeypatch.setattr("hess_plugin.calibration.rehearsal.rehearse", rehearse)
    for options in (("--harm", *BLOCKS), ("--no-harm",), ()):
        assert hess_patch(*CALIBRATE, "--dry-run", *options).exit_code == 0
    assert asked == [HarmSettings(block_q=8, block_k=8), None, None]


def test_evaluate_measures_the_arm_at_the_sparsity_asked_for(profile: Path, tmp_path: Path) -> None:
    arms = ("--arm", "uniform", "--arm", "harm", "--sparsity", "0.6", "--sparsity", "0.8")
    result = hess_patch("evaluate", *MEASURE, "--profile", profile, *arms, "-o", tmp_path / "a.csv")
    assert result.exit_code == 0, result.output
    with (tmp_path / "a.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] == "harm"]
    assert [row["row"] for row in rows] == ["0.6", "0.8"] * 2
    for row in rows:
        assert float(row["sparsity"]) == pytest.approx(float(row["row"]), abs=1e-3)
        layers = [float(part) for part in row["layers"].split()]
        assert sum(layers) / len(layers) == pytest.approx(float(row["row"]), abs=1e-3)
        assert max(layers) - min(layers) > 0.02


def test_a_sweep_sets_the_arm_to_the_sparsity_of_a_rule(profile: Path, tmp_path: Path) -> None:
    amounts = ("--sparsity", ".6", "--rule", "0.7,0.5", "--arm", "harm")
    command = ("sweep", *MEASURE, "--profile", profile, "-o", tmp_path / "s", *amounts)
    result = hess_patch(*command)
    assert result.exit_code == 0 and "Not matched" not in result.output, result.output
    with (tmp_path / "s" / "cells.csv").open() as file:
        cells = {(cell["row"], cell["arm"]): cell for cell in csv.DictReader(file)}
    assert {arm for _, arm in cells} == {"dense", "uniform", "harm"}
    for row in ("0.6", "rho 0.7 tau 0.5"):
        uniform, harm = (float(cells[row, arm]["sparsity"]) for arm in ("uniform", "harm"))
        assert harm == pytest.approx(uniform, abs=1e-3)
    measurements = (tmp_path / "s" / "measurements.csv").read_bytes()
    assert hess_patch(*command).exit_code == 0  # all of it is known
    assert (tmp_path / "s" / "measurements.csv").read_bytes() == measurements
    changed = Profile.load(profile)
    changed.harm["points"].mul_(torch.linspace(1, 2, 4, dtype=torch.float64)[None, :, None, None])
    changed.save(tmp_path / "other.hess")
    refused = hess_patch(*(tmp_path / "other.hess" if part == profile else part for part in command))
    assert_refused(refused, "harm_curves")
    assert hess_patch("report", tmp_path / "s").exit_code == 0


def test_a_sweep_of_a_profile_with_curves_has_the_arm_by_default(profile: Path, without: Path) -> None:
    from hess_plugin.commands.sweep import _arms

    options = {"arms": (), "camera_weight": (), "projection": (), "normalisation": (), "ablations": False}
    names = [[arm.name for arm in _arms(options, Profile.load(path))] for path in (profile, without)]
    assert names[0] == [*names[1], "harm"] and names[1][:3] == ["uniform", "equal", "hess"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((*CALIBRATE, "-o", "a.hess", "--block-q", "8"), "--block-q says how harm is measured; add --harm."),
        ((*CALIBRATE, "-o", "a.hess", "--selector", "mass"), "--selector says how harm is measured; add --harm."),
        ((*CALIBRATE, "-o", "a.hess", "--harm", "--selector", "best"), "'best' is not one of 'mass', 'drift'"),
        (("evaluate", *MEASURE, "--profile", "{without}", "--arm", "harm"), "calibrate again with --harm"),
        (("sweep", *MEASURE, "--profile", "{without}", "--arm", "harm", "-o", "s"), "calibrate again with --harm"),
        (("run", "--profile", "{without}", "--allocation", "harm", "--", "true"), "calibrate again with --harm"),
        (("run", "--allocation", "harm", "--", "true"), "--allocation needs a profile and none was given"),
        (
            ("run", "--profile", "{with}", "--allocation", "harm", "--cdf-threshold", ".9", "--", "true"),
            "--allocation harm takes a --sparsity, no --sparse-ratio or --cdf-threshold.",
        ),
        (("evaluate", *MEASURE, "--arm", "harm"), "--arm harm divides budgets by a profile and none was given"),
        (
            ("evaluate", *MEASURE, "--profile", "{with}", "--arm", "harm", "--sparse-ratio", ".5"),
            "allocation 'harm' divides one total over all layers, which sparse_ratio and cdf_threshold leave open",
        ),
    ],
)
def test_mistakes_are_one_sentence(
    profile: Path,
    without: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = {"{with}": profile, "{without}": without}
    assert_refused(hess_patch(*(paths.get(part, part) for part in arguments)), sentence)
    assert not list(tmp_path.iterdir())


def test_a_program_is_patched_by_the_curves(profile: Path) -> None:
    from hess_plugin import auto_patch

    with auto_patch(profile=profile, allocation="harm", sparsity=0.7, block_q=8, block_k=8) as auto:
        model = load_demo_model()
        model(RoomScenes("test", 1, 4)[0].images)
        report = auto.models[0].patch.report()
    assert report.allocation == "harm" and report.sparsity == pytest.approx(0.7, abs=1e-3)
