from __future__ import annotations

import math
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hess_plugin.evaluation.clouds import CloudScores, compare_clouds, nearest_distances, pixel_distance
from hess_plugin.exceptions import CalibrationError, MissingDependency
from hess_plugin.geometry import Similarity
from hess_plugin.predictions import Prediction
from hess_plugin.scenes import Scene

Make = Callable[..., Tensor]


def chamfer(predicted: Tensor, true: Tensor) -> float:
    return compare_clouds(predicted, true, threshold=1.0).chamfer


# Quarters: coordinates and squared distances are exact in float64, so that equal distances are equal.
quarters = st.integers(-12, 12).map(lambda count: count / 4)
clouds = st.lists(st.tuples(quarters, quarters, quarters), min_size=1, max_size=30)


def naive_distances(source: list[tuple[float, ...]], target: list[tuple[float, ...]]) -> list[float]:
    return [min(math.dist(a, b) for b in target) for a in source]


def naive_scores(predicted: list[tuple[float, ...]], true: list[tuple[float, ...]], threshold: float) -> CloudScores:
    there, back = naive_distances(predicted, true), naive_distances(true, predicted)
    precision = sum(d < threshold for d in there) / len(there)
    recall = sum(d < threshold for d in back) / len(back)
    f1 = 0.0 if precision == recall == 0 else 2 * precision * recall / (precision + recall)
    mean_there, mean_back = sum(there) / len(there), sum(back) / len(back)
    return CloudScores(mean_there, mean_back, (mean_there + mean_back) / 2, precision, recall, f1)


def approximately(scores: CloudScores) -> object:
    return pytest.approx(vars(scores), rel=1e-12, abs=1e-12, nan_ok=True)


@settings(deadline=None)  # the first example imports Open3D
@given(clouds, clouds, st.sampled_from([0.25, 0.5, 1.0, 2.0]))
def test_scores_are_those_of_every_pair(
    predicted: list[tuple[float, ...]], true: list[tuple[float, ...]], threshold: float
) -> None:
    there = nearest_distances(torch.tensor(predicted), torch.tensor(true))
    assert there.dtype == torch.float64 and there.tolist() == pytest.approx(naive_distances(predicted, true))
    found = compare_clouds(torch.tensor(predicted), torch.tensor(true), threshold)
    assert vars(found) == approximately(naive_scores(predicted, true, threshold))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_distances_are_exact_far_from_the_origin(dtype: torch.dtype, offset: float) -> None:
    predicted, true = (torch.rand(700, 3) + offset).to(dtype), (torch.rand(900, 3) * 1.2 + offset).to(dtype)
    every = (predicted.double()[:, None] - true.double()[None]).norm(dim=-1)
    there, back = float(every.amin(1).mean()), float(every.amin(0).mean())
    found = compare_clouds(predicted, true, threshold=1.0)
    assert found.accuracy == pytest.approx(there, rel=1e-14)
    assert found.completeness == pytest.approx(back, rel=1e-14)
    assert chamfer(predicted, true) == pytest.approx((there + back) / 2, rel=1e-14)


def test_without_open3d_scipy_finds_the_same_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.rand(400, 3).double(), torch.rand(300, 3).double()
    wanted = nearest_distances(a, b)
    monkeypatch.setitem(sys.modules, "open3d", None)
    assert torch.equal(nearest_distances(a, b), wanted)
    monkeypatch.setitem(sys.modules, "scipy.spatial", None)
    with pytest.raises(MissingDependency, match=r"needs Open3D or SciPy: pip install scipy\.$"):
        nearest_distances(a, b)


def test_f1_by_hand() -> None:
    predicted = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [9, 0, 0]])
    true = torch.tensor([[0.0, 0.5, 0], [2, 0.25, 0]])
    # There: 0.5, sqrt(1 + 1/16), 0.25, sqrt(49 + 1/16); back: 0.5, 0.25. A distance of the threshold is not within it.
    scores = compare_clouds(predicted, true, 0.5)
    assert (scores.precision, scores.recall) == (0.25, 0.5)
    assert scores.f1 == pytest.approx(1 / 3)
    assert scores.completeness == 0.375
    assert scores.accuracy == pytest.approx((0.75 + math.sqrt(17) / 4 + math.sqrt(785) / 4) / 4)
    assert compare_clouds(predicted, true + 100, 0.5).f1 == 0


