"""Selection against sorting every row of the whole block map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hess_plugin.sparsity import (
    SELECTORS,
    SparsityError,
    allocate,
    block_map,
    pool,
    pooled_uniform_counts,
    select,
    select_from_map,
    spread,
    target_total,
    triton_trial,
)
from hess_plugin.sparsity.rows import rows_of
from hess_plugin.sparsity.sorted_rows import SortedRows
from hess_plugin.sparsity.triton_trial import uses_triton
from hess_plugin_cuda.triton import support

BLOCK_Q, BLOCK_K = 8, 4


def whole_numbers(batch: int, heads: int, tokens: int, seed: int, largest: int = 3) -> tuple[Tensor, Tensor]:
    """q and k whose pooled scores are exact in float32, with many ties: any order of additions gives the same map."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, batch, heads, tokens * BLOCK_Q, 4)
    q, k = torch.randint(-largest, largest + 1, shape, generator=generator).float().unbind(0)
    return q, k


def brute_force(row: list[float], count: int) -> list[int]:
    """The `count` most probable blocks, ties to the lower one, ascending."""
    return sorted(sorted(range(len(row)), key=lambda j: (-row[j], j))[:count])


def expected_mask(probabilities: Tensor, counts: Tensor) -> Tensor:
    mask = torch.zeros(probabilities.shape, dtype=torch.bool)
    rows = zip(mask.flatten(0, -2), probabilities.flatten(0, -2).tolist(), counts.flatten().tolist(), strict=True)
    for flags, row, count in rows:
        flags[brute_force(row, count)] = True
    return mask


SHAPES = (st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(0, 10**6))
ENTRIES = st.sampled_from([1, 20, 100, 10**6])


@given(*SHAPES, st.sampled_from([0, 1, 3]), ENTRIES)
@settings(max_examples=80, deadline=None)
def test_rows_keep_their_most_probable_blocks(
    batch: int, heads: int, tokens: int, seed: int, largest: int, entries: int
) -> None:
    q, k = whole_numbers(batch, heads, tokens, seed, largest)
    probabilities = block_map(q, k, BLOCK_Q, BLOCK_K)
    counts = torch.randint(
        1, probabilities.shape[-1] + 1, probabilities.shape[:3], generator=torch.Generator().manual_seed(seed)
    )
    expected = expected_mask(probabilities, counts)
    lists = select(q, k, block_q=BLOCK_Q, block_k=BLOCK_K, counts=counts).check()
    assert torch.equal(lists.to_mask(), expected)
    assert torch.equal(select_from_map(probabilities, counts), expected)
    streamed = SELECTORS["mass"](pool(q, k, BLOCK_Q, BLOCK_K, chunk_entries=entries), counts=counts).check()
    assert torch.equal(streamed.to_mask(), expected)


@given(*SHAPES, st.floats(0, 1), ENTRIES)
@settings(max_examples=80, deadline=None)
def test_budgets_are_spread_by_the_next_best_block(
    batch: int, heads: int, tokens: int, seed: int, sparsity: float, entries: int
) -> None:
    q, k = whole_numbers(batch, heads, tokens, seed)
    probabilities = block_map(q, k, BLOCK_Q, BLOCK_K)
    rows, columns = probabilities.shape[2:]
    weights = torch.rand(batch, heads, generator=torch.Generator().manual_seed(seed)) ** 3
    total = target_total(sparsity, heads, rows, columns)
    budgets = allocate(total, weights, rows=rows, columns=columns)
    ranked = probabilities.log().sort(-1, descending=True).values
    gains = torch.zeros(batch, heads, rows)
    for item in range(batch):
        for head in range(heads):
            base = int(budgets[item, head]) // rows
            gains[item, head] = ranked[item, head, :, min(base, columns - 1)]
    counts = spread(budgets, rows, columns, gains)
    expected = expected_mask(probabilities, counts)
    lists = select(q, k, block_q=BLOCK_Q, block_k=BLOCK_K, budgets=budgets).check()
    assert lists.kept == batch * total
    assert torch.equal(lists.counts().sum(-1), budgets)
    assert torch.equal(lists.to_mask(), expected)
    streamed = SELECTORS["mass"](pool(q, k, BLOCK_Q, BLOCK_K, chunk_entries=entries), budgets=budgets).check()
    assert torch.equal(streamed.to_mask(), expected)


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.entries = max(self.entries, value.numel())
        return result


