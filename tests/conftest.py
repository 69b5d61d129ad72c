"""Shared fixtures: one thread (the tensors are tiny), a small random model, a small scene."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hess_plugin.demo.model import TinyVGGT, TinyVGGTConfig
from hess_plugin.demo.rooms import make_scene
from hess_plugin.geometry import Similarity, quaternion_to_matrix
from hess_plugin.scenes.scene import Scene


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Threads waiting for each other cost more than these tensors, and much more on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny_model() -> TinyVGGT:
    """A VGGT-like model with two pairs of layers and random weights, in eval mode."""
    torch.manual_seed(0)
    return TinyVGGT(TinyVGGTConfig(dim=32, num_heads=4, depth=2, stem=16, camera_depth=1)).eval()


@pytest.fixture(scope="session")
def room() -> Scene:
    """Four views of one synthetic room, 60 x 60 pixels."""
    return make_scene(11, views=4)


@pytest.fixture(scope="session")
def real_scenes() -> Path:
    """The folder of real scenes: HESS_TEST_SCENES, or shared/scenes beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "scenes"
    folder = Path(os.environ.get("HESS_TEST_SCENES") or beside)
    if not folder.is_dir():
        pytest.skip(f"no real scenes in {folder}: set HESS_TEST_SCENES to a folder of scene-v1 scenes")
    return folder


@pytest.fixture(scope="session")
def random_similarity() -> Callable[[int], Similarity]:
    """A similarity with any rotation for each seed."""

    def make(seed: int) -> Similarity:
        generator = torch.Generator().manual_seed(seed)
        quaternion = torch.randn(4, generator=generator, dtype=torch.float64)
        scale = 0.2 + 3 * torch.rand((), generator=generator, dtype=torch.float64)
        shift = torch.randn(3, generator=generator, dtype=torch.float64)
        return Similarity(scale, quaternion_to_matrix(quaternion), shift)

    return make
