"""Gradients through a patched model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hess_plugin import patch
from hess_plugin.demo.model import TinyVGGT

from .patching_problems import BLOCKS, images_of


def checkpoint_globals(model: TinyVGGT) -> None:
    """What upstream's training mode does, on the global blocks."""
    for block in model.aggregator.global_blocks:
        forward = type(block).forward
        block.forward = lambda x, pos=None, f=forward, b=block: checkpoint(f, b, x, pos, use_reentrant=False)


def gradients(model: TinyVGGT, *inputs: Tensor) -> list[Tensor]:
    """Gradients of all inputs' losses together, every forward before the one backward."""
    model.zero_grad()
    loss = torch.stack([model(images)["world_points"].square().mean() for images in inputs]).sum()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(
    "options", [{"sparsity": 0.5}, {"cdf_threshold": 0.5}, {"cdf_threshold": 0.5, "allocation": "equal"}]
)
def test_gradient_checkpointing_gives_the_same_gradients_and_sparsity(
    tiny_model: TinyVGGT, options: dict[str, Any]
) -> None:
    inputs = (images_of(2), images_of(3, 40, 70, seed=1))  # two shapes, recomputed after both forwards
    with patch(tiny_model, **options, **BLOCKS) as handle:
        plain = gradients(tiny_model, *inputs)
    first = handle.report()
    checkpoint_globals(tiny_model)
    with patch(tiny_model, **options, **BLOCKS) as handle:
        again = gradients(tiny_model, *inputs)
    second = handle.report()
    assert len(plain) == len(again) > 20
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert [site.calls for site in first.sites] == [2, 2] and [site.calls for site in second.sites] == [4, 4]
    for one, two in zip(first.sites, second.sites, strict=True):
        assert one.head_sparsity == pytest.approx(two.head_sparsity)
        assert one.sparsity_all_keys == pytest.approx(two.sparsity_all_keys)


def test_gradients_agree_with_the_reference_backend(tiny_model: TinyVGGT) -> None:
    found = []
    for backend in ("gather", "reference"):
        with patch(tiny_model, sparsity=0.5, backend=backend, **BLOCKS):
            found.append(gradients(tiny_model, images_of(2)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"cdf_threshold": 0.5, "allocation": "equal"}])
def test_training_works_after_inference_mode_with_the_same_patch(tiny_model: TinyVGGT, options: dict[str, Any]) -> None:
    images = images_of(2)
    with torch.inference_mode():
        handle = patch(tiny_model, **options, **BLOCKS)
        tiny_model(images)
    with handle:
        found = gradients(tiny_model, images)
        with torch.inference_mode():
            tiny_model(images)
        assert handle.report().sites[0].calls == 3
    with patch(tiny_model, **options, **BLOCKS):
        wanted = gradients(tiny_model, images)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
