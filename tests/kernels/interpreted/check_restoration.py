"""Selection by drift in Triton from tokens to lists, against torch and float64 on the CPU."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hess_plugin.sparsity import PooledTokens, PooledValues, drift, pool, pool_values, select, triton_restoration
from hess_plugin.sparsity.drift import ChunkDrift, head_values
from hess_plugin.sparsity.restoration import restored_rows
from hess_plugin.sparsity.triton_restoration import restore_by_triton
from hess_plugin_cuda.triton_selection import drifts, restoration

# Infinite and huge scores: the interpreter computes with numpy, which warns of what a GPU is asked to do.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")

Problem = tuple[PooledTokens, PooledValues, Tensor]


def problem(
    seed: int = 0,
    *,
    batch: int = 1,
    queries: int = 21,
    keys: int = 120,
    special: int = 5,
    blocks: tuple[int, int] = (8, 4),
    pools: tuple[int | None, int | None] = (None, None),
    width: int = 16,
    entries: int | None = None,
) -> Problem:
    """Random tokens of two heads, pooled, and counts from one block to all."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tokens: int) -> Tensor:
        return torch.randn(batch, 2, tokens, width, generator=generator)

    q, k, v = normal(queries), normal(keys + special), normal(keys + special) + 1
    pooled = pool(q, k[:, :, :keys], *blocks, scale=0.25, pool_q=pools[0], pool_k=pools[1], chunk_entries=entries)
    counts = torch.randint(1, pooled.columns + 1, (2 * batch, pooled.rows), generator=generator)
    counts[0, 0], counts[-1, -1] = 1, pooled.columns
    return pooled, pool_values(k, v, keys, blocks[1], pool_k=pools[1]), counts


def test_what_is_sure_is_so_in_torch_and_in_triton() -> None:
    assert drifts.LEAST.value == drift.LEAST
    assert (drifts.NEARLY_ALL.value, drifts.SURE.value) == (drift.NEARLY_ALL[torch.float32], drift.SURE)


CPU = torch.device("cpu")


def lists(way: Any, given: Problem, rounds: int, device: torch.device = CPU) -> list[list[int]]:
    """Lists of one way to choose, with nothing written outside of them."""
    pooled, values, counts = given
    pooled, values = (
        replace(x, **{f.name: y.to(device) for f in fields(x) if isinstance(y := getattr(x, f.name), Tensor)})
        for x in (pooled, values)
    )
    row_ptr = torch.nn.functional.pad(counts.flatten().cumsum(0), (1, 0))
    col = torch.full((int(row_ptr[-1]) + 1,), -7, dtype=torch.int32, device=device)
    way(pooled, values, counts.to(device), row_ptr.to(device), col, rounds=rounds)
    if way is restore_by_triton:
        assert int(col[-1]) == -7
    return [part.tolist() for part in col[:-1].cpu().split(counts.flatten().tolist())]


def objective(given: Problem, kept: list[list[int]]) -> Tensor:
    """J of lists, in float64."""
    pooled, values, counts = given
    pooled = replace(pooled, q=pooled.q.double(), k=pooled.k.double())
    values = PooledValues(values.v.double(), values.special_k.double(), values.special_v.double())
    heads, rows = slice(0, len(counts)), slice(0, pooled.rows)
    drift = ChunkDrift(pooled, head_values(pooled, values, heads), heads, rows)
    marks = torch.zeros(counts.numel(), pooled.columns, dtype=torch.float64)
    for row, columns in enumerate(kept):
        marks[row, columns] = 1
    return drift.objective(drift.state(marks.view(*counts.shape, -1))).flatten()


def check(given: Problem, rounds: int, device: torch.device) -> list[list[int]]:
    """The lists are sound, and as good as torch's; all but a few are the same: rounding may swap neighbours."""
    tried, wanted = lists(restore_by_triton, given, rounds, device), lists(restored_rows, given, rounds)
    columns = given[0].columns
    for row in tried:
        assert row == sorted(set(row))
        assert 0 <= row[0] <= row[-1] < columns
    assert [len(row) for row in tried] == given[2].flatten().tolist()
    different = sum(a != b for a, b in zip(tried, wanted, strict=True))
    assert different <= len(wanted) // 8
    if rounds:
        start = objective(given, lists(restore_by_triton, given, 0, device))
        reached = objective(given, tried)
        assert (reached <= start * (1 + 1e-4) + 1e-12).all()
        if not different:
            torch.testing.assert_close(reached, objective(given, wanted))
    return tried


