"""Training data of the demo model: rooms rendered as they are needed, and what to say about them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hess_plugin.demo.rooms import FIELD_OF_VIEW, RenderedRoom, render_room
from hess_plugin.geometry import invert_rigid, unproject


@dataclass(frozen=True)
class Batch:
    """Images and targets in the first camera's frame, scaled so that the mean distance of the points is 1.

    Attributes:
        images: `[B, S, 3, H, W]` in 0 to 1.
        pose_enc: `[B, S, 9]` in the model's encoding.
        depth: `[B, S, h, w]` at stride 2.
        points: `[B, S, h, w, 3]` at stride 2.
    """

    images: Tensor
    pose_enc: Tensor
    depth: Tensor
    points: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))

    def first(self, views: int) -> Batch:
        """The first views only; the scale stays that of all views."""
        return Batch(*(getattr(self, field.name)[:, :views] for field in fields(self)))


def make_batch(rooms: list[RenderedRoom]) -> Batch:
    """Stack rooms of equal shape and compute their targets."""
    images = torch.from_numpy(np.stack([room.images for room in rooms])).permute(0, 1, 4, 2, 3).float() / 255
    depth = torch.from_numpy(np.stack([room.depth for room in rooms]))
    c2w = torch.from_numpy(np.stack([room.c2w for room in rooms]))
    intrinsics = torch.from_numpy(np.stack([room.intrinsics for room in rooms]))
    from_first = invert_rigid(c2w[:, :1]) @ c2w
    points = torch.stack([unproject(*room) for room in zip(depth, intrinsics, from_first, strict=True)])
    scale = points.norm(dim=-1).mean(dim=(1, 2, 3)).reshape(-1, 1, 1, 1)
    w2c = invert_rigid(from_first)
    pose_enc = torch.cat(
        [
            w2c[..., :3, 3] / scale[..., 0],
            _quaternions(w2c[..., :3, :3]),
            torch.full((*c2w.shape[:2], 2), float(FIELD_OF_VIEW)),
        ],
        dim=-1,
    )
    points = _halved((points / scale[..., None]).movedim(-1, 2)).movedim(2, -1)
    return Batch(images, pose_enc, _halved((depth / scale).unsqueeze(2)).squeeze(2), points)


def training_rooms(
    step: int, rank: int, world: int, scenes: int, views: int, max_sector: float, seed: int = 0
) -> list[RenderedRoom]:
    """Rooms of one training step: a pure function of its arguments, so a resumed run sees the same data."""
    rng = np.random.default_rng([step, rank, seed] if seed else [step, rank])
    # Far enough apart that runs of seeds 0 to 3 share no room; beyond, rooms come again, with other cameras' sectors.
    first = (step * world + rank) * scenes * 8 + seed % 4 * 2_500_000
    return [
        render_room((first + index) % 10_000_000, views, sector=float(rng.uniform(15.0, max_sector)))
        for index in range(scenes)
    ]


def _halved(maps: Tensor) -> Tensor:
    """Mean over 2 x 2 pixels of `[B, S, K, H, W]`: the value at the middle of a stride-2 output pixel."""
    return F.avg_pool2d(maps.flatten(0, 1), 2).unflatten(0, maps.shape[:2])


def _quaternions(rotations: Tensor) -> Tensor:
    """Unit quaternions xyzw of `[..., 3, 3]` for turns well below 180 degrees, as in one sector of a room."""
    w = (1 + rotations.diagonal(dim1=-2, dim2=-1).sum(-1)).clamp(min=1e-6).sqrt() / 2
    skew = rotations - rotations.mT
    xyz = torch.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], dim=-1) / (4 * w.unsqueeze(-1))
    return F.normalize(torch.cat([xyz, w.unsqueeze(-1)], dim=-1), dim=-1)
