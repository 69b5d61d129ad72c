"""A prediction that cannot be aligned is a measurement with a reason, and ends no comparison, sweep or command."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from hess_plugin import CalibrationError, Profile, calibrate
from hess_plugin.adapting import Adapter
from hess_plugin.cli import main
from hess_plugin.demo.model import load_demo_model
from hess_plugin.demo.scenes import RoomScenes
from hess_plugin.evaluation.arms import Arm
from hess_plugin.evaluation.comparison import compare
from hess_plugin.evaluation.metrics import MetricSettings, measure_prediction, scores_without_alignment
from hess_plugin.evaluation.records import FAILED, Journal, Measurement, read_measurements
from hess_plugin.evaluation.statistics import failed_lines, summarise
from hess_plugin.evaluation.verify import verify
from hess_plugin.interception import is_patched
from hess_plugin.predictions import Prediction
from hess_plugin.scenes.scene import Scene

METRICS = MetricSettings(max_points=500)
ALIGNED = ("centre_error", "point_error", "accuracy", "completeness", "chamfer", "f1")
Broken = Callable[[Prediction], Prediction]


def unsure(found: Prediction) -> Prediction:
    """Nothing is confident, and all cameras are in one place: neither pixels nor cameras nor features fix a frame."""
    c2w = found.c2w.clone()
    c2w[:, :3, 3] = 1.0
    return replace(found, c2w=c2w, min_confidence=math.inf)


def infinite_points(found: Prediction) -> Prediction:
    """One point is not finite, the cameras are as they were."""
    points = found.points.clone()
    points[0, 0, 0] = math.inf
    return replace(found, points=points)


def nan_camera(found: Prediction) -> Prediction:
    """One camera of four is not a number."""
    c2w = found.c2w.clone()
    c2w[1] = math.nan
    return replace(found, c2w=c2w)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "demo.hess"
    calibrate(load_demo_model(), RoomScenes("calibration", 2, 4), output=path)
    return path


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Callable[[Broken, int], None]:
    """Break what patched models predict for every so-manieth scene, told apart by its images."""
    predict = Adapter.predict

    def install(broken: Broken, every: int) -> None:
        seen: list[Tensor] = []

        def breaks(self: Adapter, model: nn.Module, images: Tensor) -> Prediction:
            found = predict(self, model, images)
            if not any(torch.equal(images, other) for other in seen):
                seen.append(images.clone())
            index = next(i for i, other in enumerate(seen) if torch.equal(images, other))
            return broken(found) if is_patched(model) and index % every == every - 1 else found

        monkeypatch.setattr(Adapter, "predict", breaks)

    return install


@pytest.mark.parametrize("broken", [unsure, infinite_points, nan_camera])
def test_a_comparison_goes_on(
    breaking: Callable[[Broken, int], None], broken: Broken, caplog: pytest.LogCaptureFixture
) -> None:
    arms = [Arm("dense"), Arm("uniform", 0.5), Arm("equal", 0.5, "equal")]
    rooms = RoomScenes("test", 3, 4)
    whole = compare(load_demo_model(), rooms, arms, metrics=METRICS, block_q=8, block_k=8)
    assert not any(row.failure for row in whole)
    breaking(broken, 2)  # the second of three scenes
    rows = compare(load_demo_model(), rooms, arms, metrics=METRICS, block_q=8, block_k=8)
    hurt = [row for row in rows if row.failure]
    assert [(row.scene, row.arm) for row in hurt] == [(rooms.names[1], "uniform"), (rooms.names[1], "equal")]
    for row, before in zip(rows, whole, strict=True):
        if not row.failure:
            assert replace(row, seconds=0.0) == replace(before, seconds=0.0)
            continue
        assert all(math.isnan(getattr(row, metric)) for metric in ALIGNED) and row.sparsity == before.sparsity
        if broken is infinite_points:
            assert (row.auc30, row.ate) == (before.auc30, before.ate)
        elif broken is nan_camera:  # three of six pairs are left
            assert row.auc30 <= min(before.auc30, 0.5) and math.isnan(row.ate)
        else:
            assert math.isfinite(row.ate) and row.ate > before.ate
    found = {summary.arm: summary for summary in summarise(rows)}
    assert found["uniform"].scenes == 3 and found["uniform"].value.count["chamfer"] == 2
    assert found["uniform"].value.count["auc30"] == found["dense"].value.count["chamfer"] == 3
    assert found["equal"].against["uniform"].count["point_error"] == 2
    assert found["uniform"].alignment == "pixels; failed in 1 of 3 scenes" and found["dense"].alignment == "pixels"
    lines = failed_lines(rows)
    assert [line.partition(" could")[0] for line in lines] == ["uniform at 0.5", "equal at 0.5"]
    assert all("in 1 of 3 scenes" in line and f"{rooms.names[1]}: The pred" in line for line in lines)
    assert f"uniform at 0.5 is not measured on {rooms.names[1]}: The pred" in caplog.text


@pytest.mark.parametrize("distance", [1e9, 1e30])
def test_a_point_far_beyond_all_others_does_not_end_icp(room: Scene, distance: float) -> None:
    pytest.importorskip("open3d", reason="ICP needs Open3D")
    known = room.world_points()
    assert known is not None
    points = known[0].clone()
    points[0, 0, 0, 0] = distance
    found = Prediction(room.c2w, points, torch.ones(points.shape[:3]), 0.5)
    scores = measure_prediction(found, room, MetricSettings(alignment="icp", max_points=500))
    assert scores.alignment.startswith("cameras, icp") and scores.auc30 == 1.0
    assert scores.centre_error == pytest.approx(0.0, abs=1e-6)  # and ICP did not follow the stray point


def test_what_does_not_fit_the_scene_at_all_is_no_measurement(room: Scene) -> None:
    shape = (2, 6, 6)
    found = Prediction(torch.eye(4).repeat(2, 1, 1), torch.zeros(*shape, 3), torch.ones(shape), 0.0)
    with pytest.raises(CalibrationError, match="cannot be compared"):
        scores_without_alignment(found, room, "why")


def test_a_reason_survives_the_file(tmp_path: Path) -> None:
    row = Measurement("a", "0.5", "hess", *[math.nan] * 13, alignment=f'{FAILED}one, "two" and 3; four')
    Journal(tmp_path / "rows.csv", {"machine": "here"}).add([row])
    (found,) = read_measurements(tmp_path / "rows.csv")
    assert found.failure == 'one, "two" and 3; four' and replace(row, alignment="pixels").failure == ""


def test_a_verdict_counts_the_scenes_it_rests_on(breaking: Callable[[Broken, int], None], profile: Path) -> None:
    breaking(unsure, 3)
    rooms = RoomScenes("test", 3, 4)
    found = verify(load_demo_model(), rooms, Profile.load(profile), [0.5], block_q=8, block_k=8).verifications[0]
    assert found.differences["point_error"].scenes == 2 and found.differences["auc30"].scenes == 3


@pytest.mark.parametrize("every", [1, 2])
def test_commands_go_on_and_say_so(
    breaking: Callable[[Broken, int], None], profile: Path, tmp_path: Path, every: int
) -> None:
    breaking(unsure, every)
    data = ["--model", "demo", "--data", "rooms:test,count=2,size=4", "--block-q", "8", "--block-k", "8"]
    data += ["--max-points", "500", "--sparsity", ".6"]
    command = ["sweep", *data, "--profile", str(profile), "--arm", "hess", "-o", str(tmp_path / "sweep")]
    sweep = CliRunner().invoke(main, command)
    assert sweep.exit_code == 0, sweep.output
    told = f"hess at 0.6 could not be aligned in {2 // every} of 2 scenes"
    assert told in sweep.output
    # The picture is of the first scene.
    assert ("were kept for a picture" in sweep.output) == (every == 1)
    assert (tmp_path / "sweep/clouds.safetensors").exists() == (every == 2)
    with (tmp_path / "sweep/cells.csv").open() as file:
        cells = {cell["arm"]: cell for cell in csv.DictReader(file)}
    assert float(cells["dense"]["chamfer"]) > 0 and math.isnan(float(cells["hess"]["chamfer"])) == (every == 1)
    assert f"failed in {2 // every} of 2 scenes" in cells["hess"]["alignment"]
    page = CliRunner().invoke(main, ["report", str(tmp_path / "sweep")])
    assert page.exit_code == 0, page.output
    assert f"failed in {2 // every} of 2 scenes" in (tmp_path / "sweep/report.html").read_text()
    evaluated = CliRunner().invoke(main, ["evaluate", *data, "--arm", "uniform"])
    assert evaluated.exit_code == 0 and f"uniform at 0.6 could not be aligned in {2 // every}" in evaluated.output
