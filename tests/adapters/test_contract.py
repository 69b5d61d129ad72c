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

POINTS = ("world_points", "points", "depth")  # what upstream models call them, or what they predict instead
NO_AUTOCAST = {
    "pi3": "Pi3 cannot run under CPU autocast: its pose head calls an SVD that has no bfloat16 kernel",
    "pi3x": "Pi3X cannot run under CPU autocast: its pose head calls an SVD that has no bfloat16 kernel",
    "vggt-omega": "VGGT-Omega cannot run under CPU autocast: its dense head refuses to answer in bfloat16",
}


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


def test_upstream_batches_and_bare_aggregator(
    upstream_model: nn.Module, small_upstream: tuple[str, str], small_scene: Scene
) -> None:
    from hess_plugin import patch

    images = torch.rand(2, *small_scene.images.shape)
    with torch.no_grad(), patch(upstream_model, sparsity=0.5, block_q=4, block_k=4, backend="gather") as handle:
        both = upstream_model(images)
        one = upstream_model(images[1:])
    key = next(key for key in POINTS if key in both)
    torch.testing.assert_close(both[key][1:], one[key], rtol=1e-3, atol=1e-3)
    assert handle.report().sparsity == pytest.approx(0.5, abs=0.02)
    if small_upstream[0] in ("vggt", "vggt-omega"):
        with torch.no_grad(), patch(upstream_model, sparsity=0.0):
            tokens, start = upstream_model.aggregator(images)
        plain, _ = upstream_model.aggregator(images)
        assert start == {"vggt": 5, "vggt-omega": 17}[small_upstream[0]] and torch.equal(tokens[-1], plain[-1])


def test_upstream_gradients_survive_checkpointing(upstream_model: nn.Module, small_upstream: tuple[str, str]) -> None:
    """VGGT recomputes its blocks during backward in train mode, after the forward and its hooks are over."""
    from hess_plugin import patch

    if small_upstream[0] != "vggt":
        pytest.skip("only VGGT checkpoints its global blocks")
    gradients = []
    images = torch.rand(1, 3, 3, 56, 70)
    weight = upstream_model.aggregator.global_blocks[0].attn.qkv.weight
    with patch(upstream_model, sparsity=0.5, block_q=4, block_k=4) as handle:
        for training in (False, True):
            upstream_model.train(training)
            output = upstream_model(images)
            upstream_model(images[:, :2])  # another shape in between: the recomputation must find its own layout
            gradients.append(torch.autograd.grad(output["world_points"].square().mean(), weight)[0])
    upstream_model.eval()
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)
    first = handle.report().sites[0]
    assert first.calls == 2 + 2 + 1  # two forwards in each mode, one recomputation
    assert first.sparsity == pytest.approx(0.5, abs=0.02)


def test_upstream_under_autocast_matches_float32(upstream_model: nn.Module, small_upstream: tuple[str, str]) -> None:
    """Attention gets float32 q and k beside a bfloat16 v under autocast; the patch casts as SDPA does."""
    from hess_plugin import patch

    if small_upstream[0] in NO_AUTOCAST:
        pytest.skip(NO_AUTOCAST[small_upstream[0]])
    images = torch.rand(1, 3, 3, 56, 70)
    points = {}
    with torch.no_grad():
        plain = upstream_model(images)
        key = next(key for key in POINTS if key in plain)
        exact = plain[key]
        for sparsity in (0.0, 0.5):
            for cast in (False, True):
                with (
                    patch(upstream_model, sparsity=sparsity, block_q=4, block_k=4),
                    torch.autocast("cpu", enabled=cast),
                ):
                    points[sparsity, cast] = upstream_model(images)[key].float()
    assert torch.equal(points[0.0, False], exact)
    # The rule for low precision: no worse than twice what bfloat16 costs the dense model.
    dense_cost = (points[0.0, True] - exact).abs().max()
    assert (points[0.5, True] - points[0.5, False]).abs().max() <= 2 * dense_cost + 1e-3
