"""Bisected rows against sorted ones, on the same scores: to the bit, ties included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from selection_problems import cleaned, hard_rows, lists_of, padded, row_pointer, slow_choice, sorted_choice
from torch import Tensor

from hess_plugin.sparsity import spread
from hess_plugin_cuda.triton_selection import launch, shapes

# Infinite and huge scores: the interpreter computes with numpy, which warns of what a GPU is asked to do.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are read in pieces of 64 columns instead of held in registers."""
    monkeypatch.setattr(shapes, "LONGEST_ROW", 16)
    monkeypatch.setattr(shapes, "_PIECE", 64)
    assert shapes.row_shape(17) == (64, False, 1)


def chosen(scores: Tensor, counts: Tensor, device: torch.device) -> list[list[int]]:
    """Lists of `choose_kernel`, made in two chunks."""
    row_ptr = row_pointer(counts).to(device)
    col = torch.full((int(row_ptr[-1]) + 1,), -7, dtype=torch.int32, device=device)
    wide, half = padded(scores, device), len(scores) // 2
    for first, part in ((0, wide[:half]), (half, wide[half:])):
        launch.choose(part, scores.shape[1], first, row_ptr, col)
    assert int(col[-1]) == -7
    return lists_of(row_ptr.cpu(), col.cpu())


def some_counts(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randint(1, columns + 1, (rows,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("columns", [1, 2, 31, 64, 100, 257])
def test_hard_rows(columns: int, device: torch.device) -> None:
    scores = hard_rows(columns)
    for counts in {1, columns}:
        n = torch.full((len(scores),), counts)
        assert chosen(scores, n, device) == sorted_choice(scores, n) == slow_choice(scores, n)
    n = some_counts(len(scores), columns, columns)
    assert chosen(scores, n, device) == sorted_choice(scores, n) == slow_choice(scores, n)


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("columns", [40, 100])
def test_hard_rows_in_pieces(columns: int, device: torch.device) -> None:
    scores = hard_rows(columns, seed=1)
    n = some_counts(len(scores), columns, columns)
    assert chosen(scores, n, device) == sorted_choice(scores, n)


SCORE = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, float("nan"), float("-inf")])


@given(rows=st.lists(st.lists(SCORE, min_size=9, max_size=9), min_size=2, max_size=4), count=st.integers(1, 9))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_floats(rows: list[list[float]], count: int, device: torch.device) -> None:
    scores = torch.tensor(rows)
    n = torch.full((len(rows),), count)
    assert chosen(scores, n, device) == sorted_choice(scores, n) == slow_choice(scores, n)


def spread_and_cut(scores: Tensor, heads: int, budgets: Tensor, device: torch.device) -> tuple[Tensor, Tensor, list]:
    """Gains, counts and lists of rows that belong to so many heads."""
    rows, columns = len(scores) // heads, scores.shape[1]
    found = launch.Thresholds.empty(len(scores), device)
    wide, budgets = padded(scores, device), budgets.to(device)
    launch.find_thresholds(wide[:3], columns, 0, budgets, rows, found)
    launch.find_thresholds(wide[3:], columns, 3, budgets, rows, found)
    counts = launch.spread(budgets, columns, rows, found)
    row_ptr = row_pointer(counts)
    col = torch.full((int(row_ptr[-1]) + 1,), -7, dtype=torch.int32, device=device)
    launch.emit(wide[:5], columns, 0, found, row_ptr, col)
    launch.emit(wide[5:], columns, 5, found, row_ptr, col)
    assert int(col[-1]) == -7
    return found.gains.view(heads, rows).cpu(), counts.cpu(), lists_of(row_ptr.cpu(), col.cpu())


def check_spread(scores: Tensor, budgets: Tensor, device: torch.device) -> None:
    heads, columns = len(budgets), scores.shape[1]
    rows = len(scores) // heads
    gains, counts, lists = spread_and_cut(scores, heads, budgets, device)
    nth = (budgets // rows).clamp(max=columns - 1).repeat_interleave(rows)
    ranked = cleaned(scores).double().sort(-1, descending=True).values
    ranked -= ranked[:, :1].clone()
    exact = ranked.gather(-1, nth[:, None])[:, 0] - ranked.logsumexp(-1)
    exact = cleaned(exact).float().view(heads, rows)
    torch.testing.assert_close(gains, exact, rtol=3e-7, atol=2e-6)
    assert torch.equal(counts, spread(budgets, rows, columns, gains))
    assert torch.equal(counts.sum(-1), budgets)
    assert lists == sorted_choice(scores, counts.flatten())


@pytest.mark.parametrize("columns", [1, 30, 65])
def test_budgets_go_to_the_rows_that_gain_most(columns: int, device: torch.device) -> None:
    scores = torch.cat([hard_rows(columns), hard_rows(columns, seed=1).flip(0)])
    for seed in range(2 if columns == 30 else 1):
        shares = torch.rand(2, generator=torch.Generator().manual_seed(seed))
        budgets = (11 + shares * 11 * (columns - 1)).round().long()
        check_spread(scores, budgets, device)


def test_whole_heads_and_even_shares(device: torch.device) -> None:
    scores = torch.cat([hard_rows(20), hard_rows(20, seed=1), hard_rows(20, seed=2)])
    check_spread(scores, torch.tensor([11 * 20, 11, 11 * 7]), device)


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize(("heads", "copies", "columns"), [(1, 6, 3), (1, 1, 70)])
def test_budgets_in_pieces(heads: int, copies: int, columns: int, device: torch.device) -> None:
    scores = torch.cat([hard_rows(columns, seed) for seed in range(copies)])
    rows = len(scores) // heads
    assert shapes.row_shape(rows).whole == (rows <= 16)
    check_spread(scores, torch.tensor([rows * columns // 2 + 5, rows + 7][:heads]), device)


def test_equal_gains_go_to_the_lower_row(device: torch.device) -> None:
    scores = torch.randn(1, 30, generator=torch.Generator().manual_seed(0)).expand(8, 30)
    _, counts, _ = spread_and_cut(scores, 1, torch.tensor([8 * 4 + 3]), device)
    assert counts.tolist() == [[5, 5, 5, 4, 4, 4, 4, 4]]
