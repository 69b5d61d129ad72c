"""The gradient through patch tokens alone: against a brute-force twin, and without touching the gradient of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hess_plugin import Scene, TokenLayout
from hess_plugin.calibration.measuring import Protocol, measuring
from hess_plugin.calibration.patch_rows import taps
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.plugins import resolve_adapter
from hess_plugin.sites import Site, fused_site

layouts = st.builds(
    TokenLayout,
    frames=st.integers(1, 4),
    patches=st.integers(1, 5),
    leading=st.integers(0, 3),
    trailing=st.integers(0, 2),
    tail=st.integers(0, 2),
)


class Attention(nn.Module):
    """A projection of q, k and v and nothing else."""

    def __init__(self, called: bool = True) -> None:
        super().__init__()
        self.num_heads, self.called = 2, called
        self.qkv = nn.Linear(6, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.qkv(tokens) if self.called else nn.functional.linear(tokens, self.qkv.weight, self.qkv.bias)


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = Attention(**options)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.attn(tokens)


class AdapterOf:
    """As much of an adapter as the taps ask for."""

    def __init__(self, layout: TokenLayout) -> None:
        self.layout = layout

    def token_layout(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenLayout:
        return self.layout


def sites_of(model: Model) -> list[Site]:
    # 12 rows: q, k and v of 4 each would need a multiple of 3 heads; described by hand below where it matters.
    return [fused_site(model, "attn", "")]


@given(layouts, st.integers(0, 99), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=60, deadline=None)
def test_the_twin_gets_the_patch_tokens_share(layout: TokenLayout, seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    model = Model().to(dtype)
    tokens, weight = torch.randn(1, layout.tokens, 6, dtype=dtype), model.attn.qkv.weight
    loss_weights = torch.randn(1, layout.tokens, 12, dtype=dtype)
    plain = torch.autograd.grad((model(tokens).tanh() * loss_weights).sum(), weight)[0]
    with taps(AdapterOf(layout), model, sites_of(model)) as found:  # type: ignore[arg-type]
        output = model(tokens)
        assert found.complete()
        whole, twin = torch.autograd.grad((output.tanh() * loss_weights).sum(), [weight, found.twin(weight)])
    assert torch.equal(whole, plain)  # the tap leaves the projection's own gradient alone, bit for bit
    wanted = torch.zeros_like(weight)
    with torch.no_grad():
        slope = (1 - model(tokens).tanh() ** 2) * loss_weights
        for position in layout.patches_first()[: layout.patch_tokens].tolist():
            wanted += slope[0, position][:, None] * tokens[0, position][None, :]
    error = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(twin, wanted, rtol=error, atol=error)
    assert not model.attn.qkv._forward_hooks and not model._forward_pre_hooks


def test_the_twin_gets_exactly_nothing_where_only_special_tokens_have_a_gradient() -> None:
    layout = TokenLayout(frames=3, patches=4, leading=2)
    model = Model()
    with taps(AdapterOf(layout), model, sites_of(model)) as found:  # type: ignore[arg-type]
        special = layout.patches_first()[layout.patch_tokens :]
        loss = model(torch.randn(1, layout.tokens, 6))[:, special].square().sum()
        whole, twin = torch.autograd.grad(loss, [model.attn.qkv.weight, found.twin(model.attn.qkv.weight)])
    assert bool((whole != 0).any()) and bool((twin == 0).all())


def test_a_twin_shares_the_weights_memory() -> None:
    model = Model()
    with taps(AdapterOf(TokenLayout(2, 3)), model, sites_of(model)) as found:  # type: ignore[arg-type]
        twin = found.twin(model.attn.qkv.weight)
        assert twin.data_ptr() == model.attn.qkv.weight.data_ptr() and twin.is_leaf and twin.requires_grad


@pytest.mark.parametrize("length", [6, 7])
def test_what_cannot_be_tapped_is_told(length: int) -> None:
    """A projection that is not called as a module, or on a sequence of another length."""
    model = Model(called=length != 6)
    with taps(AdapterOf(TokenLayout(2, 3)), model, sites_of(model)) as found:  # type: ignore[arg-type]
        model(torch.randn(1, length, 6))
        assert not found.complete()


def test_a_model_that_cannot_be_tapped_is_measured_without_patch_rows(
    tiny_model: TinyVGGT, room: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = resolve_adapter(tiny_model)
    attention = tiny_model.aggregator.global_blocks[1].attn
    protocol = Protocol(eps=1e6)
    with measuring(adapter, tiny_model, adapter.sites(tiny_model), protocol) as measurer:
        both = measurer.measure(room).traces

    class Direct(nn.Linear):
        __call__ = nn.Linear.forward  # no hooks

    attention.qkv.__class__ = Direct
    with measuring(adapter, tiny_model, adapter.sites(tiny_model), protocol) as measurer:
        all_only = measurer.measure(room).traces
    assert sorted(all_only) == [f"{e}.{p}" for e in ("camera", "points") for p in "kqv"]
    assert len(both) == 12 and all(torch.equal(both[name], trace) for name, trace in all_only.items())