@pytest.mark.parametrize("special", [0, 1, 5, 17])
def test_drifts_alone(special: int, device: torch.device) -> None:
    check(problem(special, special=special, queries=9, keys=61, batch=2), 0, device)
    check(problem(special, special=special, queries=9, keys=61, pools=(2, 2)), 0, device)


@pytest.mark.parametrize(("special", "keys"), [(0, 97), (1, 3), (17, 66)])
def test_restored(special: int, keys: int, device: torch.device) -> None:
    check(problem(special, special=special, queries=7, keys=keys), 5 if special else 2, device)


@pytest.mark.parametrize(
    ("queries", "keys", "pools"),
    [(9, 75, (4, None)), (7, 70, (None, 2)), (5, 66, (2, 1)), (6, 37, (1, 1))],  # with ragged and empty sub-blocks
)
def test_restored_by_sub_blocks(
    queries: int, keys: int, pools: tuple[int | None, int | None], device: torch.device
) -> None:
    check(problem(3, queries=queries, keys=keys, pools=pools), 1, device)


def test_chunks_and_groups_change_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(1, queries=17, keys=50)
    whole = lists(restore_by_triton, given, 1, device)
    assert whole == lists(restore_by_triton, given, 1, device)  # and neither does another run
    one = given[0].columns
    for entries, group in ((2 * one, 2**16), (4 * one, 1)):  # rows of one head, all rows of one head
        monkeypatch.setattr(triton_restoration, "_GROUP", group)
        assert lists(restore_by_triton, (replace(given[0], chunk_entries=entries), *given[1:]), 1, device) == whole


def test_what_has_no_order(device: torch.device) -> None:
    nan, inf = float("nan"), float("inf")
    pooled, values, counts = problem(2, queries=24, keys=40)
    pooled.q[0, 0] = nan  # no score of this row is finite
    pooled.q[1, 1, 0] = inf
    pooled.k[1, 3, 0] = nan  # no score of this block is a number
    values.v[0, 5, 0], values.v[1, 6, 1] = nan, -inf
    counts[0, 0] = 4
    tried = check((pooled, values, counts), 1, device)
    assert tried[0] == [0, 1, 2, 3]


def test_wide_and_narrow_values(device: torch.device) -> None:
    pooled, values, counts = problem(4, queries=8, keys=30, width=20)
    values = PooledValues(values.v[..., :7].contiguous(), values.special_k, values.special_v[..., :7].contiguous())
    check((pooled, values, counts), 1, device)


def test_the_switch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    pooled, _, _ = problem(0)
    assert not triton_restoration.restores_by_triton(pooled, 5) or device.type == "cuda"
    monkeypatch.setattr(triton_restoration, "uses_triton", lambda given: True)
    monkeypatch.setattr(triton_restoration, "_works", lambda given: True)
    assert triton_restoration.restores_by_triton(pooled, 5)
    assert not triton_restoration.restores_by_triton(pooled, 7)
    assert not triton_restoration.restores_by_triton(replace(pooled, block_q=24, pool_q=8), 5)
    with pytest.raises(ValueError, match="6 rounds"):
        restoration.fill(*[None] * 4, rounds=7)  # type: ignore[arg-type]
    made: list[int] = []
    monkeypatch.setattr(
        "hess_plugin.sparsity.restoration.restore_by_triton",
        lambda *given: made.append(given[-1]) or restore_by_triton(*given),
    )
    q, k = torch.randn(2, 1, 1, 24, 16, generator=torch.Generator().manual_seed(0)).to(device)
    for selector, rounds in (("drift", 0), ("restore", 5)):
        made.clear()
        found = select(q, k, k, block_q=8, block_k=4, budgets=torch.tensor([[7]], device=device), selector=selector)
        found.check()
        assert made == [rounds]


def test_the_trial(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hess_plugin.sparsity.restoration.ROUNDS", 1)
    torch.set_default_dtype(torch.bfloat16)  # the caller's default types and devices change nothing
    try:
        with torch.device("meta"):
            assert triton_restoration.restoration_failure(device) is None
    finally:
        torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(restoration.Chunk, "run", lambda chunk, rounds: None)
    assert triton_restoration.restoration_failure(device) == "a trial chose other blocks"

    def broken(*arguments: Any) -> None:
        raise OSError("no compiler\nat all")

    monkeypatch.setattr(restoration.Chunk, "run", broken)
    assert triton_restoration.restoration_failure(device) == "a trial failed with OSError: no compiler"
