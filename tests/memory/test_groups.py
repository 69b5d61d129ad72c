"""Sparse attention by groups of heads: the same bits as all heads together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hess_plugin import TokenLayout
from hess_plugin import attention as attention_module
from hess_plugin.attention import SiteAttention
from hess_plugin.calibration.live_memory import LiveMemory
from hess_plugin.plans import Layouts
from hess_plugin.settings import Settings
from hess_plugin.sites import Site

BLOCKS: dict[str, Any] = {"block_q": 8, "block_k": 8}
HEADS, WIDTH = 4, 8
SITE = Site("attn", nn.Identity(), HEADS, WIDTH, "", {})


def attention_of(frames: int, how: dict[str, Any], weights: Tensor | None = None, patches: int = 24) -> SiteAttention:
    layout = TokenLayout(frames, patches, leading=3)
    layouts = Layouts("raster", 8)
    layouts.see(layout)
    amounts = {"sparsity": None, "sparse_ratio": None, "cdf_threshold": None, "allocation": "uniform"} | how
    return SiteAttention(SITE, Settings(**amounts, **BLOCKS, backend="gather"), weights, layouts, 0)


def tokens_of(frames: int, seed: int = 0, patches: int = 24, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, HEADS, frames * (patches + 3), WIDTH, generator=generator) for _ in range(3))
    return q, k, v


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_groups_of_heads_give_the_same_bits(data: st.DataObject) -> None:
    frames, patches = data.draw(st.integers(1, 4)), data.draw(st.integers(8, 40))
    rule = data.draw(
        st.sampled_from(
            [
                {"sparsity": 0.3},
                {"sparsity": 0.8},
                {"sparse_ratio": 0.6},
                {"cdf_threshold": 0.5},
                {"sparse_ratio": 0.7, "cdf_threshold": 0.4},
            ]
        )
    )
    allocation = data.draw(st.sampled_from(["uniform", "equal", "hess", "uncapped"]))
    scores = torch.tensor(data.draw(st.lists(st.floats(0, 10), min_size=HEADS, max_size=HEADS)))
    plain = attention_of(frames, rule | {"allocation": allocation}, scores, patches)
    lean = SiteAttention(SITE, replace(plain.settings, memory="lean"), scores, plain.layouts, 0)
    tensors = tokens_of(frames, data.draw(st.integers(0, 2**20)), patches, data.draw(st.integers(1, 2)))
    before, attention_module.GROUP = attention_module.GROUP, data.draw(st.sampled_from([1, tensors[0].numel() // 2]))
    try:
        with torch.no_grad():
            assert torch.equal(lean(*tensors), plain(*tensors))
    finally:
        attention_module.GROUP = before
    assert lean.tally.report().head_sparsity == plain.tally.report().head_sparsity


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_groups_of_heads_in_other_types(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hess_plugin.attention.GROUP", 1)
    plain = attention_of(3, {"sparsity": 0.5})
    lean = SiteAttention(SITE, replace(plain.settings, memory="lean"), None, plain.layouts, 0)
    q, k, v = tokens_of(3)
    with torch.no_grad():
        found = lean(q, k, v.to(dtype))  # VGGT's q and k are float32 beside a bfloat16 v
        assert found.dtype == dtype and torch.equal(found, plain(q, k, v.to(dtype)))


def test_heads_side_by_side_leave_nothing_to_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of one attention call: far below the re-ordered q, k, v of all heads."""
    attention, (q, k, v) = attention_of(16, {"sparsity": 0.7}), tokens_of(16)
    peaks = {}
    for memory in ("plain", "lean"):
        monkeypatch.setattr("hess_plugin.attention.GROUP", q.numel() // HEADS)
        lean = replace(attention.settings, memory=memory)
        call = SiteAttention(SITE, lean, None, attention.layouts, 0)
        with torch.no_grad():
            call(q, k, v)
            with LiveMemory([q, k, v]) as live:
                output = call(q, k, v)
        peaks[memory] = live.peak
        tokens = output.transpose(1, 2).flatten(2)
        assert tokens.shape == (2, q.shape[2], HEADS * WIDTH)
        assert (tokens.data_ptr() == output.data_ptr()) == (memory == "lean")
    assert peaks["lean"] < 0.6 * peaks["plain"]
