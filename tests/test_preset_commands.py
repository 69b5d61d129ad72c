"""A preset from the command line: calibrated for, remembered by the profile, followed by the other commands."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hess_plugin import CalibrationError, Profile, calibrate, patch
from hess_plugin.cli import main
from hess_plugin.demo.model import load_demo_model
from hess_plugin.demo.scenes import RoomScenes
from hess_plugin.presets import PRESETS

BLOCKS = ("--block-q", "8", "--block-k", "8")
CALIBRATE = ("calibrate", "--model", "demo", "--data", "rooms:calibration,count=1,size=4")
MEASURE = ("--model", "demo", "--data", "rooms:test,count=1,size=4", *BLOCKS, "--max-points", "500")


def hess_patch(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(part) for part in arguments], prog_name="hess-patch")


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "demo.hess"
    result = hess_patch(*CALIBRATE, "--preset", "accurate", *BLOCKS, "-o", path)
    assert result.exit_code == 0, result.output
    return path


def test_calibrating_for_a_preset_measures_what_it_needs(profile: Path) -> None:
    found = Profile.load(profile)
    preset = PRESETS["accurate"]
    assert found.metadata["preset"] == "accurate" and found.has_harm
    assert found.metadata["harm"]["selector"] == preset.selector
    assert found.metadata["harm"]["pool_q"] == 8 // preset.parts_q


def test_what_is_measured_may_be_refused(tmp_path: Path) -> None:
    path = tmp_path / "demo.hess"
    assert hess_patch(*CALIBRATE, "--preset", "accurate", "--no-harm", "-o", path).exit_code == 0
    found = Profile.load(path)
    assert found.metadata["preset"] == "accurate" and not found.has_harm
    plain = calibrate(load_demo_model(), RoomScenes("calibration", 1, 4), preset="hess")
    assert plain.metadata["preset"] == "hess" and not plain.has_harm
    with pytest.raises(CalibrationError, match="harm is True, wanted a HarmSettings"):
        calibrate(load_demo_model(), RoomScenes("calibration", 1, 4), harm=True)  # type: ignore[arg-type]


def test_scenes_with_too_few_blocks_are_told(caplog: pytest.LogCaptureFixture) -> None:
    found = calibrate(load_demo_model(), RoomScenes("calibration", 1, 3), preset="accurate")  # 2 blocks of 64 patches
    assert "there are no harm curves" in caplog.text
    with patch(load_demo_model(), profile=found, sparsity=0.5, block_q=8, block_k=8) as handle:
        assert handle.report().allocation == "hess"


def test_a_patch_follows_the_profile(profile: Path) -> None:
    model = load_demo_model()
    with patch(model, profile=profile, sparsity=0.5, block_q=8, block_k=8) as handle:
        settings = handle.report().settings
    assert (settings["selector"], settings["pool_q"], handle.report().allocation) == ("restore", 2, "harm")


def test_both_arms_of_an_evaluation_choose_alike(
    profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def patched(model: object, **options: object) -> object:
        handle = patch(model, **options)  # type: ignore[arg-type]
        seen.append((handle.report().allocation, handle.report().settings["selector"]))
        return handle

    monkeypatch.setattr("hess_plugin.evaluation.comparison.patch", patched)
    out = tmp_path / "cells.csv"
    arms = ("--arm", "uniform", "--arm", "hess", "--arm", "harm", "--sparsity", "0.6")
    result = hess_patch("evaluate", *MEASURE, "--profile", profile, *arms, "-o", out)
    assert result.exit_code == 0, result.output
    assert seen == [("uniform", "restore"), ("hess", "restore"), ("harm", "restore")]
    with out.open(encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row and not row[0].startswith("#")]
    assert len(rows) >= 4
    seen.clear()
    asked = ("--preset", "hess", "--arm", "hess", "--sparsity", "0.6")
    assert hess_patch("evaluate", *MEASURE, "--profile", profile, *asked).exit_code == 0
    assert seen == [("hess", "mass")]


def test_mistakes_are_told_in_a_sentence(profile: Path) -> None:
    result = hess_patch("evaluate", *MEASURE, "--pool-q", "3")
    assert result.exit_code in (1, 2), result.output
    assert "pool_q is 3, wanted a divisor of the 8 tokens of its block" in " ".join(result.stderr.split())
    result = hess_patch("evaluate", *MEASURE, "--selector", "best")
    assert result.exit_code == 2 and "'mass', 'drift', 'restore'" in result.stderr
    result = hess_patch(*CALIBRATE, "--preset", "hess", *BLOCKS, "-o", profile)
    assert result.exit_code == 2 and "add --harm" in result.stderr
