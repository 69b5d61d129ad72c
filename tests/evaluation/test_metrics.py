"""All metrics of a prediction under one alignment."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hess_plugin.calibration.alignment import align
from hess_plugin.demo.rooms import make_scene
from hess_plugin.evaluation.clouds import pixel_distance
from hess_plugin.evaluation.metrics import ALIGNMENTS, MetricSettings, PredictionScores, measure_prediction
from hess_plugin.evaluation.pose import absolute_trajectory_error, pose_auc
from hess_plugin.exceptions import CalibrationError, MissingDependency, PatchError
from hess_plugin.geometry import Similarity
from hess_plugin.predictions import Prediction
from hess_plugin.scenes import Scene

MakeSimilarity = Callable[[int], Similarity]
CLOUDS = ("accuracy", "completeness", "chamfer", "f1")
LENGTHS = ("ate", "centre_error", "point_error", "accuracy", "completeness", "chamfer")


@pytest.fixture(scope="module")
def scene() -> Scene:
    return make_scene(3, views=4).resized(24, 24).normalised()


def predicted(scene: Scene, noise: float = 0.02, seed: int = 0, to_model: Similarity | None = None) -> Prediction:
    """The truth with noise on points and centres, in another frame and unit; every tenth point unsure."""
    generator = torch.Generator().manual_seed(seed)
    known = scene.world_points()
    assert known is not None
    points = known[0].double() + noise * torch.randn(known[0].shape, generator=generator)
    c2w = scene.c2w.double().clone()
    c2w[:, :3, 3] += noise * torch.randn(scene.views, 3, generator=generator)
    to_model = to_model or Similarity.identity()
    confidence = 1.0 + (torch.rand(points.shape[:3], generator=generator) > 0.1).float()
    return Prediction(to_model.apply_poses(c2w), to_model.apply(points), confidence, 1.5)


def differences(found: PredictionScores, wanted: PredictionScores) -> dict[str, float]:
    numbers = [name for name, value in asdict(wanted).items() if isinstance(value, float)]
    return {name: abs(getattr(found, name) - getattr(wanted, name)) for name in numbers}


@pytest.mark.parametrize("how", ALIGNMENTS)
def test_every_metric_is_that_of_its_definition(scene: Scene, random_similarity: MakeSimilarity, how: str) -> None:
    prediction = predicted(scene, to_model=random_similarity(1))
    closed_form = "cameras" if how == "cameras" else "pixels"
    found = align(prediction, scene, icp=how == "icp", closed_form=closed_form)
    scores = measure_prediction(prediction, scene, MetricSettings(alignment=how))
    assert scores.alignment == found.method and found.method.startswith(closed_form)
    assert ("icp" in scores.alignment) == (how == "icp") and scores.unit == "scene"

    move, true = found.similarity, scene.cloud()
    assert true is not None
    every = torch.cdist(move.apply(prediction.points[prediction.confident].double()), true.double())
    there, back = every.amin(1), every.amin(0)
    precision, recall = float((there < 0.05).double().mean()), float((back < 0.05).double().mean())
    centres = move.apply(prediction.centres.double()) - scene.centres.double()
    areas = pose_auc(prediction.c2w, scene.c2w)
    wanted = PredictionScores(
        **{f"auc{degrees}": areas[degrees] for degrees in (30, 15, 5, 3)},
        ate=absolute_trajectory_error(prediction.c2w, scene.c2w),
        centre_error=math.sqrt(float(centres.square().sum(-1).mean())),
        point_error=pixel_distance(prediction, scene, move),
        accuracy=float(there.mean()),
        completeness=float(back.mean()),
        chamfer=float(there.mean() + back.mean()) / 2,
        f1=2 * precision * recall / (precision + recall),
        alignment=scores.alignment,
        unit="scene",
    )
    assert max(differences(scores, wanted).values()) < 1e-6
    assert 0 < scores.f1 < 1 and scores.ate <= scores.centre_error + 1e-12
    if how == "cameras":
        assert scores.ate == pytest.approx(scores.centre_error)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), how=st.sampled_from(["pixels", "cameras"]))
def test_the_model_s_own_frame_and_unit_change_nothing(
    scene: Scene, random_similarity: MakeSimilarity, seed: int, how: str
) -> None:
    chosen = MetricSettings(alignment=how, threshold=0.03)
    plain = measure_prediction(predicted(scene), scene, chosen)
    moved = measure_prediction(predicted(scene, to_model=random_similarity(seed)), scene, chosen)
    off = differences(moved, plain)
    assert max(value for name, value in off.items() if not name.startswith("auc")) < 1e-6
    assert all(off[f"auc{degrees}"] < 0.35 for degrees in (30, 15, 5, 3))  # an error at the edge of a degree may jump


def test_the_truth_is_perfect(scene: Scene, random_similarity: MakeSimilarity) -> None:
    scores = measure_prediction(predicted(scene, 0.0, to_model=random_similarity(5)), scene)
    assert scores.auc3 == 1.0
    # A tenth of the points are unsure: they leave holes that a tenth of the true points fall into.
    assert all(getattr(scores, name) < 1e-6 for name in LENGTHS if name not in ("completeness", "chamfer"))
    assert 1e-4 < scores.completeness < 0.02 and 0.98 < scores.f1 < 1
    sure = measure_prediction(predicted(scene, 0.0), scene, MetricSettings(min_confidence=0.0))
    assert sure.completeness < 1e-6 and sure.f1 == 1


def test_confidence_chooses_the_points_of_clouds_but_not_of_the_pointmap(scene: Scene) -> None:
    prediction = predicted(scene, 0.0)
    points = torch.where(prediction.confident[..., None], prediction.points, prediction.points + 3)
    wrong = replace(prediction, points=points)  # where the model is unsure it is far off
    sure = measure_prediction(wrong, scene)
    assert sure.accuracy < 1e-6 and sure.point_error > 0.3
    every = measure_prediction(wrong, scene, MetricSettings(min_confidence=1.0))
    assert every.accuracy > 0.1
    none = measure_prediction(wrong, scene, MetricSettings(min_confidence=9.0))
    assert none.f1 == 0 and math.isnan(none.accuracy) and math.isnan(none.chamfer)
    assert none.alignment == "cameras" and none.point_error == pytest.approx(sure.point_error, abs=1e-5)


def test_a_scene_of_poses_alone_has_no_clouds(scene: Scene) -> None:
    bare = replace(scene, depth=None)
    for how in ALIGNMENTS:
        scores = measure_prediction(predicted(scene), bare, MetricSettings(alignment=how))
        assert all(math.isnan(getattr(scores, name)) for name in (*CLOUDS, "point_error"))
        assert scores.alignment == "cameras" and scores.centre_error == pytest.approx(scores.ate) and scores.ate > 0


def test_cameras_on_a_line_have_a_least_distance(scene: Scene) -> None:
    bare = replace(scene, depth=None)
    two = measure_prediction(_only(predicted(scene), [0, 1]), bare.subset([0, 1]))
    assert two.centre_error == pytest.approx(0, abs=1e-9) and two.alignment == "cameras"
    c2w = scene.c2w.clone()
    c2w[:, :3, 3] = torch.arange(4.0)[:, None].to(c2w) * torch.tensor([1.0, 0, 0]).to(c2w)
    line = replace(bare, c2w=c2w)
    moved = c2w.clone()
    moved[:, 1, 3] += torch.tensor([0.1, -0.1, -0.1, 0.1]).to(c2w)  # leaves the best line where it is
    scores = measure_prediction(replace(predicted(scene), c2w=moved), line)
    # Umeyama's scale s = var(x) / (var(x) + 0.01) with var(x) = 1.25, and its least squared distance.
    assert scores.centre_error == pytest.approx(math.sqrt(1.25 - 1.25**2 / 1.26), rel=1e-6)


def test_a_scene_of_points_without_depth_is_aligned_by_its_cameras(scene: Scene) -> None:
    cloud = scene.cloud()
    known = replace(scene, depth=None, points=cloud)
    scores = measure_prediction(predicted(scene, 0.0), known)
    assert scores.alignment == "cameras" and scores.accuracy < 1e-5 and math.isnan(scores.point_error)
    assert scores.f1 > 0.99


def test_cameras_that_fix_no_turn_leave_it_to_the_pixels(scene: Scene) -> None:
    pair = scene.subset([0, 1])
    scores = measure_prediction(_only(predicted(scene), [0, 1]), pair, MetricSettings(alignment="cameras"))
    assert scores.alignment == "pixels"


def test_what_cannot_be_aligned_is_told(scene: Scene) -> None:
    prediction = predicted(scene)
    with pytest.raises(CalibrationError, match=r"has 3 views, scene .* has 4"):
        measure_prediction(_only(prediction, [0, 1, 2]), scene)
    for truth in (scene, replace(scene, depth=None)):
        broken = replace(prediction, c2w=prediction.c2w * torch.nan)
        with pytest.raises(CalibrationError, match="values in c2w that are not finite"):
            measure_prediction(broken, truth)
    hidden = replace(_only(prediction, [0, 1]), min_confidence=9.0)
    with pytest.raises(CalibrationError, match="has 0 points of confidence at least 9, too few to align"):
        measure_prediction(hidden, scene.subset([0, 1]))


def test_fewer_points_are_a_sample_and_the_same_one_each_time(scene: Scene) -> None:
    whole = measure_prediction(predicted(scene), scene)
    few = measure_prediction(predicted(scene), scene, MetricSettings(max_points=300))
    assert few == measure_prediction(predicted(scene), scene, MetricSettings(max_points=300))
    assert few.accuracy > whole.accuracy and few.completeness > whole.completeness  # neighbours get farther
    assert few.point_error == whole.point_error


def test_a_missing_open3d_is_told_where_icp_needs_it(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = measure_prediction(predicted(scene), scene)
    monkeypatch.setitem(sys.modules, "open3d", None)
    assert measure_prediction(predicted(scene), scene) == plain  # SciPy finds the same neighbours
    with pytest.raises(MissingDependency, match=r"ICP needs Open3D: pip install open3d\.$"):
        measure_prediction(predicted(scene), scene, MetricSettings(alignment="icp"))


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"threshold": 0.0}, r"threshold is 0\.0, wanted a distance above 0"),
        ({"threshold": math.nan}, "threshold is nan"),
        ({"threshold": True}, "threshold is True"),
        ({"alignment": "ransac"}, "alignment is 'ransac', wanted one of pixels, icp, cameras"),
        ({"min_confidence": math.nan}, "min_confidence is nan"),
        ({"min_confidence": "1"}, "min_confidence is '1'"),
        ({"max_points": 0}, "max_points is 0, wanted a whole number of at least 1"),
        ({"max_points": 2.5}, r"max_points is 2\.5"),
    ],
)
def test_wrong_settings_are_told(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PatchError, match=sentence):
        MetricSettings(**wrong)


def test_an_unknown_closed_form_is_told(scene: Scene) -> None:
    with pytest.raises(CalibrationError, match="closed_form is 'points', wanted one of pixels, cameras"):
        align(predicted(scene), scene, closed_form="points")


def _only(prediction: Prediction, views: list[int]) -> Prediction:
    def kept(tensor: Tensor) -> Tensor:
        return tensor[views]

    return Prediction(
        kept(prediction.c2w), kept(prediction.points), kept(prediction.confidence), prediction.min_confidence
    )


def test_pixels_without_depth_do_not_count_against_accuracy(room: Scene) -> None:
    """The sky is in no depth map: a prediction of it is neither near nor far from the truth."""
    scene = room.normalised()
    known = scene.world_points()
    assert known is not None and scene.depth is not None
    depth = scene.depth.clone()
    depth[:, :20] = 0
    holes = replace(scene, depth=depth)
    points = known[0].clone()
    points[:, :20] += 5.0
    prediction = Prediction(scene.c2w, points, torch.ones(points.shape[:3]), 0.5)
    scores = measure_prediction(prediction, holes)
    assert scores.accuracy == pytest.approx(0, abs=1e-5) and scores.f1 == 1.0
    scanned = replace(holes, points=known[0][known[1]])  # a scan speaks of all
    assert measure_prediction(prediction, scanned).accuracy > 1.0
