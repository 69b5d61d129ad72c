"""Selection by Triton kernels from tokens to lists, against sorting on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hess_plugin.sparsity import bisected_rows, pool, pool_tokens, pooled_uniform_counts, rows, select, triton_trial
from hess_plugin.sparsity.selection import select_mass
from hess_plugin_cuda import BlockLists
from hess_plugin_cuda.triton_selection import launch

BLOCKS: dict[str, Any] = {"block_q": 8, "block_k": 4}


@pytest.fixture
def by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton chooses blocks, on whatever device."""
    for module in ("rows", "pooling"):
        monkeypatch.setattr(f"hess_plugin.sparsity.{module}.uses_triton", lambda device: True)


def whole_numbers(tokens: int, seed: int = 0, batch: int = 2, heads: int = 2) -> tuple[Tensor, Tensor]:
    """q and k whose pooled scores are the same bits in any order of additions, with many ties."""
    shape = (2, batch, heads, tokens, 16)
    q, k = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float().unbind(0)
    return q, k


def assert_same(given_lists: BlockLists, q: Tensor, k: Tensor) -> None:
    """The lists are those that sorting makes of their own counts."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("rows", "pooling"):
            patch.setattr(f"hess_plugin.sparsity.{module}.uses_triton", lambda device: False)
        wanted = select(q.cpu(), k.cpu(), counts=given_lists.counts().cpu(), **BLOCKS)
    given_lists.check()
    assert torch.equal(given_lists.row_ptr.cpu(), wanted.row_ptr)
    assert torch.equal(given_lists.col[: wanted.kept].cpu(), wanted.col)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("tokens", "block", "width"), [(64, 8, 16), (61, 8, 16), (5, 8, 20), (90, 64, 1), (7, 1, 64)])
def test_pooling(tokens: int, block: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    packed = torch.randn(2, tokens, 3, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = packed.transpose(1, 2)[:, 1:]
    pooled = launch.pool(x.to(device), block, 0.3).cpu()
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, pool_tokens(x, block).flatten(0, 1) * 0.3, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("heads", "rows", "columns", "width"), [(2, 70, 130, 16), (1, 3, 5, 20), (3, 1, 1, 64)])
def test_scores(heads: int, rows: int, columns: int, width: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(heads + 1, rows, width, generator=generator).to(device)
    k = torch.randn(heads + 1, columns, width, generator=generator).to(device)
    scores = launch.score(q[1:], k[1:])
    exact = torch.bmm(q[1:].double().cpu(), k[1:].double().cpu().mT).flatten(0, 1)
    assert scores.shape[0] == heads * rows
    assert (scores[:, :columns].double().cpu() - exact).abs().max() < 1e-6 * width


@pytest.mark.usefixtures("by_triton")
@pytest.mark.parametrize("entries", [None, 40])
def test_counts_end_to_end(entries: int | None, device: torch.device) -> None:
    q, k = (x.to(device) for x in whole_numbers(29))
    counts = torch.randint(1, 9, (2, 2, 4), generator=torch.Generator().manual_seed(0)).to(device)
    lists = select_mass(pool(q, k, 8, 4, chunk_entries=entries), counts=counts)
    assert torch.equal(lists.counts(), counts)
    assert_same(lists, q, k)


@pytest.mark.usefixtures("by_triton")
@pytest.mark.parametrize("entries", [None, 40, 200])
def test_budgets_end_to_end(entries: int | None, device: torch.device) -> None:
    q, k = (x.to(device) for x in whole_numbers(45, seed=1))
    totals = (6 * 3 + 4, 6 * 12)
    budgets = torch.tensor([totals, totals], device=device)
    lists = select_mass(pool(q, k, 8, 4, chunk_entries=entries), budgets=budgets, head_totals=totals)
    assert (lists.head_kept, lists.exact) == (totals, True)
    assert torch.equal(lists.counts().sum(-1), budgets)
    assert_same(lists, q, k)


@pytest.mark.usefixtures("by_triton")
def test_the_uniform_rule_end_to_end(device: torch.device) -> None:
    q, k = (x.to(device) for x in whole_numbers(45, seed=2))
    pooled = pool(q, k, 8, 4)
    counts = pooled_uniform_counts(pooled, 0.7, 0.6)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("rows", "pooling"):
            patch.setattr(f"hess_plugin.sparsity.{module}.uses_triton", lambda device: False)
        wanted = pooled_uniform_counts(pool(q.cpu(), k.cpu(), 8, 4), 0.7, 0.6)
    assert torch.equal(counts.cpu(), wanted)
    lists = select_mass(pooled, counts=counts)
    assert torch.equal(lists.counts(), counts)
    assert_same(lists, q, k)
    if device.type == "cuda":  # nothing was read back
        assert not lists.exact


@pytest.mark.usefixtures("by_triton")
def test_autocast_gradients_and_inference_mode_change_nothing(device: torch.device) -> None:
    q, k = (x.to(device).requires_grad_() for x in whole_numbers(21, batch=1))
    budgets = torch.tensor([[8, 11]], device=device)
    plain = select(q.detach(), k.detach(), budgets=budgets, **BLOCKS)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast = select(q, k, budgets=budgets, **BLOCKS)
    with torch.inference_mode():
        inside = select(q, k, budgets=budgets, **BLOCKS)
    for lists in (cast, inside):
        assert torch.equal(lists.row_ptr, plain.row_ptr)
        assert torch.equal(lists.col[:19], plain.col[:19])


@pytest.mark.usefixtures("by_triton")
def test_scores_are_kept_between_passes_or_made_again(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    score: Callable[[Tensor, Tensor], Tensor] = launch.score
    monkeypatch.setattr(launch, "score", lambda q, k: made.append(q.shape[1]) or score(q, k))
    q, k = (x.to(device) for x in whole_numbers(21, batch=1, heads=1))
    budgets = torch.tensor([[8]], device=device)
    select(q, k, budgets=budgets, **BLOCKS)
    assert made == [3]
    made.clear()
    monkeypatch.setattr(bisected_rows, "KEPT_ENTRIES", 40)
    monkeypatch.setattr(bisected_rows, "CHUNK_ENTRIES", 12)
    lists = select(q, k, budgets=budgets, **BLOCKS)
    assert made == [2, 1, 2, 1]
    assert_same(lists, q, k)


def test_the_trial(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_trial.failure(device) is None
    emit = launch.emit
    monkeypatch.setattr(launch, "emit", lambda *arguments: None)
    assert triton_trial.failure(device) == "a trial chose other blocks"

    def broken(*arguments: Any) -> None:
        raise OSError("no compiler\nat all")

    monkeypatch.setattr(launch, "emit", broken)
    assert triton_trial.failure(device) == "a trial failed with OSError: no compiler"
    monkeypatch.setattr(launch, "emit", emit)
    if device.type == "cuda":
        assert isinstance(
            rows.rows_of(pool(*(x.to(device) for x in whole_numbers(9)), 8, 4)), bisected_rows.BisectedRows
        )


def test_the_trial_does_not_hang_on_default_types_and_devices(device: torch.device) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert triton_trial.failure(device) is None
    finally:
        torch.set_default_dtype(torch.float32)
