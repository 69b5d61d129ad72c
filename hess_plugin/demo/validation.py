"""The fixed validation set of the demo model, and what is measured on it.

`python -m hess_plugin.demo.validation` prints it for the shipped weights.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hess_plugin.demo.data import Batch, make_batch
from hess_plugin.demo.rooms import render_room, seeds
from hess_plugin.evaluation.pose import auc, relative_pose_errors
from hess_plugin.geometry import invert_rigid, quaternion_to_matrix

VALIDATION_SCENES = 64
VALIDATION_VIEWS = 8
_CHUNK = 16


@dataclass(frozen=True)
class ValidationRow:
    """Means over scenes, except the two medians over view pairs.

    Attributes:
        auc30: area under the accuracy curve of the larger of the two angle errors, up to 30 degrees; mean over scenes.
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
        auc30=statistics.fmean(auc(errors, 30) for errors in torch.maximum(rotation, translation)),
        rotation=float(rotation.median()),
        translation=float(translation.median()),
        points=float(torch.cat(points).mean()),
        depth=float(torch.cat(depth).mean()),
    )


def pose_errors(predicted: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Errors in degrees `[B, Q]` of the relative rotations, and translation directions, of encodings `[B, S, 9]`."""
    scenes = zip(camera_to_world(predicted), camera_to_world(true), strict=True)
    rotation, translation = zip(*(relative_pose_errors(*poses) for poses in scenes), strict=True)
    return torch.stack(rotation), torch.stack(translation)


def camera_to_world(pose_enc: Tensor) -> Tensor:
    """Poses `[B, S, 4, 4]` of VGGT's encodings `[B, S, 9]`, which are camera from world."""
    rotation = quaternion_to_matrix(pose_enc[..., 3:7].double())
    top = torch.cat([rotation, pose_enc[..., :3, None].double()], dim=-1)
    bottom = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=top.dtype, device=top.device)
    return invert_rigid(torch.cat([top, bottom.expand(*top.shape[:-2], 1, 4)], dim=-2))


def main() -> None:
    """Print how the shipped model does on 4 and on 8 views of every validation room."""
    from hess_plugin.demo.model import load_demo_model

    model, batch = load_demo_model(), validation_set()
    for views in (4, 8):
        print(f"v{views} {validate(model, batch.first(views))}")


if __name__ == "__main__":
    main()
