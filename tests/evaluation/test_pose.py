from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from torch import Tensor

from hess_plugin.evaluation.pose import absolute_trajectory_error, auc, pose_auc, relative_pose_errors
from hess_plugin.exceptions import CalibrationError
from hess_plugin.geometry import Similarity

Make = Callable[..., Tensor]
RandomSimilarity = Callable[[int], Similarity]


def reference_errors(predicted: np.ndarray, true: np.ndarray) -> tuple[list[float], list[float]]:
    """Another way to the same angles: world-to-camera poses, SciPy rotations, arc cosine, loops."""
    rotation, translation = [], []
    for i in range(len(true)):
        for j in range(i + 1, len(true)):
            p, t = (np.linalg.inv(c2w[i]) @ c2w[j] for c2w in (predicted, true))
            turn = Rotation.from_matrix(p[:3, :3]).inv() * Rotation.from_matrix(t[:3, :3])
            rotation.append(np.degrees(turn.magnitude()))
            cosine = abs(p[:3, 3] @ t[:3, 3]) / np.linalg.norm(p[:3, 3]) / np.linalg.norm(t[:3, 3])
            translation.append(np.degrees(np.arccos(min(1.0, cosine))))
    return rotation, translation


def reference_auc(errors: np.ndarray, threshold: int) -> float:
    """The area as VGGT's evaluation describes it: cumulated one-degree histogram, averaged."""
    histogram, _ = np.histogram(errors, bins=np.arange(threshold + 1))
    return float(np.mean(np.cumsum(histogram / len(errors))))


@pytest.mark.parametrize("degrees", [0.01, 5, 60])
def test_angles_agree_with_an_independent_computation(make_poses: Make, perturb: Make, degrees: float) -> None:
    true = make_poses(7)
    predicted = perturb(true, degrees, 0.01 * degrees)
    rotation, translation = relative_pose_errors(predicted, true)
    wanted = reference_errors(predicted.numpy(), true.numpy())
    np.testing.assert_allclose(rotation.numpy(), wanted[0], atol=1e-5)
    np.testing.assert_allclose(translation.numpy(), wanted[1], atol=1e-5)
    assert rotation.shape == (21,) and rotation.dtype == torch.float64


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_relative_errors_ignore_frame_and_unit(
    make_poses: Make, perturb: Make, random_similarity: RandomSimilarity, seed: int
) -> None:
    true = make_poses(4, seed)
    predicted = perturb(true, 10, 0.1, seed)
    before = relative_pose_errors(predicted, true)
    after = relative_pose_errors(random_similarity(seed).apply_poses(predicted), true)
    torch.testing.assert_close(torch.stack(before), torch.stack(after), atol=1e-6, rtol=0)


def test_perfect_poses_have_no_error_and_full_area(make_poses: Make) -> None:
    true = make_poses(5)
    rotation, translation = relative_pose_errors(true.float(), true)
    assert float(rotation.max()) < 1e-3 and float(translation.max()) < 1e-3
    assert pose_auc(true, true) == {30: 1.0, 15: 1.0, 5: 1.0, 3: 1.0}


def test_a_translation_counts_without_its_sign(make_poses: Make) -> None:
    true = make_poses(2)
    backwards = true.clone()
    backwards[1, :3, 3] = 2 * true[0, :3, 3] - true[1, :3, 3]
    assert float(relative_pose_errors(backwards, true)[1]) == pytest.approx(0, abs=1e-5)


def test_a_camera_that_does_not_move_is_ninety_degrees_off(make_poses: Make) -> None:
    true = make_poses(2)
    still = true.clone()
    still[1, :3, 3] = still[0, :3, 3]
    assert float(relative_pose_errors(still, true)[1]) == 90
    assert float(relative_pose_errors(true, still)[1]) == 90


def test_a_half_turn_is_a_hundred_and_eighty_degrees(make_poses: Make) -> None:
    true = make_poses(2)
    turned = true.clone()
    turned[1, :3, :3] = true[1, :3, :3] @ torch.diag(torch.tensor([1.0, -1, -1])).double()
    assert float(relative_pose_errors(turned, true)[0]) == pytest.approx(180)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    errors=st.lists(st.one_of(st.floats(0, 40), st.integers(0, 31).map(float)), min_size=1, max_size=30),
    threshold=st.sampled_from([1, 3, 5, 15, 30]),
)
def test_auc_agrees_with_the_histogram(errors: list[float], threshold: int) -> None:
    ours = auc(torch.tensor(errors, dtype=torch.float64), threshold)
    assert ours == pytest.approx(reference_auc(np.array(errors), threshold), abs=1e-12)


