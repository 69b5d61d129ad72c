"""Pose metrics: relative pose errors and their AUC as in VGGT's evaluation, and the trajectory error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hess_plugin.calibration.umeyama import umeyama
from hess_plugin.exceptions import CalibrationError
from hess_plugin.geometry import invert_rigid

THRESHOLDS = (30, 15, 5, 3)


@torch.no_grad()
def relative_pose_errors(c2w_pred: Tensor, c2w_true: Tensor) -> tuple[Tensor, Tensor]:
    """Angles between predicted and true relative poses of all pairs i < j.

    Free of the frame and the unit of either, so no alignment is needed. As in VGGT's evaluation the
    direction of a translation counts without its sign, so its error is at most 90 degrees; it is 90 where a
    camera does not move.

    Args:
        c2w_pred: camera-to-world `[S, 4, 4]`.
        c2w_true: camera-to-world `[S, 4, 4]`.

    Returns:
        Rotation and translation-direction errors in degrees, float64 `[S * (S - 1) / 2]`, on the CPU.

    Raises:
        CalibrationError: fewer than two views, or shapes that differ.
    """
    _check(c2w_pred, c2w_true)
    i, j = torch.triu_indices(len(c2w_pred), len(c2w_pred), offset=1)
    relative = []
    for c2w in (c2w_pred, c2w_true):
        pose = c2w.detach().to("cpu", torch.float64)
        relative.append(invert_rigid(pose)[i] @ pose[j])  # camera j seen from camera i
    predicted, true = relative
    turn = predicted[:, :3, :3].transpose(1, 2) @ true[:, :3, :3]
    return _rotation_angle(turn), _line_angle(predicted[:, :3, 3], true[:, :3, 3])


def auc(errors_deg: Tensor, threshold: int) -> float:
    """Area under the accuracy curve up to `threshold` degrees, as VGGT defines it.

    The mean over whole degrees 1 ... threshold of the share of errors below that degree (the last includes
    its edge, as in `numpy.histogram`). Errors that are not finite count as misses.

    Args:
        errors_deg: one error a pair, degrees `[P]`: the larger of rotation and translation error.
        threshold: whole degrees, at least 1.

    Raises:
        CalibrationError: when there is no error or no degree to look at.
    """
    if errors_deg.numel() == 0 or threshold < 1:
        raise CalibrationError(
            f"AUC@{threshold} of {errors_deg.numel()} errors is not defined; give at least one pair of "
            "views and a threshold of at least 1 degree."
        )
    errors = errors_deg.detach().to("cpu", torch.float64).flatten()
    degrees = torch.arange(1, threshold + 1, dtype=torch.float64)
    hits = errors[None] < degrees[:, None]
    hits[-1] |= errors == threshold
    return float(hits.double().mean())


def pose_auc(c2w_pred: Tensor, c2w_true: Tensor, thresholds: Sequence[int] = THRESHOLDS) -> dict[int, float]:
    """AUC at each threshold of the larger of rotation and translation error, over all pairs of one scene."""
    errors = torch.maximum(*relative_pose_errors(c2w_pred, c2w_true))
    return {threshold: auc(errors, threshold) for threshold in thresholds}


@torch.no_grad()
def absolute_trajectory_error(c2w_pred: Tensor, c2w_true: Tensor) -> float:
    """Root mean square distance of camera centres after the best similarity (Umeyama), in `c2w_true`'s unit.

    Defined for centres on a line or in one place as well: the least distance is one even if the alignment is not.
    Two views always fit: their error is 0.

    Raises:
        CalibrationError: when shapes differ or there is only one view.
    """
    _check(c2w_pred, c2w_true)
    predicted, true = (c2w[:, :3, 3].detach().to("cpu", torch.float64) for c2w in (c2w_pred, c2w_true))
    difference = umeyama(predicted, true, unique=False).apply(predicted) - true
    return float(difference.square().sum(-1).mean().sqrt())


def _rotation_angle(rotation: Tensor) -> Tensor:
    """Angle of `[P, 3, 3]` in degrees, from sine and cosine: an arc cosine loses small angles to rounding."""
    axis = torch.stack(
        [
            rotation[:, 2, 1] - rotation[:, 1, 2],
            rotation[:, 0, 2] - rotation[:, 2, 0],
            rotation[:, 1, 0] - rotation[:, 0, 1],
        ],
        dim=-1,
    )
    trace = rotation.diagonal(dim1=1, dim2=2).sum(-1)
    return torch.atan2(axis.norm(dim=-1), trace - 1) * (180 / math.pi)


def _line_angle(a: Tensor, b: Tensor) -> Tensor:
    """Angle between lines along `a` and `b` `[P, 3]` in degrees, 0 ... 90; 90 where either has no length."""
    sine, cosine = torch.linalg.cross(a, b).norm(dim=-1), (a * b).sum(-1).abs()
    still = (a.norm(dim=-1) == 0) | (b.norm(dim=-1) == 0)
    return torch.where(still, 90.0, torch.atan2(sine, cosine) * (180 / math.pi))


def _check(c2w_pred: Tensor, c2w_true: Tensor) -> None:
    shape = tuple(c2w_true.shape)
    if tuple(c2w_pred.shape) != shape or len(shape) != 3 or shape[1:] != (4, 4) or shape[0] < 2:
        raise CalibrationError(
            f"Poses of shapes {list(c2w_pred.shape)} and {list(shape)} cannot be compared; give two "
            "[S, 4, 4] with S >= 2."
        )
