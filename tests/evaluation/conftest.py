"""Random poses, and poses seen in another frame and unit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hess_plugin.geometry import quaternion_to_matrix


@pytest.fixture(scope="session")
def make_poses() -> Callable[..., Tensor]:
    """Camera-to-world poses `[views, 4, 4]` float64 with any rotation."""

    def make(views: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        c2w = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1)
        c2w[:, :3, :3] = quaternion_to_matrix(torch.randn(views, 4, generator=generator, dtype=torch.float64))
        c2w[:, :3, 3] = torch.randn(views, 3, generator=generator, dtype=torch.float64)
        return c2w

    return make


@pytest.fixture(scope="session")
def perturb() -> Callable[..., Tensor]:
    """Poses turned by about `degrees` and moved by about `shift`."""

    def make(c2w: Tensor, degrees: float, shift: float, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        half = 0.5 * degrees * torch.pi / 180
        quaternion = half * torch.randn(len(c2w), 4, generator=generator, dtype=torch.float64)
        quaternion[:, 3] = 1
        moved = c2w.clone()
        moved[:, :3, :3] = c2w[:, :3, :3] @ quaternion_to_matrix(quaternion)
        moved[:, :3, 3] += shift * torch.randn(len(c2w), 3, generator=generator, dtype=torch.float64)
        return moved

    return make
