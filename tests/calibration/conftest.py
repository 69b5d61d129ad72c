"""A synthetic room with exact geometry, predictions of it, and random similarities."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hess_plugin.geometry import Similarity, invert_rigid, unproject
from hess_plugin.predictions import Prediction
from hess_plugin.scenes import Scene

SIDES = torch.tensor([2.0, 1.5, 2.6], dtype=torch.float64)  # half the room, all different: no symmetry by a turn
BALLS = ((0.9, 0.9, 1.6, 0.6), (-1.1, 0.8, 2.0, 0.4), (0.2, -0.9, 1.9, 0.3))  # centre, radius


@pytest.fixture(scope="session")
def make_room() -> Callable[..., Scene]:
    """Build a scene inside a box room with three balls, depth exact to rounding."""

    def make(views: int = 4, height: int = 24, width: int = 32) -> Scene:
        c2w = _arc(views)
        intrinsics = torch.tensor(
            [[0.7 * width, 0.0, width / 2 - 0.5], [0.0, 0.7 * width, height / 2 - 0.5], [0.0, 0.0, 1.0]],
            dtype=torch.float64,
        ).repeat(views, 1, 1)
        images = torch.rand(views, 3, height, width, generator=torch.Generator().manual_seed(0))
        depth = _depth(c2w, intrinsics, height, width)
        return Scene("room", images, c2w, intrinsics, depth.float())

    return make


@pytest.fixture(scope="session")
def predict(random_similarity: Callable[[int], Similarity]) -> Callable[..., tuple[Prediction, Similarity]]:
    """A noisy prediction of a scene in a frame and unit of its own, and the similarity that undoes both."""

    def make(scene: Scene, seed: int = 0, noise: float = 0.0, stride: int = 1) -> tuple[Prediction, Similarity]:
        generator = torch.Generator().manual_seed(seed + 1)
        to_model = random_similarity(seed)
        depth = scene.depth if scene.depth is not None else torch.ones(scene.views, scene.height, scene.width)
        points = unproject(depth, scene.intrinsics, scene.c2w)[:, stride // 2 :: stride, stride // 2 :: stride]
        points = points + noise * torch.randn(points.shape, generator=generator)
        c2w = scene.c2w.clone()
        c2w[:, :3, 3] += noise * torch.randn(scene.views, 3, generator=generator)
        return (
            Prediction(
                to_model.apply_poses(c2w).float().requires_grad_(),
                to_model.apply(points).requires_grad_(),
                torch.full(points.shape[:3], 2.0),
                1.0,
            ),
            to_model.inverse(),
        )

    return make


def _arc(views: int) -> Tensor:
    """Poses on an arc, all looking at the middle of the far wall."""
    angle = torch.linspace(-0.7, 0.7, views, dtype=torch.float64)
    centre = torch.stack([1.2 * angle.sin(), 0.2 * (3 * angle).cos(), -1.2 * angle.cos()], dim=-1)
    forward = torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64) - centre
    forward = forward / forward.norm(dim=-1, keepdim=True)
    down = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).expand_as(forward)
    right = torch.linalg.cross(down, forward)
    right = right / right.norm(dim=-1, keepdim=True)
    c2w = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1)
    c2w[:, :3, :3] = torch.stack([right, torch.linalg.cross(forward, right), forward], dim=-1)
    c2w[:, :3, 3] = centre
    return c2w


def _depth(c2w: Tensor, intrinsics: Tensor, height: int, width: int) -> Tensor:
    """Distance along each pixel's ray, in units of its z, to the first wall or ball."""
    ones = torch.ones(len(c2w), height, width, dtype=torch.float64)
    origin = c2w[:, None, None, :3, 3]
    ray = unproject(ones, intrinsics, c2w) - origin
    nearest = ((torch.sign(ray) * SIDES - origin) / ray).amin(-1)
    for x, y, z, radius in BALLS:
        to_ball = origin - torch.tensor([x, y, z], dtype=torch.float64)
        a, b = (ray * ray).sum(-1), (ray * to_ball).sum(-1)
        inside = b * b - a * ((to_ball * to_ball).sum(-1) - radius**2)
        hit = (-b - inside.clamp(min=0).sqrt()) / a
        nearest = torch.where((inside > 0) & (hit > 0), torch.minimum(nearest, hit), nearest)
    assert bool((nearest > 0).all()) and invert_rigid(c2w).isfinite().all()
    return nearest
