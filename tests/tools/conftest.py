"""What every test of this folder needs: images, everything a model predicts, settings that keep few blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hess_plugin.demo.model import TinyVGGT, TinyVGGTConfig

NAMES = ("pose_enc", "depth", "depth_conf", "world_points", "world_points_conf")


@pytest.fixture
def small_blocks() -> dict[str, Any]:
    """Settings of a patch that drops half of the blocks of a few small images."""
    return {"sparsity": 0.5, "block_q": 8, "block_k": 8}


@pytest.fixture
def images() -> Callable[..., Tensor]:
    """Makes random images ``[views, 3, height, width]``."""

    def make(views: int = 3, height: int = 60, width: int = 60, seed: int = 0) -> Tensor:
        return torch.rand(views, 3, height, width, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def outputs() -> Callable[[nn.Module, Tensor], Tensor]:
    """Runs a model without gradients: everything it predicts, as one vector."""

    def run(model: nn.Module, images: Tensor) -> Tensor:
        with torch.no_grad():
            predicted = model(images)
        return torch.cat([predicted[name].flatten() for name in NAMES])

    return run


@pytest.fixture
def make_model() -> Callable[..., TinyVGGT]:
    """Builds small models; the same seed gives the same weights."""

    def make(seed: int = 0, depth: int = 2) -> TinyVGGT:
        torch.manual_seed(seed)
        return TinyVGGT(TinyVGGTConfig(dim=32, num_heads=4, depth=depth, stem=16, camera_depth=1)).eval()

    return make
