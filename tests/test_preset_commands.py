"""A preset from the command line: calibrated for, remembered by the profile, followed by the other commands."""

from __future__ import annotations

import csv
import dataclasses
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hess_plugin import CalibrationError, PatchError, Profile, calibrate, patch
from hess_plugin.block_choice import measured_choice
from hess_plugin.cli import main
from hess_plugin.demo.model import load_demo_model
from hess_plugin.demo.scenes import RoomScenes
from hess_plugin.evaluation.arms import Arm
from hess_plugin.evaluation.comparison import Runner
from hess_plugin.presets import PRESETS
from hess_plugin.verified_profiles import harm_digest, verifications

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


def test_the_demo_measures_a_preset_beside_the_published_method(tmp_path: Path) -> None:
    size = ("--calibration-scenes", "1", "--test-scenes", "2", "--views", "4")
    plain = hess_patch("demo", *size, "-o", tmp_path / "plain")
    beside = hess_patch("demo", *size, "--preset", "balanced", "-o", tmp_path / "beside")
    assert plain.exit_code == beside.exit_code == 0, beside.output
    assert "balanced" not in plain.stdout
    said = "balanced: blocks of 8 x 8 chosen by restore, parts of 4 x 8, hilbert order, budgets by harm; the others"
    assert said in " ".join(beside.stdout.split())
    found = {name: rows_of(tmp_path / name / "results.csv") for name in ("plain", "beside")}
    assert Counter(row["arm"] for row in found["beside"]) == Counter(
        dense=2, uniform=8, hess=8, reverse=8, balanced=8
    )  # 4 sparsities of 2 rooms
    timed = {"seconds"}

    def figures(name: str) -> list[dict[str, str]]:
        return [{k: v for k, v in row.items() if k not in timed} for row in found[name] if row["arm"] != "balanced"]

    assert [{k: v for k, v in row.items() if k != "preset"} for row in figures("beside")] == figures("plain")
    by_arm = {arm: [row for row in found["beside"] if row["arm"] == arm] for arm in ("hess", "balanced")}
    assert [row["auc30"] for row in by_arm["hess"]] != [row["auc30"] for row in by_arm["balanced"]]
    profile = Profile.load(tmp_path / "beside" / "demo.hess")
    assert profile.has_harm and profile.metadata["preset"] == "balanced"
    assert not Profile.load(tmp_path / "plain" / "demo.hess").has_harm


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


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


CHOICE = ("selector", "pool_q", "pool_k", "block_order")


def test_an_evaluation_has_what_a_patch_would_take_and_says_how_blocks_were_chosen(
    profile: Path, tmp_path: Path
) -> None:
    command = ("evaluate", *MEASURE, "--profile", profile, "--sparsity", "0.6", "-o")
    result = hess_patch(*command, tmp_path / "a.csv")
    assert result.exit_code == 0, result.output
    assert "; blocks of 8 x 8 chosen by restore, parts of 2 x 2; " in result.stdout
    rows = rows_of(tmp_path / "a.csv")
    assert {row["arm"] for row in rows} == {"dense", "uniform", "hess", "harm"}
    assert {tuple(row[name] for name in CHOICE) for row in rows} == {("restore", "2", "2", "raster")}
    result = hess_patch(*command, tmp_path / "b.csv", "--preset", "hess", "--block-order", "hilbert")
    assert result.exit_code == 0 and "; blocks of 8 x 8 chosen by mass, hilbert order; " in result.stdout
    plain = rows_of(tmp_path / "b.csv")
    assert {row["arm"] for row in plain} == {"dense", "uniform", "hess"} and plain[0].keys() == rows[0].keys()
    assert {tuple(row[name] for name in CHOICE) for row in plain} == {("mass", "8", "8", "hilbert")}