def test_an_empty_prediction_finds_nothing() -> None:
    scores = compare_clouds(torch.zeros(0, 3), torch.rand(5, 3), 0.1)
    assert (scores.precision, scores.recall, scores.f1) == (0, 0, 0)
    assert all(math.isnan(length) for length in (scores.accuracy, scores.completeness, scores.chamfer))


def test_outliers_leave_the_means_but_not_the_shares() -> None:
    there, back = torch.tensor([1.0, 3.0, 20.0, math.inf]), torch.tensor([20.0, 50.0])
    scores = CloudScores.from_distances(there, back, threshold=2.0, cut=20.0)
    assert (scores.accuracy, scores.precision, scores.recall, scores.f1) == (2.0, 0.25, 0.0, 0.0)
    assert math.isnan(scores.completeness) and math.isnan(scores.chamfer)


def test_moving_both_clouds_scales_the_distance(random_similarity: Callable[[int], Similarity]) -> None:
    similarity = random_similarity(3)
    predicted, true = torch.rand(300, 3).double(), torch.rand(300, 3).double()
    moved = chamfer(similarity.apply(predicted), similarity.apply(true))
    assert moved == pytest.approx(float(similarity.scale) * chamfer(predicted, true), rel=1e-6)


def test_a_cloud_is_at_no_distance_from_itself() -> None:
    cloud = torch.rand(500, 3)
    assert chamfer(cloud, cloud) == 0
    assert compare_clouds(cloud, cloud, 1e-9).f1 == 1


@pytest.mark.parametrize(
    "broken, sentence",
    [
        (torch.zeros(0, 3), "empty or not"),
        (torch.zeros(4, 2), "empty or not"),
        (torch.full((4, 3), math.nan), "not finite"),
    ],
)
def test_a_broken_cloud_is_told(broken: Tensor, sentence: str) -> None:
    for measure in (nearest_distances, lambda a, b: nearest_distances(b, a), lambda a, b: compare_clouds(b, a, 0.1)):
        with pytest.raises(CalibrationError, match=sentence):
            measure(broken, torch.rand(5, 3))


def scene_of(c2w: Tensor, depth: Tensor | None) -> Scene:
    intrinsics = torch.tensor([[6.0, 0, 3.5], [0, 6, 2.5], [0, 0, 1]]).repeat(len(c2w), 1, 1)
    return Scene("made", torch.rand(len(c2w), 3, 6, 8), c2w, intrinsics, depth)


def test_the_pointmap_error_is_the_mean_distance_where_truth_is_known(make_poses: Make) -> None:
    depth = 1 + torch.rand(2, 6, 8)
    depth[0, 0] = 0
    scene = scene_of(make_poses(2), depth)
    known = scene.world_points()
    assert known is not None
    points = known[0] + torch.tensor([0.3, 0.0, 0.4])
    points[0, 0] += 100  # where nothing is known nothing counts
    to_scene = Similarity.identity()
    # An unsure model is measured like a sure one.
    for confidence in (0.0, 2.0):
        prediction = Prediction(scene.c2w, points, torch.full((2, 6, 8), confidence), 1.0)
        assert pixel_distance(prediction, scene, to_scene) == pytest.approx(0.5, rel=1e-5)


def test_the_pointmap_error_is_unknown_without_depth(make_poses: Make) -> None:
    for depth in (None, torch.zeros(2, 6, 8)):
        scene = scene_of(make_poses(2), depth)
        prediction = Prediction(scene.c2w, torch.zeros(2, 6, 8, 3), torch.ones(2, 6, 8), 1.0)
        assert math.isnan(pixel_distance(prediction, scene, Similarity.identity()))
