"""Losses of the demo model: VGGT's camera and map losses, relative poses, and correspondence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hess_plugin.demo.data import Batch
from hess_plugin.geometry import quaternion_to_matrix

_REFINEMENT_DECAY = 0.6
_CONFIDENCE_WEIGHT = 0.2
_TEMPERATURE = 0.1
_SAME_POINT = 0.08


def relative_poses(pose_enc: Tensor) -> tuple[Tensor, Tensor]:
    """Rotations `[B, Q, 3, 3]` and translations `[B, Q, 3]` from view i to j, all i < j of `[B, S, 9]`."""
    i, j = torch.triu_indices(pose_enc.shape[1], pose_enc.shape[1], 1, device=pose_enc.device)
    rotation, translation = quaternion_to_matrix(pose_enc[..., 3:7]), pose_enc[..., :3]
    relative = rotation[:, j] @ rotation[:, i].mT
    return relative, translation[:, j] - (relative @ translation[:, i].unsqueeze(-1)).squeeze(-1)


def camera_loss(poses: list[Tensor], target: Tensor) -> Tensor:
    """L1 on the encoding, and chords of the relative errors (what pose AUC counts); the last pose most."""
    total = target.new_zeros(())
    true_rotation, true_translation = relative_poses(target)
    for index, pose in enumerate(poses):
        error = (pose - target).abs()
        absolute = error[..., :3].mean() + error[..., 3:7].mean() + 0.5 * error[..., 7:].mean()
        rotation, translation = relative_poses(pose)
        turn = ((rotation - true_rotation).square().sum((-2, -1)) + 1e-6).sqrt() / 2**0.5
        chord = F.normalize(translation, dim=-1, eps=1e-3) - F.normalize(true_translation, dim=-1, eps=1e-3)
        direction = (chord.square().sum(-1) + 1e-6).sqrt()
        relative = turn.mean() + direction.mean()
        total = total + _REFINEMENT_DECAY ** (len(poses) - 1 - index) * (absolute + 0.3 * relative)
    return total


def map_loss(error: Tensor, confidence: Tensor) -> Tensor:
    """Errors weighted by the predicted confidence, which pays for itself through its logarithm."""
    return (error * confidence - _CONFIDENCE_WEIGHT * confidence.log()).mean()


def correspondence_loss(features: Tensor, points: Tensor) -> Tensor:
    """InfoNCE between patches of different views that show the same place, with soft targets by 3D distance.

    Args:
        features: `[B, S, h * w, K]`, one row per patch.
        points: true world points `[B, S, m * h, m * w, 3]`.
    """
    batch, views, patches, _ = features.shape
    side = int(patches**0.5)
    middle = points.shape[2] // side // 2
    step = points.shape[2] // side
    centres = points[:, :, middle::step, middle::step].reshape(batch, views * patches, 3)
    view = torch.arange(views, device=points.device).repeat_interleave(patches)
    same_view = view[:, None] == view[None]
    likeness = torch.exp(-torch.cdist(centres, centres).square() / (2 * _SAME_POINT**2)).masked_fill(same_view, 0)
    matched = (likeness.amax(-1) > 0.5).float()
    target = likeness / likeness.sum(-1, keepdim=True).clamp(min=1e-6)
    unit = F.normalize(features.reshape(batch, views * patches, -1), dim=-1)
    scores = (unit @ unit.mT / _TEMPERATURE).masked_fill(same_view, -1e4).log_softmax(-1)
    return (-(target * scores).sum(-1) * matched).sum() / matched.sum().clamp(min=1)


def training_losses(predictions: dict[str, Any], batch: Batch, matcher: nn.Module) -> dict[str, Tensor]:
    """The four losses, unweighted: `camera`, `points`, `depth`, `match`; and `points_error` for the log."""
    points_error = (predictions["world_points"] - batch.points).norm(dim=-1)
    depth_error = (predictions["depth"].squeeze(-1) - batch.depth).abs()
    # The frame half of the second pair: what the second global block will match by.
    tokens = predictions["patch_tokens"][1].float()
    features = matcher(tokens[..., : tokens.shape[-1] // 2])
    return {
        "camera": camera_loss([pose.float() for pose in predictions["pose_enc_list"]], batch.pose_enc),
        "points": map_loss(points_error, predictions["world_points_conf"]),
        "depth": map_loss(depth_error, predictions["depth_conf"]),
        "match": correspondence_loss(features, batch.points),
        "points_error": points_error.detach().mean(),
    }
