"""Layers and weights that other tools replaced: parametrised, adapted, quantised, checkpointed, given per call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from hess_plugin import AdapterError, patch
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.plugins import resolve_adapter
from hess_plugin.profiles import weights_fingerprint

Run = Callable[[nn.Module, Tensor], Tensor]


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class LowRank(nn.Module):
    """A linear layer with a low-rank addition, as adapters of large models are made."""

    def __init__(self, base: nn.Linear, tells_weight: bool) -> None:
        super().__init__()
        self.base_layer, self.tells_weight = base, tells_weight
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        if not self.tells_weight:
            raise AttributeError("weight")
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def test_a_parametrised_projection_is_patched_and_only_calibration_is_refused(
    make_model: Callable[..., TinyVGGT], outputs: Run, images: Callable[..., Tensor], small_blocks: dict[str, Any]
) -> None:
    model, x = make_model(), images()
    doubled = make_model()
    for one in (model, doubled):
        for block in one.aggregator.global_blocks:
            if one is model:
                parametrize.register_parametrization(block.attn.qkv, "weight", Doubled())
            else:
                with torch.no_grad():
                    block.attn.qkv.weight.mul_(2)
    sites, others = (resolve_adapter(one).sites(one) for one in (model, doubled))
    assert weights_fingerprint(sites) == weights_fingerprint(others)
    with patch(model, **small_blocks), patch(doubled, **small_blocks):
        assert torch.equal(outputs(model, x), outputs(doubled, x))
    with pytest.raises(AdapterError, match=r"attn\.qkv\.weight is not a parameter but made of others.*undo that first"):
        sites[0].weight()


def test_an_adapted_projection_is_patched_if_it_tells_its_weight_and_refused_if_not(
    make_model: Callable[..., TinyVGGT], outputs: Run, images: Callable[..., Tensor], small_blocks: dict[str, Any]
) -> None:
    model, x = make_model(), images()
    attention = model.aggregator.global_blocks[1].attn
    base = attention.qkv
    attention.qkv = LowRank(base, tells_weight=False)
    with pytest.raises(AdapterError, match=r"global_blocks\.1\.attn \(Attention\) is not an attention module"):
        patch(model, **small_blocks)
    attention.qkv = LowRank(base, tells_weight=True)
    plain = outputs(model, x)
    with patch(model, **small_blocks) as handle:
        assert not torch.equal(outputs(model, x), plain)
    assert handle.report().sparsity == pytest.approx(0.5, abs=0.01) and torch.equal(outputs(model, x), plain)


def test_a_projection_replaced_after_the_patch_is_used(
    make_model: Callable[..., TinyVGGT], outputs: Run, images: Callable[..., Tensor], small_blocks: dict[str, Any]
) -> None:
    model, other, x = make_model(), make_model(), images()
    added = LowRank(other.aggregator.global_blocks[0].attn.qkv, tells_weight=True)
    other.aggregator.global_blocks[0].attn.qkv = added
    with patch(model, **small_blocks), patch(other, **small_blocks):
        without = outputs(model, x)
        model.aggregator.global_blocks[0].attn.qkv = added
        assert torch.equal(outputs(model, x), outputs(other, x)) and not torch.equal(outputs(model, x), without)


def test_a_quantised_projection_is_refused_in_a_sentence_before_the_patch_and_works_after_it(
    make_model: Callable[..., TinyVGGT], outputs: Run, images: Callable[..., Tensor], small_blocks: dict[str, Any]
) -> None:
    warnings.simplefilter("ignore")  # torch calls its own quantisation old
    if not {"fbgemm", "x86", "qnnpack", "onednn"} & set(torch.backends.quantized.supported_engines):
        pytest.skip("this torch has no quantised linear layer")

    def quantised(model: nn.Module) -> nn.Module:
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8, inplace=True)

    model = make_model()
    quantised(model.aggregator.global_blocks)
    with pytest.raises(AdapterError, match=r"not an attention module with `num_heads` and a fused `qkv`") as caught:
        patch(model, **small_blocks)
    assert "\n" not in str(caught.value)
    model, x = make_model(), images()
    handle = patch(model, **small_blocks)
    quantised(model.aggregator.global_blocks)
    found = outputs(model, x)
    handle.remove()
    assert not torch.equal(outputs(model, x), found) and handle.report().sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_around_the_blocks_of_two_shapes_at_once(
    make_model: Callable[..., TinyVGGT],
    images: Callable[..., Tensor],
    small_blocks: dict[str, Any],
    reentrant: bool,
) -> None:
    model = make_model()
    weight = model.aggregator.global_blocks[0].attn.qkv.weight

    def gradient() -> Tensor:
        weight.grad = None
        # Both forwards before the first backward: the recomputation must find the layout of its own forward.
        total = model(images(2))["depth"].sum() + model(images(3, 40, 70))["depth"].sum()
        total.backward()
        assert weight.grad is not None
        return weight.grad.clone()

    with patch(model, **small_blocks) as handle:
        wanted = gradient()
        for block in model.aggregator.global_blocks:

            def again(x: Tensor, pos: Tensor, own: Callable[..., Tensor] = block.forward) -> Tensor:
                return checkpoint(own, x, pos, use_reentrant=reentrant)

            block.forward = again
        torch.testing.assert_close(gradient(), wanted)
        for block in model.aggregator.global_blocks:
            del block.forward
    assert {site.calls for site in handle.report().sites} == {2 + 2 * 2}


def test_parameters_given_per_call(
    make_model: Callable[..., TinyVGGT], outputs: Run, images: Callable[..., Tensor], small_blocks: dict[str, Any]
) -> None:
    model, other, x = make_model(), make_model(seed=1), images()
    with patch(other, **small_blocks), torch.no_grad():
        wanted = other(x)["depth"]
    with patch(model, **small_blocks), torch.no_grad():
        own = outputs(model, x)
        assert torch.equal(functional_call(model, dict(other.named_parameters()), (x,))["depth"], wanted)
        assert torch.equal(outputs(model, x), own)
