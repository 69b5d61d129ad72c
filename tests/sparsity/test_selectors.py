"""Selectors on whole inputs in float32: lists, budgets, metrics, what is no number, and what a device waits for."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hess_plugin.calibration.live_memory import LiveMemory
from hess_plugin.sparsity import SELECTORS, SparsityError, pool, pool_values, select, spread
from hess_plugin.sparsity.ranking import mark_smallest, nth_largest
from hess_plugin.sparsity.restoration import restored_rows
from hess_plugin_cuda import BlockLists

BLOCKS: dict[str, Any] = {"block_q": 16, "block_k": 8}
POOLINGS = [{}, {"pool_q": 4}, {"pool_q": 8, "pool_k": 2}]
NAMES = ["drift", "restore"]
PATCHES = 300


def tokens(seed: int = 0, special: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of two items of three heads; values are far from zero, as those of a model may be."""
    shape = (3, 2, 3, PATCHES + special, 16)
    q, k, v = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).unbind(0)
    return q * 2, k * 2, v + 4


def realised(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists) -> float:
    """Mean squared change of the outputs of the patches by leaving out what the lists leave out."""
    mask = lists.to_mask().repeat_interleave(16, 2).repeat_interleave(8, 3)[:, :, :PATCHES, :PATCHES]
    mask = torch.nn.functional.pad(mask, (0, k.shape[2] - PATCHES), value=True)
    scores = (q[:, :, :PATCHES] @ k.mT).double() * 16**-0.5
    dense, sparse = scores.softmax(-1), scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return float(((sparse - dense) @ v.double()).square().sum(-1).mean())


@pytest.mark.parametrize(("pooling", "rounds"), [({}, 5), ({"pool_q": 4}, 3), ({"pool_k": 2}, 3)])
def test_restoration_makes_the_published_rounds_and_fewer_with_parts(pooling: dict[str, int], rounds: int) -> None:
    q, k, v = tokens(special=0)
    budgets = torch.tensor([[60, 150, 500], [100, 333, 600]])
    found = select(q, k, v, budgets=budgets, selector="restore", **BLOCKS, **pooling)
    pooled = pool(q, k, **BLOCKS, **pooling)
    values = pool_values(k, v, PATCHES, 8, pool_k=pooling.get("pool_k"))
    counts = found.counts().flatten(0, 1)
    cols = {}
    for tried in range(6):
        cols[tried] = torch.empty(int(counts.sum()) + 1, dtype=torch.int32)
        restored_rows(pooled, values, counts, found.row_ptr, cols[tried], rounds=tried)
    assert [tried for tried, col in cols.items() if torch.equal(col[:-1], found.col)] == [rounds]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", NAMES)
def test_budgets_and_counts_are_kept_to(name: str, pooling: dict[str, int]) -> None:
    q, k, v = tokens()
    budgets = torch.tensor([[19, 150, 722], [100, 333, 19 * 38]])
    arguments = {"patches": PATCHES, "selector": name, **BLOCKS, **pooling}
    lists = select(q, k, v, budgets=budgets, **arguments).check()
    assert torch.equal(lists.counts().sum(-1), budgets)
    mass = select(q, k, budgets=budgets, **(arguments | {"selector": "mass"}))
    assert torch.equal(lists.counts(), mass.counts())
    assert not torch.equal(lists.col, mass.col)
    counts = torch.randint(1, 39, (2, 3, 19), generator=torch.Generator().manual_seed(0))
    lists = select(q, k, v, counts=counts, **arguments).check()
    assert torch.equal(lists.counts(), counts)
    even = spread(budgets, 19, 38)[0]
    totals = even.sum(-1).tolist()
    lists = select(q, k, v, counts=even.expand(2, -1, -1), head_totals=totals, **arguments).check()
    assert lists.head_kept == tuple(totals)


