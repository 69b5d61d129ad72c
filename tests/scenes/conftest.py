"""A small synthetic scene, and the real ones where they are present."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hess_plugin.geometry import quaternion_to_matrix
from hess_plugin.scenes import Scene

MakeScene = Callable[..., Scene]


def random_poses(views: int, seed: int) -> torch.Tensor:
    """`[views, 4, 4]` float64 poses with any rotation."""
    generator = torch.Generator().manual_seed(seed)
    c2w = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1)
    c2w[:, :3, :3] = quaternion_to_matrix(torch.randn(views, 4, generator=generator, dtype=torch.float64))
    c2w[:, :3, 3] = torch.randn(views, 3, generator=generator, dtype=torch.float64)
    return c2w


@pytest.fixture
def make_scene() -> MakeScene:
    """Build a scene of random images, poses and depth; a tenth of the depth is not known."""

    def make(
        views: int = 3,
        height: int = 12,
        width: int = 16,
        depth: bool = True,
        points: bool = False,
        seed: int = 0,
    ) -> Scene:
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(views, 3, height, width, generator=generator)
        known = torch.rand(views, height, width, generator=generator)
        distance = torch.where(known < 0.1, 0.0, 1 + 2 * known)
        focal = 0.9 * width
        intrinsics = torch.tensor(
            [[focal, 0.0, width / 2 - 0.5], [0.0, 1.1 * focal, height / 2 - 0.7], [0.0, 0.0, 1.0]],
            dtype=torch.float64,
        ).repeat(views, 1, 1)
        cloud = 2 * torch.randn(50, 3, generator=generator) if points else None
        return Scene(f"made-{seed}", images, random_poses(views, seed), intrinsics, distance if depth else None, cloud)

    return make