def test_a_sweep_is_planned_by_what_a_preset_means_and_not_by_its_name(profile: Path, tmp_path: Path) -> None:
    plain = Profile.load(profile)
    plain = dataclasses.replace(plain, harm={}, metadata={})
    plain.save(tmp_path / "plain.hess")
    folder = tmp_path / "s"

    def sweep(*more: str, path: Path = tmp_path / "plain.hess") -> Result:
        amount = ("--sparsity", "0.6", "--arm", "hess")
        return hess_patch("sweep", *MEASURE, "--profile", path, "-o", folder, *amount, *more)

    result = sweep()
    assert result.exit_code == 0 and "All arms: blocks of 8 x 8 chosen by mass." in result.stdout, result.output
    plan = (folder / "sweep.json").read_text()
    measurements = (folder / "measurements.csv").read_bytes()
    held = json.loads(plan)
    assert [held["plan"][name] for name in CHOICE] == ["mass", 8, 8, "raster"] and "preset" not in held["plan"]
    for same in (("--preset", "hess"), ("--pool-q", "8", "--selector", "mass")):
        assert sweep(*same).exit_code == 0
        assert (folder / "sweep.json").read_text() == plan
    for name in CHOICE:  # as earlier versions left it
        del held["plan"][name]
    (folder / "sweep.json").write_text(json.dumps(held))
    assert sweep().exit_code == 0 and (folder / "measurements.csv").read_bytes() == measurements
    for other, key in (("--preset=accurate", "selector"), ("--pool-k=4", "pool_k"), ("--block-order=tiles", "block_o")):
        result = sweep(other)
        assert result.exit_code == 1 and f"other settings ({key}" in " ".join(result.stderr.split())
    for told in (held, json.loads(plan)):
        (folder / "sweep.json").write_text(json.dumps(told))
        assert hess_patch("report", folder).exit_code == 0
        page = (folder / "report.html").read_text()
        assert "patch keys pooled together" in page and "selector" in page


def test_a_profile_is_verified_as_a_patch_uses_it(profile: Path, tmp_path: Path) -> None:
    path = tmp_path / "demo.hess"
    Profile.load(profile).save(path)
    command = ("verify", *MEASURE[:-2], "--profile", path, "--sparsity", "0.6")
    result = hess_patch(*command)
    assert result.exit_code == 0 and "| harm " in result.stdout and "| hess " not in result.stdout, result.output
    assert "budgets by harm; blocks of 8 x 8 chosen by restore, parts of 2 x 2" in " ".join(result.stdout.split())
    (found,) = verifications(Profile.load(path))
    assert (found.allocation, found.selection) == ("harm", "restore, parts of 2 x 2")
    assert found.harm == harm_digest(Profile.load(path)) and set(found.measured) == {"uniform", "harm"}
    assert hess_patch(*command, "--preset", "hess").exit_code == 0
    found = verifications(Profile.load(path))[-1]
    assert (found.allocation, found.selection, found.harm) == ("hess", "mass", None)
    assert len(verifications(Profile.load(path))) == 2
    shown = hess_patch("show", path, "--heads", 1).stdout
    assert (
        "chosen by restore, parts of 2 x 2; budgets by harm: " in shown
        and "chosen by mass; budgets by score: " in shown
    )


def test_show_tells_the_preset_and_how_harm_was_measured(profile: Path, tmp_path: Path) -> None:
    shown = hess_patch("show", profile, "--heads", 1, "--png", tmp_path / "a.png").stdout
    parts = "query blocks in 4 parts, key blocks in 4 parts"
    assert f"\npreset: accurate (blocks chosen by restore, {parts}; budgets by harm)\n" in shown
    assert "\nharm: of what leaving out blocks of 8 x 8 chosen by restore, parts of 2 x 2 does, keeping " in shown
    found = Profile.load(profile)
    dataclasses.replace(found, harm={}, metadata={"preset": "later"}).save(tmp_path / "later.hess")
    shown = hess_patch("show", tmp_path / "later.hess", "--heads", 1).stdout
    assert "preset: later, which this version does not know" in shown and "\nharm: " not in shown


