"""Traces of attention outputs: what they are by definition, and nothing where no patch token has a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hess_plugin import Scene, patch
from hess_plugin.calibration.calibrator import calibrate
from hess_plugin.calibration.fisher import only_sites_require_grad
from hess_plugin.calibration.harm import HarmSettings
from hess_plugin.calibration.harm_meter import harm_meter
from hess_plugin.calibration.measuring import Protocol, measuring
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.interception import SDPA
from hess_plugin.plugins import resolve_adapter

ANY_DISTANCE = 1e6  # random weights predict points far from the truth
SMALL = HarmSettings(block_q=8, block_k=8, shares=(0.3,))


@pytest.fixture
def model(tiny_model: TinyVGGT) -> TinyVGGT:
    """The shared model with a camera head that does not answer the same pose for every view."""
    torch.manual_seed(1)
    nn.init.normal_(tiny_model.camera_head.pose_branch.weight, std=0.1)
    return tiny_model


def gradients_by_outputs(model: TinyVGGT, room: Scene) -> dict[str, tuple[Tensor, ...]]:
    """Gradient of both errors by what every site's attention returned, ``[B, H, N, d]``."""
    adapter = resolve_adapter(model)
    outputs: list[Tensor] = []

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        outputs.append(SDPA(*args, **kwargs))
        return outputs[-1]

    replaced = [adapter.replace_attention(site, attend) for site in adapter.sites(model)]
    try:
        errors = adapter.compute_errors(model, room.normalised(), ANY_DISTANCE)
    finally:
        for each in replaced:
            each.remove()
    kinds = {"camera": errors.camera, "points": errors.points}
    return {kind: torch.autograd.grad(error, outputs, retain_graph=True) for kind, error in kinds.items()}


@pytest.mark.parametrize("memory", ["plain", "lean"])
def test_they_are_squared_gradients_of_patch_tokens(model: TinyVGGT, room: Scene, memory: str) -> None:
    adapter = resolve_adapter(model)
    protocol = Protocol(eps=ANY_DISTANCE, memory=memory, harm=SMALL)
    with measuring(adapter, model, adapter.sites(model), protocol) as measurer:
        found = measurer.measure(room).traces
    patches = torch.arange(4 * 41).unflatten(0, (4, 41))[:, 5:].flatten()
    for kind, gradients in gradients_by_outputs(model, room).items():
        wanted = torch.stack([g[0, :, patches].double().square().sum((1, 2)) for g in gradients])
        torch.testing.assert_close(found[f"{kind}.output"], wanted, rtol=1e-4, atol=0.0)
        assert bool((wanted > 0).all())


def test_an_error_through_special_tokens_alone_leaves_exactly_nothing(model: TinyVGGT, room: Scene) -> None:
    """As the camera error of VGGT at its last layer: rounding must not make shares of it."""
    adapter = resolve_adapter(model)
    sites = adapter.sites(model)
    with only_sites_require_grad(model, sites) as weights, harm_meter(adapter, model, sites, SMALL) as meter:
        assert meter is not None
        error = model.aggregator(room.images[None])[0][-1][:, :, :5].square().sum()
        with meter.collecting("camera"):
            torch.autograd.grad(error, weights)
        first, last = meter.output_traces("camera")
    assert bool((last == 0).all()) and bool((first > 0).all())


def test_a_score_by_them_divides_budgets(model: TinyVGGT, room: Scene) -> None:
    profile = calibrate(model, [room], harm=SMALL, eps=ANY_DISTANCE)
    assert profile.has_outputs and profile.has_patch_rows
    kept = []
    for projection in ("q", "output"):
        with patch(model, profile=profile, sparsity=0.7, block_q=8, block_k=8, projection=projection) as handle:
            model(room.images)
        kept.append([site.head_sparsity for site in handle.report().sites])
    assert kept[0] != kept[1]
    assert not calibrate(model, [room], eps=ANY_DISTANCE).has_outputs
