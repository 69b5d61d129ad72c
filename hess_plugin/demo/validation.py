"""The fixed validation set of the demo model, and what is measured on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hess_plugin.demo.data import Batch, make_batch
from hess_plugin.demo.losses import relative_poses
from hess_plugin.demo.rooms import render_room, seeds

VALIDATION_SCENES = 64
VALIDATION_VIEWS = 8
_CHUNK = 16


@dataclass(frozen=True)
class ValidationRow:
    """Means over scenes, except the two medians over view pairs.

    Attributes:
        auc30: area under the accuracy curve of the larger of the two angle errors, up to 30 degrees.
        rotation: median relative rotation error, degrees.
        translation: median error of the relative translation direction, degrees.
        points: mean distance of world points, in units of the mean distance to the first camera.
        depth: mean depth error, same units.
    """

    auc30: float
    rotation: float
    translation: float
    points: float
    depth: float

    def __str__(self) -> str:
        return (
            f"auc30 {self.auc30:.3f} rot {self.rotation:.2f} trans {self.translation:.2f} "
            f"points {self.points:.4f} depth {self.depth:.4f}"
        )


def validation_set(scenes: int = VALIDATION_SCENES, views: int = VALIDATION_VIEWS) -> Batch:
    """The first scenes of the validation split, cameras on sectors below 80 degrees."""
    return make_batch([render_room(seed, views) for seed in seeds("validation", scenes)])


@torch.no_grad()
def validate(model: nn.Module, batch: Batch) -> ValidationRow:
    """Measure the model (left in eval mode) on a batch, a few scenes at a time."""
    model.eval()
    angles, points, depth = [], [], []
    for start in range(0, len(batch.images), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        out = model(batch.images[chunk])
        angles.append(torch.stack(pose_errors(out["pose_enc"], batch.pose_enc[chunk])))
        points.append((out["world_points"] - batch.points[chunk]).norm(dim=-1).mean(dim=(1, 2, 3)))
        depth.append((out["depth"].squeeze(-1) - batch.depth[chunk]).abs().mean(dim=(1, 2, 3)))
    rotation, translation = torch.cat(angles, dim=1)
    return ValidationRow(
        auc30=float(auc(torch.maximum(rotation, translation)).mean()),
        rotation=float(rotation.median()),
        translation=float(translation.median()),
        points=float(torch.cat(points).mean()),
        depth=float(torch.cat(depth).mean()),
    )


def pose_errors(predicted: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Angles in degrees `[B, Q]` between the relative rotations, and translations, of `[B, S, 9]`."""
    (rotation_a, translation_a), (rotation_b, translation_b) = relative_poses(predicted), relative_poses(true)
    cosine = ((rotation_a * rotation_b).sum((-2, -1)) - 1) / 2
    direction = torch.cosine_similarity(translation_a, translation_b, dim=-1)
    return _degrees(cosine), _degrees(direction)


def auc(errors: Tensor, threshold: int = 30) -> Tensor:
    """VGGT's AUC over the last axis: mean, over 1 to `threshold` degrees, of the share of errors below."""
    degrees = torch.arange(1, threshold + 1, device=errors.device, dtype=errors.dtype)
    return (errors.unsqueeze(-1) < degrees).to(errors.dtype).mean(dim=(-2, -1))


def _degrees(cosine: Tensor) -> Tensor:
    return torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))
