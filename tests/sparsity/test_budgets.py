"""Budgets against the loop of the paper, in exact fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hess_plugin.sparsity import SparsityError, allocate, head_weights, spread, target_total

WEIGHT = st.integers(0, 50) | st.sampled_from([0, 1, 1000, 10**6])
WEIGHTS = st.lists(WEIGHT, min_size=1, max_size=12)


def paper_loop(total: int, weights: list[int], cap: int) -> list[Fraction]:
    """Shares as the paper has them: proportional, cap, redistribute the surplus, repeat."""
    budgets = [Fraction(0)] * len(weights)
    open_heads, surplus = {h for h, w in enumerate(weights) if w}, Fraction(total)
    while surplus and open_heads:
        weight = sum(weights[h] for h in open_heads)
        for h in open_heads:
            budgets[h] += surplus * weights[h] / weight
        full = {h for h in open_heads if budgets[h] > cap}
        surplus = sum((budgets[h] - cap for h in full), Fraction(0))
        for h in full:
            budgets[h] = Fraction(cap)
        open_heads -= full
    return budgets


def floored_loop(total: int, weights: list[int], floor: int, cap: int) -> list[Fraction]:
    """The same with a floor: heads are frozen at the bound that is violated most in sum, and the rest shared again."""
    if not any(weights):
        return [Fraction(total, len(weights))] * len(weights)
    fixed: dict[int, int] = {h: floor for h, w in enumerate(weights) if not w}
    while True:
        left = total - sum(fixed.values())
        free = [h for h in range(len(weights)) if h not in fixed]
        weight = sum(weights[h] for h in free)
        share = {h: Fraction(left * weights[h], weight) for h in free}
        over = sum((max(share[h] - cap, 0) for h in free), Fraction(0))
        under = sum((max(floor - share[h], 0) for h in free), Fraction(0))
        if not over and not under:
            break
        if over >= under:
            fixed |= {h: cap for h in free if share[h] > cap}
        if under >= over:
            fixed |= {h: floor for h in free if share[h] < floor}
        if len(fixed) == len(weights):
            break
    budgets = [Fraction(fixed[h]) if h in fixed else share[h] for h in range(len(weights))]
    zeros = [h for h, w in enumerate(weights) if not w]
    rest = total - sum(budgets)
    return [b + rest / len(zeros) if h in zeros else b for h, b in enumerate(budgets)]


def rounded(shares: list[Fraction], total: int) -> list[int]:
    """Largest remainder, ties to the lower head."""
    whole = [share.numerator // share.denominator for share in shares]
    order = sorted(range(len(shares)), key=lambda h: (whole[h] - shares[h], h))
    for h in order[: total - sum(whole)]:
        whole[h] += 1
    return whole


@given(WEIGHTS, st.integers(1, 30), st.integers(1, 30), st.integers(1, 4), st.floats(0, 1))
@settings(max_examples=400, deadline=None)
def test_budgets_are_those_of_the_slow_loop(
    weights: list[int], rows: int, columns: int, minimum: int, kept: float
) -> None:
    floor, cap = rows * min(minimum, columns), rows * columns
    total = round(len(weights) * (floor + kept * (cap - floor)))
    budgets = allocate(total, torch.tensor(weights).double(), rows=rows, columns=columns, minimum=minimum)
    assert budgets.dtype == torch.int64
    assert int(budgets.sum()) == total
    assert floor <= int(budgets.min())
    assert int(budgets.max()) <= cap
    assert budgets.tolist() == rounded(floored_loop(total, weights, floor, cap), total)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(2, 40), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_where_no_floor_is_met_it_is_the_loop_of_the_paper(weights: list[int], columns: int, kept: float) -> None:
    total = round(len(weights) * columns * kept)
    shares = paper_loop(total, weights, columns)
    assume(min(shares) >= 1)
    budgets = allocate(total, torch.tensor(weights), rows=1, columns=columns, minimum=1)
    assert budgets.tolist() == rounded(shares, total)


@given(WEIGHTS, st.integers(1, 30), st.integers(1, 30), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_without_capping_the_surplus_is_lost(weights: list[int], rows: int, columns: int, kept: float) -> None:
    floor, cap = rows * min(2, columns), rows * columns
    total = round(len(weights) * (floor + kept * (cap - floor)))
    uncapped = floored_loop(total, weights, floor, len(weights) * cap)
    budgets = allocate(total, torch.tensor(weights).double(), rows=rows, columns=columns, capped=False)
    assert budgets.tolist() == [min(b, cap) for b in rounded(uncapped, total)]


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=16), st.integers(0, 10**6), st.integers(-300, 300))
@settings(max_examples=100, deadline=None)
def test_total_is_kept_at_the_size_of_a_thousand_views(weights: list[float], dropped: int, power: int) -> None:
    rows, columns = 10_696, 21_391
    pairs = len(weights) * rows * columns
    total = max(pairs - dropped * 997, len(weights) * rows * 2)
    scale = 10.0 ** min(power, 250)
    budgets = allocate(total, torch.tensor(weights, dtype=torch.float64) * scale, rows=rows, columns=columns)
    assert int(budgets.sum()) == total
    assert rows * 2 <= int(budgets.min()) <= int(budgets.max()) <= rows * columns


def test_totals_may_differ_by_item_and_are_moved_into_range() -> None:
    weights = torch.tensor([1.0, 3.0, 6.0])
    totals = torch.tensor([0, 40, 100, 10**9])
    budgets = allocate(totals, weights, rows=5, columns=10)
    assert budgets.shape == (4, 3)
    assert budgets.sum(-1).tolist() == [30, 40, 100, 150]
    for total, row in zip((40, 100), budgets[1:3], strict=True):
        assert torch.equal(row, allocate(total, weights, rows=5, columns=10))
    by_item = allocate(totals[:2, None], torch.stack([weights, weights.flip(0)]), rows=5, columns=10)
    assert by_item.shape == (2, 2, 3)


@pytest.mark.parametrize(
    ("total", "size", "says"),
    [
        (29, {}, "keep 30 to 150 pairs in all; got a total of 29"),
        (151, {}, "total of 151"),
        (40, {"rows": 0}, "0 x 10"),
    ],
)
def test_refuses_what_cannot_be_met(total: int, size: dict[str, int], says: str) -> None:
    with pytest.raises(SparsityError, match=says):
        allocate(total, torch.ones(3), **({"rows": 5, "columns": 10} | size))


@given(st.floats(0, 1), st.integers(1, 16), st.integers(1, 50), st.integers(1, 50), st.integers(1, 4))
@settings(deadline=None)
def test_target_total_is_the_nearest_feasible(s: float, heads: int, rows: int, columns: int, minimum: int) -> None:
    total = target_total(s, heads, rows, columns, minimum)
    floor, pairs = heads * rows * min(minimum, columns), heads * rows * columns
    assert floor <= total <= pairs
    assert total == floor or abs(total - (1 - s) * pairs) <= 0.5 + 1e-6
    assert target_total(0.0, heads, rows, columns, minimum) == pairs


def test_target_total_refuses() -> None:
    with pytest.raises(SparsityError, match="sparsity must lie in 0"):
        target_total(1.5, 1, 1, 1)
    with pytest.raises(SparsityError, match="sparsity must lie in 0"):
        target_total(float("nan"), 1, 1, 1)


SCORES = torch.tensor([0.1, 0.5, 0.0, 0.4])


def test_head_weights() -> None:
    assert torch.equal(head_weights(SCORES, "hess"), SCORES.double())
    assert torch.equal(head_weights(SCORES, "uncapped"), SCORES.double())
    assert torch.equal(head_weights(SCORES, "equal"), torch.ones(4, dtype=torch.float64))
    assert torch.equal(head_weights(SCORES, "reverse"), SCORES.double()[[3, 2, 1, 0]])  # .4 .0 .5 .1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=16))
def test_reverse_inverts_the_ranking_of_the_same_values(scores: list[float]) -> None:
    given_scores = torch.tensor(scores, dtype=torch.float64)
    reverse = head_weights(given_scores, "reverse")
    assert torch.equal(reverse.sort().values, given_scores.sort().values)
    for a in range(len(scores)):
        for b in range(len(scores)):
            if scores[a] > scores[b]:
                assert reverse[a] <= reverse[b]


def test_random_is_a_seeded_permutation() -> None:
    scores = torch.arange(16.0)
    one, again, other = (head_weights(scores, "random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(one.sort().values, scores.double())


@pytest.mark.parametrize("bad", [[-1.0, 1.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_head_weights_refuses_bad_scores(bad: list[float]) -> None:
    with pytest.raises(SparsityError, match="finite and >= 0"):
        head_weights(torch.tensor(bad), "hess")


def test_head_weights_refuses_unknown_allocations() -> None:
    with pytest.raises(SparsityError, match="no allocation 'best'; choose one of equal, hess"):
        head_weights(SCORES, "best")


def spread_slowly(budget: int, rows: int, gains: list[float]) -> list[int]:
    counts = [budget // rows] * rows
    for row in sorted(range(rows), key=lambda r: (-gains[r], r))[: budget % rows]:
        counts[row] += 1
    return counts


@given(st.integers(1, 9), st.integers(1, 9), st.lists(st.floats(0, 1), min_size=2, max_size=2), st.integers(0, 10**6))
@settings(deadline=None)
def test_spread_gives_the_remainder_to_the_rows_that_gain_most(
    rows: int, columns: int, kept: list[float], seed: int
) -> None:
    budgets = torch.tensor([rows + round(share * (rows * columns - rows)) for share in kept])
    gains = torch.randint(0, 4, (2, rows), generator=torch.Generator().manual_seed(seed)).float()  # many ties
    counts = spread(budgets, rows, columns, gains)
    expected = [spread_slowly(b, rows, g) for b, g in zip(budgets.tolist(), gains.tolist(), strict=True)]
    assert counts.tolist() == expected
    assert spread(budgets, rows, columns).tolist() == [spread_slowly(b, rows, [0.0] * rows) for b in budgets.tolist()]
    batched: Tensor = spread(budgets.expand(3, 2), rows, columns, gains.expand(3, 2, rows))
    assert torch.equal(batched, counts.expand(3, 2, rows))


def test_a_vanishing_score_does_not_lose_a_block() -> None:
    weights = torch.tensor([1.0, 1e-29, 9e-31], dtype=torch.float64)
    assert int(allocate(1075, weights, rows=10, columns=100).sum()) == 1075
