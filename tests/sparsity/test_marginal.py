"""Budgets by marginal gain: against a search through all budgets, and against one pair at a time."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hess_plugin.sparsity import SparsityError, allocate_by_gain
from hess_plugin.sparsity.marginal import convex_curves

Case = tuple[Tensor, Tensor, int, int, int]


@st.composite
def cases(draw: Any, most: int = 6, heads: int = 4) -> Case:
    """Shares, harm, rows, columns, minimum: measured at whole numbers of blocks, or anywhere."""
    rows, columns = draw(st.integers(1, most)), draw(st.integers(1, most))
    minimum, count = draw(st.integers(1, 3)), draw(st.integers(1, heads))
    if draw(st.booleans()):
        shares = sorted(draw(st.sets(st.integers(1, columns), min_size=1, max_size=4)))
        measured = torch.tensor(shares, dtype=torch.float64) / columns
    else:
        shares = sorted(draw(st.sets(st.integers(1, 997), min_size=1, max_size=4)))
        measured = torch.tensor(shares, dtype=torch.float64) / 997
    numbers = st.one_of(st.just(0.0), st.floats(1e-3, 10.0), st.integers(0, 3).map(float))
    curves = draw(
        st.lists(st.lists(numbers, min_size=len(shares), max_size=len(shares)), min_size=count, max_size=count)
    )
    return measured, torch.tensor(curves, dtype=torch.float64), rows, columns, minimum


def reach(case: Case) -> tuple[int, int]:
    _, harm, rows, columns, minimum = case
    return len(harm) * rows * min(minimum, columns), len(harm) * rows * columns


def at_pairs(shares: Tensor, harm: Tensor, pairs: int) -> np.ndarray:
    """The convex harm of every head at every whole number of pairs ``[H, pairs + 1]``, straight from its definition."""
    knots = [*(s for s in shares.tolist() if s < 1.0), 1.0]
    whole = np.arange(pairs + 1) / pairs
    rows = []
    for curve in harm.tolist():
        points = [*curve[: len(knots) - 1], 0.0]
        # The largest convex function below points is the largest of what lies below all chords: at every place, the
        # least of all lines between two points around it.
        hull = []
        for x in knots:
            around = [
                (points[i] * (knots[j] - x) + points[j] * (x - knots[i])) / (knots[j] - knots[i])
                for i in range(len(knots))
                for j in range(len(knots))
                if knots[i] <= x <= knots[j] and i != j
            ]
            hull.append(min([*around, points[knots.index(x)]]))
        slope = (hull[1] - hull[0]) / (knots[1] - knots[0]) if len(knots) > 1 else 0.0
        rows.append(np.interp(whole, [0.0, *knots], [hull[0] - slope * knots[0], *hull]))
    return np.array(rows)


def least_harm(values: np.ndarray, total: int, floor: int) -> float:
    """Search through all budgets, head by head."""
    best = {0: 0.0}
    for curve in values:
        new: dict[int, float] = {}
        for spent, harm in best.items():
            for budget in range(floor, len(curve)):
                if spent + budget <= total:
                    new[spent + budget] = min(new.get(spent + budget, np.inf), harm + curve[budget])
        best = new
    return best[total]


@given(cases(), st.data())
@settings(max_examples=150, deadline=None)
def test_no_other_budgets_of_the_total_have_less_harm(case: Case, data: st.DataObject) -> None:
    shares, harm, rows, columns, minimum = case
    low, high = reach(case)
    total = data.draw(st.integers(low, high))
    budgets = allocate_by_gain(total, shares, harm, rows=rows, columns=columns, minimum=minimum)
    assert budgets.dtype == torch.int64 and budgets.shape == harm.shape[:-1] and int(budgets.sum()) == total
    floor, cap = rows * min(minimum, columns), rows * columns
    assert floor <= int(budgets.min()) and int(budgets.max()) <= cap
    values = at_pairs(shares, harm, cap)
    found = sum(values[head, budget] for head, budget in enumerate(budgets.tolist()))
    assert found == pytest.approx(least_harm(values, total, floor), rel=1e-9, abs=1e-9)


@given(cases(most=12, heads=9), st.data())
@settings(max_examples=60, deadline=None)
def test_one_pair_at_a_time_comes_to_the_same_harm(case: Case, data: st.DataObject) -> None:
    shares, harm, rows, columns, minimum = case
    low, high = reach(case)
    total = data.draw(st.integers(low, high))
    values = at_pairs(shares, harm, rows * columns)
    floor = rows * min(minimum, columns)
    budgets = [floor] * len(values)
    heap = [(values[h, floor + 1] - values[h, floor], h) for h in range(len(values)) if floor < rows * columns]
    heapq.heapify(heap)
    for _ in range(total - low):
        _, head = heapq.heappop(heap)
        budgets[head] += 1
        if budgets[head] < rows * columns:
            heapq.heappush(heap, (values[head, budgets[head] + 1] - values[head, budgets[head]], head))
    wanted = sum(values[head, budget] for head, budget in enumerate(budgets))
    found = allocate_by_gain(total, shares, harm, rows=rows, columns=columns, minimum=minimum).tolist()
    assert sum(values[h, b] for h, b in enumerate(found)) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@given(st.integers(0, 999), st.integers(2, 5), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_heads_may_come_in_any_order_and_unit_and_more_never_takes_away(seed: int, layers: int, heads: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor([2, 5, 11, 30], dtype=torch.float64) / 40
    harm = torch.rand(layers, heads, 4, generator=generator, dtype=torch.float64).exp().sort(-1, descending=True).values
    size: dict[str, int] = {"rows": 7, "columns": 40}
    order = torch.randperm(layers * heads, generator=generator)
    before = None
    for total in range(layers * heads * 14, layers * heads * 280 + 1, layers * heads * 19):
        budgets = allocate_by_gain(total, shares, harm, **size)
        shuffled = allocate_by_gain(total, shares, harm.flatten(0, 1)[order], **size)
        assert torch.equal(shuffled, budgets.flatten()[order])
        assert torch.equal(allocate_by_gain(total, shares, harm * 1e-18, **size), budgets)
        assert before is None or bool((budgets >= before).all())
        before = budgets
    assert before is not None and bool((before == 280).all())


def test_equal_heads_share_to_a_pair_and_harmless_ones_wait() -> None:
    shares = torch.tensor([0.1, 0.5], dtype=torch.float64)
    harm = torch.tensor([[3.0, 1.0], [3.0, 1.0], [3.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    size: dict[str, int] = {"rows": 10, "columns": 10, "minimum": 2}
    assert allocate_by_gain(130, shares, harm, **size).tolist() == [37, 37, 36, 20]
    assert allocate_by_gain(322, shares, harm, **size).tolist() == [100, 100, 100, 22]
    still = torch.zeros(2, 3, 2, dtype=torch.float64)  # nothing is known against equal budgets
    assert allocate_by_gain(301, shares, still, **size).tolist() == [[51, 50, 50], [50, 50, 50]]


def test_a_whole_model_of_long_sequences_takes_no_time_and_no_wrap_around() -> None:
    rows, columns = 10_696, 21_391
    harm = torch.ones(24, 16, 1, dtype=torch.float64)
    total = 24 * 16 * rows * columns // 4 + 5
    budgets = allocate_by_gain(total, torch.tensor([0.1], dtype=torch.float64), harm, rows=rows, columns=columns)
    assert int(budgets.sum()) == total and int(budgets.max() - budgets.min()) == 1


def test_curves_are_convex_and_end_in_no_harm() -> None:
    knots, heights = convex_curves(
        torch.tensor([0.2, 0.4, 0.6], dtype=torch.float64), torch.tensor([[4.0, 5.0, 1.0], [1.0, 2.0, 3.0]])
    )
    assert knots.tolist() == [0.0, 0.2, 0.4, 0.6, 1.0]
    np.testing.assert_allclose(heights, [[5.5, 4.0, 2.5, 1.0, 0.0], [1.25, 1.0, 0.75, 0.5, 0.0]], atol=1e-12)
    knots, heights = convex_curves(torch.tensor([0.5, 1.0], dtype=torch.float64), torch.tensor([2.0, 9.0]))
    assert knots.tolist() == [0.0, 0.5, 1.0] and heights.tolist() == [
        4.0,
        2.0,
        0.0,
    ]  # all kept is no harm, measured or not


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"total": 7}, "can keep 8 to 16 pairs in all; got a total of 7"),
        ({"total": 17}, "got a total of 17"),
        ({"harm": torch.tensor([[1.0], [torch.nan]])}, "finite and >= 0"),
        ({"harm": torch.tensor([[1.0], [-1.0]])}, "finite and >= 0"),
        ({"harm": torch.tensor([[1.0], [torch.inf]])}, "finite and >= 0"),
        ({"harm": torch.ones(2, 2)}, r"got \[1\] and \[2, 2\]"),
        ({"shares": torch.tensor([0.0])}, "must ascend"),
        ({"shares": torch.tensor([1.5])}, "must ascend"),
        ({"shares": torch.tensor([0.5, 0.5]), "harm": torch.ones(2, 2)}, "must ascend"),
        ({"rows": 0}, "at least one row"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], sentence: str) -> None:
    options: dict[str, Any] = {
        "total": 10,
        "shares": torch.tensor([0.5]),
        "harm": torch.ones(2, 1),
        "rows": 2,
        "columns": 4,
    }
    options |= changes
    with pytest.raises(SparsityError, match=sentence):
        allocate_by_gain(options.pop("total"), options.pop("shares"), options.pop("harm"), minimum=2, **options)