def test_errors_that_are_not_finite_are_misses() -> None:
    errors = torch.tensor([0.5, float("nan"), float("inf"), 0.5])
    assert auc(errors, 30) == 0.5


def test_pose_auc_takes_the_larger_angle_of_each_pair(make_poses: Make, perturb: Make) -> None:
    true = make_poses(6)
    predicted = perturb(true, 8, 0.2)
    worse = np.maximum(*reference_errors(predicted.numpy(), true.numpy()))
    for threshold, value in pose_auc(predicted, true).items():
        assert value == pytest.approx(reference_auc(worse, threshold))


@pytest.mark.parametrize("views", [3, 20])
def test_the_trajectory_error_agrees_with_evo(
    make_poses: Make, perturb: Make, random_similarity: RandomSimilarity, views: int
) -> None:
    metrics = pytest.importorskip("evo.core.metrics")
    trajectory = pytest.importorskip("evo.core.trajectory")
    true = make_poses(views)
    predicted = random_similarity(1).apply_poses(perturb(true, 5, 0.2))
    reference = trajectory.PosePath3D(poses_se3=list(true.numpy()))
    estimate = trajectory.PosePath3D(poses_se3=list(predicted.numpy()))
    estimate.align(reference, correct_scale=True)
    metric = metrics.APE(metrics.PoseRelation.translation_part)
    metric.process_data((reference, estimate))
    wanted = metric.get_statistic(metrics.StatisticsType.rmse)
    assert absolute_trajectory_error(predicted, true) == pytest.approx(wanted, rel=1e-6)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_the_trajectory_error_ignores_frame_and_unit_of_the_prediction(
    make_poses: Make, perturb: Make, random_similarity: RandomSimilarity, seed: int
) -> None:
    true = make_poses(6, seed)
    predicted = perturb(true, 5, 0.1, seed)
    moved = random_similarity(seed).apply_poses(predicted)
    assert absolute_trajectory_error(moved, true) == pytest.approx(absolute_trajectory_error(predicted, true), rel=1e-6)


def test_one_view_is_told(make_poses: Make) -> None:
    with pytest.raises(CalibrationError, match="S >= 2"):
        relative_pose_errors(make_poses(1), make_poses(1))
    with pytest.raises(CalibrationError, match="cannot be compared"):
        absolute_trajectory_error(make_poses(3), make_poses(4))
    with pytest.raises(CalibrationError, match="AUC@30 of 0 errors"):
        auc(torch.empty(0), 30)


def test_cameras_on_a_line_or_in_one_place_have_a_trajectory_error(make_poses: Make) -> None:
    true = make_poses(4)
    true[:, :3, 3] = torch.arange(4.0)[:, None] * torch.ones(3)
    turned = make_poses(4)
    turned[:, :3, 3] = torch.arange(4.0)[:, None] * torch.tensor([0.0, -2.0, 0.5]) + 7
    assert absolute_trajectory_error(turned, true) == pytest.approx(0, abs=1e-6)
    turned[:, :3, 3] = 7.0
    spread = (true[:, :3, 3] - true[:, :3, 3].mean(0)).square().sum(-1).mean().sqrt()
    assert absolute_trajectory_error(turned, true) == pytest.approx(float(spread), rel=1e-6)


def test_the_trajectory_error_of_a_line_is_that_of_a_nearby_curve(make_poses: Make, perturb: Make) -> None:
    true, line = make_poses(5), make_poses(5)
    line[:, :3, 3] = torch.arange(5.0)[:, None] * torch.tensor([1.0, 2.0, 3.0])
    for predicted, target in ((line, true), (true, line)):
        nearby = absolute_trajectory_error(perturb(predicted, 0, 1e-5), perturb(target, 0, 1e-5, 1))
        assert absolute_trajectory_error(predicted, target) == pytest.approx(nearby, rel=1e-3)