def test_restoring_moves_outputs_less_and_finer_pooling_less_still() -> None:
    q, k, v = tokens()
    budgets = torch.full((2, 3), 19 * 10)
    moved = {}
    for name in SELECTORS:
        for pooling in POOLINGS:
            lists = select(q, k, v, budgets=budgets, patches=PATCHES, selector=name, **BLOCKS, **pooling)
            moved[name, len(pooling)] = realised(q, k, v, lists)
    exact = select(
        q, k, v, budgets=budgets, patches=PATCHES, selector="restore", pool_q=1, pool_k=1, **BLOCKS
    )  # fmt: skip
    assert realised(q, k, v, exact) < 0.5 * moved["mass", 0]
    assert realised(q, k, v, exact) < moved["restore", 1] < moved["restore", 0]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_metric_is_that_of_its_root(pooling: dict[str, int]) -> None:
    q, k, v = tokens()
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(3, 16, 16, generator=generator) * torch.logspace(-1, 1, 16)
    arguments = {"counts": torch.full((2, 3, 19), 9), "patches": PATCHES, "selector": "restore", **BLOCKS, **pooling}
    given = select(q, k, v, root=root, **arguments)
    plain = select(q, k, v, **arguments)
    moved = select(q, k, v @ root, **arguments)
    turned = select(q, k, v, root=root @ torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q, **arguments)
    assert overlap(given, plain) < 0.9
    assert overlap(given, moved) > 0.98  # but for what rounding decides
    assert overlap(given, turned) > 0.98


def overlap(one: BlockLists, other: BlockLists) -> float:
    return float((one.to_mask() & other.to_mask()).sum()) / one.kept


@pytest.mark.parametrize("name", NAMES)
def test_size_and_place_of_values_change_little(name: str) -> None:
    q, k, v = tokens()
    arguments: dict[str, Any] = {"counts": torch.full((2, 3, 19), 9), "patches": PATCHES, "selector": name, **BLOCKS}
    plain = select(q, k, v, **arguments)
    for other in (v * 1e-30, v * 1e30, v - 100):
        assert overlap(plain, select(q, k, other, **arguments)) > 0.98


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", list(SELECTORS))
def test_what_is_no_number_gives_valid_lists(name: str, pooling: dict[str, int]) -> None:
    arguments: dict[str, Any] = {"budgets": torch.tensor([[100, 333, 50]] * 2), "patches": PATCHES, "selector": name}
    for value in (torch.nan, torch.inf, -torch.inf, 3e38):
        for which in range(3):
            for where in ((ALL, ALL, ALL), (0, 1, 17), (0, 1, ALL, 3), (1, 2, PATCHES + 2)):
                given = tokens()
                given[which][where] = value
                lists = select(*given, **arguments, **BLOCKS, **pooling).check()
                assert lists.counts().sum(-1).tolist() == [[100, 333, 50]] * 2


ALL = slice(None)


@pytest.mark.parametrize("name", NAMES)
def test_rows_without_a_score_keep_the_lowest_blocks(name: str) -> None:
    q, k, v = tokens()
    lists = select(
        torch.full_like(q, torch.nan), k, v, counts=torch.full((2, 3, 19), 3), patches=PATCHES, selector=name, **BLOCKS
    )
    assert lists.col.tolist() == [0, 1, 2] * (2 * 3 * 19)