def test_no_block_map_is_ever_whole() -> None:
    q = torch.randn(1, 4, 200, 2, generator=torch.Generator().manual_seed(0))
    k = torch.randn(1, 4, 400, 2, generator=torch.Generator().manual_seed(1))
    with LargestTensor() as largest:
        pooled = pool(q, k, 1, 1, chunk_entries=4096)
        counts = pooled_uniform_counts(pooled, 0.99, 0.01)
        lists = SELECTORS["mass"](pooled, budgets=counts.sum(-1))
    assert lists.kept < 4096
    assert largest.entries <= 4096 < 4 * 200 * 400


def test_real_valued_rows_keep_as_much_as_the_best_choice() -> None:
    q, k = torch.randn(2, 2, 3, 203, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    probabilities = block_map(q * 3, k, 16, 8)
    counts = torch.randint(1, 27, (2, 3, 13), generator=torch.Generator().manual_seed(1))
    lists = select(q * 3, k, block_q=16, block_k=8, counts=counts).check()
    assert torch.equal(lists.counts(), counts)
    best = probabilities.sort(-1, descending=True).values.cumsum(-1).gather(-1, counts.unsqueeze(-1) - 1)
    kept = (probabilities * lists.to_mask()).sum(-1, keepdim=True)
    torch.testing.assert_close(kept, best, rtol=1e-5, atol=1e-6)
    assert (lists.query_tokens, lists.key_tokens, lists.block_q, lists.block_k) == (203, 203, 16, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_tokens_are_scored_in_float32(dtype: torch.dtype) -> None:
    q, k = (x.to(dtype) for x in whole_numbers(1, 2, 5, 0))
    counts = torch.full((1, 2, 5), 3)
    low = select(q, k, block_q=BLOCK_Q, block_k=BLOCK_K, counts=counts)
    high = select(q.float(), k.float(), block_q=BLOCK_Q, block_k=BLOCK_K, counts=counts)
    assert torch.equal(low.col, high.col)


def test_everything_equal_keeps_the_lowest_blocks() -> None:
    q = k = torch.zeros(1, 1, 40, 4)
    lists = select(q, k, block_q=8, block_k=4, counts=torch.full((1, 1, 5), 3))
    assert lists.col.tolist() == [0, 1, 2] * 5


def test_all_blocks_is_full_lists() -> None:
    q, k = whole_numbers(2, 3, 5, 0)
    assert select(q, k, block_q=8, block_k=4, budgets=torch.full((2, 3), 50)).is_full


def test_scores_are_ranked_where_their_probabilities_vanish() -> None:
    q = torch.ones(1, 1, 4, 1)
    k = torch.tensor([0.0, -300.0, -200.0, -250.0, 0.0, -400.0]).view(1, 1, 6, 1)
    assert block_map(q, k, 4, 1)[0, 0, 0].tolist() == [0.5, 0.0, 0.0, 0.0, 0.5, 0.0]
    lists = select(q, k, block_q=4, block_k=1, counts=torch.tensor([[[4]]]))
    assert lists.col.tolist() == [0, 2, 3, 4]


def test_what_is_no_number_comes_last_and_zeros_are_equal() -> None:
    q = torch.ones(1, 1, 1, 1)
    k = torch.tensor([float("nan"), -0.0, 0.0, float("-inf"), -1e38, -0.0]).view(1, 1, 6, 1)
    chosen = [select(q, k, block_q=1, block_k=1, counts=torch.tensor([[[n]]])).col.tolist() for n in (1, 2, 3, 4, 5, 6)]
    assert chosen == [[1], [1, 2], [1, 2, 5], [1, 2, 4, 5], [0, 1, 2, 4, 5], [0, 1, 2, 3, 4, 5]]


def test_gains_of_vanishing_probabilities_are_compared() -> None:
    q = torch.tensor([1.0, 2.0, 1.0]).view(1, 1, 3, 1)
    k = torch.tensor([0.0, -120.0]).view(1, 1, 2, 1)
    lists = select(q, k, block_q=1, block_k=1, budgets=torch.tensor([[5]]))
    assert lists.counts().tolist() == [[[2, 1, 2]]]  # exp(-240) is 0 in float32, exp(-120) as well


def test_totals_of_heads_are_told_to_the_lists() -> None:
    q, k = whole_numbers(2, 3, 5, 0)
    totals = (50, 17, 20)
    arguments: dict[str, Any] = {"block_q": BLOCK_Q, "block_k": BLOCK_K, "budgets": torch.tensor([totals, totals])}
    lists = select(q, k, head_totals=totals, **arguments).check()
    assert (lists.head_kept, lists.exact) == (totals, True)
    assert select(q, k, **arguments).head_kept is None
    with pytest.raises(SparsityError, match="keep 174 pairs in all; the totals say 176"):
        select(q, k, head_totals=(50, 17, 21), **arguments)
    with pytest.raises(SparsityError, match="head_totals must be those of 3 heads; got 2"):
        select(q, k, head_totals=(50, 17), **arguments)


def test_a_cpu_sorts() -> None:
    pooled = pool(*whole_numbers(1, 1, 2, 0), BLOCK_Q, BLOCK_K)
    assert not uses_triton(pooled.q.device)
    assert isinstance(rows_of(pooled), SortedRows)


def test_nan_tokens_give_valid_lists() -> None:
    q, k = torch.full((2, 1, 2, 40, 4), float("nan")).unbind(0)
    lists = select(q, k, block_q=8, block_k=4, budgets=torch.tensor([[17, 20]])).check()
    assert lists.kept == 37


def test_strided_tokens_autocast_and_grad_change_nothing() -> None:
    packed = torch.randn(1, 40, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    q, k = packed.permute(2, 0, 3, 1, 4).unbind(0)
    arguments = {"block_q": 8, "block_k": 4, "budgets": torch.tensor([[17, 20, 30]])}
    plain = select(q.contiguous(), k.contiguous(), **arguments)
    packed.requires_grad_()
    q, k = packed.permute(2, 0, 3, 1, 4).unbind(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lists = select(q, k, **arguments)
    assert torch.equal(lists.col, plain.col)
    assert torch.equal(lists.row_ptr, plain.row_ptr)


@pytest.mark.parametrize(
    ("amounts", "says"),
    [
        ({}, "got both or neither"),
        ({"counts": torch.ones(1, 2, 5).long(), "budgets": torch.ones(1, 2).long()}, "got both or neither"),
        ({"counts": torch.ones(1, 2, 4).long()}, r"counts must be int64 \[1, 2, 5\]; got torch.int64 \[1, 2, 4\]"),
        ({"budgets": torch.ones(1, 2)}, r"budgets must be int64 \[1, 2\]; got torch.float32"),
        ({"budgets": torch.ones(1, 2, dtype=torch.int64, device="meta")}, "device of q, cpu; they are on meta"),
        ({"selector": "most", "budgets": torch.ones(1, 2).long()}, "no selector 'most'; choose one of mass, drift"),
        ({"selector": "drift", "budgets": torch.ones(1, 2).long()}, "look at the values of the keys; give them"),
    ],
)
def test_refuses(amounts: dict[str, object], says: str) -> None:
    q, k = whole_numbers(1, 2, 5, 0)
    with pytest.raises(SparsityError, match=says):
        select(q, k, block_q=8, block_k=4, **amounts)  # type: ignore[arg-type]


def test_on_a_graphics_card_triton_chooses_blocks_where_it_runs_and_agrees(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    card, found = torch.device("cuda", 0), ["a trial chose other blocks", None]
    monkeypatch.setattr(support, "missing_triton", lambda: None)
    monkeypatch.setattr(support, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton_trial, "failure", lambda device: found[-1])
    triton_trial._works.cache_clear()
    try:
        assert triton_trial.uses_triton(card) and not triton_trial.uses_triton(torch.device("cpu"))
        triton_trial._works.cache_clear()
        found.pop()
        assert not triton_trial.uses_triton(card) and not triton_trial.uses_triton(card)
    finally:
        triton_trial._works.cache_clear()
    (record,) = caplog.records
    assert "chosen by sorting" in record.message and "other blocks" in record.message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 1, 2, 90, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    arguments: dict[str, Any] = {"block_q": 4, "block_k": 4, "budgets": torch.tensor([[200, 117]])}
    wanted = select(q, k, **arguments)
    torch.set_default_dtype(dtype)
    try:
        given = select(q, k, **arguments)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(given.row_ptr, wanted.row_ptr) and torch.equal(given.col, wanted.col)
