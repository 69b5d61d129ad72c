"""Every adapter keeps the contract: on upstream code where there is some, on the demo model always."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hess_plugin.demo.model import load_demo_model
from hess_plugin.demo.rooms import make_scene
from hess_plugin.plugins import resolve_adapter
from hess_plugin.scenes.scene import Scene
from hess_plugin.testing import check_adapter, require


def test_demo_model_keeps_the_contract() -> None:
    model = load_demo_model()
    assert resolve_adapter(model).name == "vggt"
    checks = check_adapter(model, make_scene(7, views=4), block=8)
    print("\n".join(str(check) for check in checks))
    require(checks)


def test_upstream_model_keeps_the_contract(upstream_model: nn.Module, small_scene: Scene) -> None:
    # Random weights predict points anywhere; a wide inlier radius is not part of the contract, so none is set here.
    checks = check_adapter(upstream_model, small_scene)
    print("\n".join(str(check) for check in checks))
    require(checks)


@pytest.mark.parametrize("broken", [nn.Linear(2, 2), nn.Module()])
def test_other_models_are_claimed_by_nobody(broken: nn.Module) -> None:
    from hess_plugin import UnknownModel

    with pytest.raises(UnknownModel, match=r"no adapter claims .*known: .*pi3, vggt.*adapters/README\.md"):
        resolve_adapter(broken)


def test_upstream_batches_and_bare_aggregator(upstream_model: nn.Module, small_upstream: tuple[str, str]) -> None:
    from hess_plugin import patch

    images = torch.rand(2, 3, 3, 56, 70)
    with torch.no_grad(), patch(upstream_model, sparsity=0.5, block_q=4, block_k=4, backend="gather") as handle:
        both = upstream_model(images)
        one = upstream_model(images[1:])
    key = "world_points" if "world_points" in both else "points"
    torch.testing.assert_close(both[key][1:], one[key], rtol=1e-3, atol=1e-3)
    assert handle.report().sparsity == pytest.approx(0.5, abs=0.02)
    if small_upstream[0] == "vggt":
        with torch.no_grad(), patch(upstream_model, sparsity=0.0):
            tokens, start = upstream_model.aggregator(images)
        plain, _ = upstream_model.aggregator(images)
        assert start == 5 and torch.equal(tokens[-1], plain[-1])