@given(
    st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 6), st.integers(1, 40), st.sampled_from([0, 1, 3, 1000]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_the_smallest_are_marked_ties_to_the_lower_column(
    seed: int, heads: int, rows: int, columns: int, largest: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-largest, largest + 1, (heads, rows, columns), generator=generator).to(dtype)
    x[torch.rand(x.shape, generator=generator) < 0.1] = torch.inf
    counts = torch.randint(0, columns + 1, (heads, rows), generator=generator)
    marks = mark_smallest(x.clone(), counts)
    assert marks.dtype == dtype
    ranks = counts.clamp(min=1).unsqueeze(-1)
    for index in range(heads * rows):
        row, count = x.flatten(0, 1)[index].tolist(), int(counts.flatten()[index])
        wanted = sorted(sorted(range(columns), key=lambda j: (row[j], j))[:count])
        assert marks.flatten(0, 1)[index].nonzero().flatten().tolist() == wanted
        nth = sorted(row, reverse=True)[max(count, 1) - 1]
        assert float(nth_largest(x, ranks).flatten()[index]) == nth


@pytest.mark.parametrize("pooling", [{}, {"pool_q": 64, "pool_k": 32}])
@pytest.mark.parametrize("name", list(SELECTORS))
def test_a_device_is_not_waited_for_and_holds_no_map(name: str, pooling: dict[str, int]) -> None:
    views, heads, entries = 30, 2, 2**17
    q = torch.empty(1, heads, views * 1374, 64, dtype=torch.bfloat16, device="meta")  # no value can be read from it
    patches = views * 1369
    rows, columns = -(-patches // 128), -(-patches // 64)
    budgets = torch.empty(1, heads, dtype=torch.int64, device="meta")
    totals = [rows * columns // 10] * heads
    with LiveMemory([q]) as memory:
        special = q[:, :, patches:]
        pooled = pool(
            q[:, :, :patches], q[:, :, :patches], 128, 64, special=special, chunk_entries=entries, **pooling
        )  # fmt: skip
        values = functools.partial(pool_values, q, q, patches, 64, pool_k=pooling.get("pool_k"))
        before = memory.live
        lists = SELECTORS[name](pooled, values=values, budgets=budgets, head_totals=totals)
    assert lists.exact and lists.kept == sum(totals)
    # Lists, what is known of each row, keys and values of some heads, and a chunk.
    tokens = 4 * (pooled.k.numel() + special.numel()) * 4
    assert memory.peak - before < 4 * lists.kept + tokens + 50 * entries


@pytest.mark.parametrize("rounds", [0, 5])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # what a CPU and a GPU work in
@pytest.mark.parametrize("gap", [8.0, 12.0, 16.0, 20.0, 36.0, 40.0, 60.0])
def test_a_block_with_nearly_all_the_attention_is_kept(gap: float, dtype: torch.dtype, parts: int, rounds: int) -> None:
    # Its drift is a difference of numbers that agree in all their digits.
    generator = torch.Generator().manual_seed(0)
    rows, columns, block, width = 12, 40, 4, 16
    directions = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    k = torch.randn(1, 1, columns * block, width, generator=generator) * 0.01
    wanted = torch.arange(rows) * 3
    for row, column in enumerate(wanted.tolist()):
        k[:, :, column * block : (column + 1) * block] += directions[row]
    q = (directions[:rows] * gap).repeat_interleave(block, 0)[None, None]
    v = torch.randn(1, 1, columns * block, width, generator=generator)
    pooled = pool(q, k, block, block, scale=1.0, pool_q=block // parts, pool_k=block // parts, special=k[:, :, :0])
    values = pool_values(k, v, columns * block, block, pool_k=block // parts)
    pooled = replace(pooled, q=pooled.q.to(dtype), k=pooled.k.to(dtype))
    values = replace(values, v=values.v.to(dtype), special_k=values.special_k.to(dtype))
    counts = torch.full((1, rows), 4)
    row_ptr = torch.arange(rows + 1) * 4
    col = torch.zeros(rows * 4 + 1, dtype=torch.int32)
    restored_rows(pooled, values, counts, row_ptr, col, rounds=rounds)
    kept = col[:-1].view(rows, 4)
    assert bool((kept == wanted[:, None]).any(1).all())
    assert bool((kept[:, 1:] > kept[:, :-1]).all())


def test_what_does_not_fit_is_refused() -> None:
    x = torch.randn(3, 2, 16, 4)
    with pytest.raises(SparsityError, match=r"root must be \[H, d, r\] of 2 heads of 4; got \[3, 4, 4\]"):
        pool_values(x, x, 16, 4, root=torch.eye(4).expand(3, 4, 4))
    counts = torch.full((3, 2, 4), 2)
    with pytest.raises(SparsityError, match="patches is 30, wanted at most the 16 tokens"):
        select(x, x, block_q=4, block_k=4, counts=counts, patches=30)
