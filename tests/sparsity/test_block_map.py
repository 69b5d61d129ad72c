"""The block map against token-by-token averages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hess_plugin.exceptions import HessError
from hess_plugin.sparsity import block_map, pool, pool_tokens


def make(batch: int, heads: int, tokens: int, width: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, batch, heads, tokens, width, generator=generator).unbind(0)
    return q * 3, k


@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 50), st.integers(1, 20), st.integers(0, 10**6),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_pooling_averages_what_a_block_has(
    batch: int, heads: int, tokens: int, block: int, seed: int, dtype: torch.dtype
) -> None:
    x = make(batch, heads, tokens, seed=seed)[0].to(dtype)
    pooled = pool_tokens(x, block)
    expected = torch.stack([part.double().mean(2) for part in x.split(block, 2)], 2)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.double(), expected, rtol=1e-6, atol=1e-6)


def test_pooling_adds_in_float32() -> None:
    x = torch.full((1, 1, 4096, 2), 1.0, dtype=torch.bfloat16)
    x[:, :, ::2] = 1.0078125  # one bfloat16 step above 1
    assert torch.equal(pool_tokens(x, 4096), torch.full((1, 1, 1, 2), 1.00390625))


def test_block_map_is_the_softmax_of_pooled_scores() -> None:
    q, k = make(2, 3, 45, 8)
    given_map = block_map(q, k, 16, 8)
    assert (given_map.shape, given_map.dtype) == ((2, 3, 3, 6), torch.float32)
    for item in range(2):
        for head in range(3):
            rows = torch.stack([part.mean(0) for part in q[item, head].double().split(16)])
            columns = torch.stack([part.mean(0) for part in k[item, head].double().split(8)])
            expected = (rows @ columns.T / 8**0.5).softmax(-1)
            torch.testing.assert_close(given_map[item, head].double(), expected, rtol=1e-5, atol=1e-6)


def test_scale_replaces_the_default() -> None:
    q, k = make(1, 2, 45, 16)
    torch.testing.assert_close(block_map(q, k, 16, 8, scale=0.25), block_map(q, k, 16, 8))
    torch.testing.assert_close(block_map(q * 2, k, 16, 8, scale=0.5), block_map(q, k, 16, 8, scale=1.0))


@pytest.mark.parametrize("entries", [1, 10, 18, 40, 10**6])
def test_chunks_tile_the_block_map(entries: int) -> None:
    q, k = make(2, 3, 45)
    whole = block_map(q, k, 16, 8).flatten(0, 1)
    pooled = pool(q, k, 16, 8)
    seen = torch.zeros_like(whole)
    for heads, rows in pooled.chunks(entries):
        part = pooled.scores(heads, rows)
        assert part.numel() <= max(entries, pooled.columns)  # one row at least
        seen[heads, rows] += part.softmax(-1)
    torch.testing.assert_close(seen, whole)


def test_autocast_and_gradients_stay_out() -> None:
    q, k = make(1, 2, 45)
    expected = block_map(q, k, 16, 8)
    q.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = block_map(q, k, 16, 8)
    assert torch.equal(inside, expected)
    assert not inside.requires_grad


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": torch.zeros(2, 5, 4)}, r"q must be floating patch tokens \[B, H, N, d\]"),
        ({"k": torch.zeros(1, 2, 5, 4, dtype=torch.int64)}, "k must be floating"),
        ({"k": torch.zeros(1, 3, 5, 4)}, "must agree in items, heads and head width"),
        ({"block_q": 0}, "block_q must be at least one token; got 0"),
    ],
)
def test_refuses(change: dict[str, object], says: str) -> None:
    good: dict[str, object] = {"q": torch.zeros(1, 2, 5, 4), "k": torch.zeros(1, 2, 5, 4)}
    with pytest.raises(HessError, match=says):
        block_map(**(good | {"block_q": 2, "block_k": 2} | change))  # type: ignore[arg-type]