def test_a_patch_by_harm_of_blocks_chosen_otherwise_warns(profile: Path) -> None:
    model = load_demo_model()

    def told(**options: object) -> str | None:
        given: dict[str, Any] = {"sparsity": 0.5, "block_q": 8, "block_k": 8} | options
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            patch(model, profile=profile, **given).remove()
        assert len(caught) <= 1 and all(one.filename == __file__ for one in caught)
        return str(caught[0].message) if caught else None

    assert told() is None and told(block_q=16, block_k=4) is None  # other sizes in as many parts
    assert told(preset="hess") is None and told(allocation="hess", selector="mass") is None
    text = told(selector="mass", block_order="hilbert", verdict="ignore")
    assert text is not None and "\n" not in text and text.startswith(
        "Budgets go by harm that was measured with blocks of 8 x 8 chosen by restore, parts of 2 x 2, and this patch "
        "has blocks of 8 x 8 chosen by mass, hilbert order"
    )  # fmt: skip
    for options in ({"pool_q": 4}, {"preset": "balanced"}, {"block_order": "tiles"}):
        assert told(**options) is not None


@pytest.mark.parametrize("facts", [None, [], "mass", {"selector": "later"}, {"block_q": "8"}, {"pool_k": 7}])
def test_records_of_the_measurement_that_tell_nothing_are_passed_over(profile: Path, facts: Any) -> None:
    found = Profile.load(profile)
    found = dataclasses.replace(found, metadata={**found.metadata, "harm": facts})
    assert measured_choice(found) is None
    patch(load_demo_model(), profile=found, sparsity=0.5, block_q=8, block_k=8, selector="mass").remove()


def test_a_mistake_in_the_selection_is_told_before_anything_is_done(
    profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("hess_plugin.plugins.load_model", no_model)
    found = Profile.load(profile)
    dataclasses.replace(found, metadata={"preset": "later"}).save(tmp_path / "later.hess")
    sweep = ("sweep", *MEASURE, "-o", tmp_path / "s", "--arm", "hess")
    verify = ("verify", *MEASURE[:-2])
    for command in (("evaluate", *MEASURE), sweep, verify, ("run",)):
        program = ("--", "true") if command[0] == "run" else ()
        blocks = BLOCKS if command[0] == "run" else ()
        wrong = hess_patch(*command, *blocks, "--profile", profile, "--pool-q", 7, *program)
        assert wrong.exit_code in (1, 2), wrong.output
        assert "pool_q is 7, wanted a divisor of the 8 tokens of its block" in " ".join(wrong.stderr.split())
        wrong = hess_patch(*command, "--profile", tmp_path / "later.hess", *program)
        assert wrong.exit_code in (1, 2), wrong.output
        assert "the preset 'later', which this version does not know" in " ".join(wrong.stderr.split())
    wrong = hess_patch("run", "--pool-q", 7, "--", "true")
    assert wrong.exit_code in (1, 2) and "pool_q is 7, wanted a divisor of the 128" in " ".join(wrong.stderr.split())
    assert not (tmp_path / "s").exists()


def test_a_runner_refuses_options_before_the_first_forward(profile: Path) -> None:
    arms = [Arm("dense"), Arm("uniform", 0.5)]
    for options, words in (({"pool_q": 7}, "pool_q is 7"), ({"selector": "best"}, "selector is 'best'")):
        runner = Runner(load_demo_model(), profile=Profile.load(profile), options=options)
        with pytest.raises(PatchError, match=words):
            runner.check(arms)


def test_mistakes_are_told_in_a_sentence(profile: Path) -> None:
    result = hess_patch("evaluate", *MEASURE, "--pool-q", "3")
    assert result.exit_code in (1, 2), result.output
    assert "pool_q is 3, wanted a divisor of the 8 tokens of its block" in " ".join(result.stderr.split())
    result = hess_patch("evaluate", *MEASURE, "--selector", "best")
    assert result.exit_code == 2 and "'mass', 'drift', 'restore'" in result.stderr
    result = hess_patch(*CALIBRATE, "--preset", "hess", *BLOCKS, "-o", profile)
    assert result.exit_code == 2 and "add --harm" in result.stderr


def test_a_report_tells_how_to_calibrate_alike(profile: Path) -> None:
    from hess_plugin.evaluation.sweep_words import calibration_command

    found = Profile.load(profile)
    command = calibration_command(found)
    assert command is not None and "--preset accurate --harm --block-q 8 --block-k 8 --pool-q 2 --pool-k 2" in command
    plain = {name: value for name, value in found.metadata.items() if name != "harm"}
    without = calibration_command(dataclasses.replace(found, metadata=plain, harm={}))
    assert without is not None and "--preset accurate --no-harm" in without
