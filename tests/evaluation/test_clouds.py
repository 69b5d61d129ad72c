from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from hess_plugin.calibration.neighbours import CloudIndex
from hess_plugin.evaluation.clouds import accuracy, chamfer, completeness, pointmap_error
from hess_plugin.exceptions import CalibrationError
from hess_plugin.geometry import Similarity
from hess_plugin.predictions import Prediction
from hess_plugin.scenes import Scene

Make = Callable[..., Tensor]


def kd_distance(source: Tensor, target: Tensor) -> float:
    return float(cKDTree(target.double().numpy()).query(source.double().numpy())[0].mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_agree_with_a_kd_tree(dtype: torch.dtype) -> None:
    predicted, true = torch.rand(700, 3).to(dtype), (torch.rand(900, 3) * 1.2).to(dtype)
    there, back = kd_distance(predicted, true), kd_distance(true, predicted)
    assert accuracy(predicted, true) == pytest.approx(there, rel=1e-5)
    assert completeness(predicted, true) == pytest.approx(back, rel=1e-5)
    assert chamfer(predicted, true) == pytest.approx((there + back) / 2, rel=1e-5)
    assert accuracy(predicted, CloudIndex(true)) == accuracy(predicted, true)


def test_moving_both_clouds_scales_the_distance(random_similarity: Callable[[int], Similarity]) -> None:
    similarity = random_similarity(3)
    predicted, true = torch.rand(300, 3).double(), torch.rand(300, 3).double()
    moved = chamfer(similarity.apply(predicted), similarity.apply(true))
    assert moved == pytest.approx(float(similarity.scale) * chamfer(predicted, true), rel=1e-6)


def test_a_cloud_is_at_no_distance_from_itself() -> None:
    cloud = torch.rand(500, 3)
    assert chamfer(cloud, cloud) == 0


@pytest.mark.parametrize("broken", [torch.zeros(0, 3), torch.zeros(4, 2)])
def test_an_empty_cloud_is_told(broken: Tensor) -> None:
    with pytest.raises(CalibrationError):
        accuracy(broken, torch.rand(5, 3))
    with pytest.raises(CalibrationError):
        completeness(broken, torch.rand(5, 3))


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
        assert pointmap_error(prediction, scene, to_scene) == pytest.approx(0.5, rel=1e-5)


def test_the_pointmap_error_needs_depth(make_poses: Make) -> None:
    scene = scene_of(make_poses(2), None)
    prediction = Prediction(scene.c2w, torch.zeros(2, 6, 8, 3), torch.ones(2, 6, 8), 1.0)
    with pytest.raises(CalibrationError, match="Scene made has no depth"):
        pointmap_error(prediction, scene, Similarity.identity())
