"""Selection by drift against loops that recompute the attention of every set of blocks they compare."""

from __future__ import annotations

import itertools
from statistics import mean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hess_plugin.sparsity.drift import ChunkDrift, State, head_values
from hess_plugin.sparsity.restoration import ROUNDS, restore, restored_rows, swaps

from .restoration_problems import Problem, largest_drifts, make, restored, row_of

ALL = slice(None)


def chosen(problem: Problem, counts: Tensor, rounds: int = ROUNDS) -> list[list[set[int]]]:
    """Blocks of each row of each head."""
    row_ptr = torch.cat([counts.new_zeros(1), counts.flatten().cumsum(0)])
    col = torch.empty(int(row_ptr[-1]) + 1, dtype=torch.int32)
    restored_rows(problem.pooled, problem.values, counts, row_ptr, col, rounds=rounds)
    lists = [part.tolist() for part in col[:-1].split(counts.flatten().tolist())]
    assert all(one == sorted(set(one)) for one in lists)
    rows = counts.shape[1]
    return [[set(one) for one in lists[head * rows : (head + 1) * rows]] for head in range(len(counts))]


PROBLEMS = st.builds(
    make,
    st.integers(0, 10**6),
    heads=st.integers(1, 3),
    query_tokens=st.integers(1, 20),
    key_tokens=st.integers(1, 30),
    pool=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    parts=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    special=st.sampled_from([0, 1, 5, 17]),
    chunk_entries=st.sampled_from([None, 1, 50, 400]),
)


@given(PROBLEMS, st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_blocks_of_the_largest_drift_are_kept(problem: Problem, seed: int) -> None:
    counts = problem.counts(seed)
    given = chosen(problem, counts, rounds=0)
    for head in range(problem.pooled.heads):
        for row in range(problem.pooled.rows):
            assert given[head][row] == largest_drifts(row_of(problem, head, row), int(counts[head, row]))


@given(PROBLEMS, st.integers(0, 10**6), st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_swaps_are_those_that_lower_the_recomputed_drift(problem: Problem, seed: int, rounds: int) -> None:
    counts = problem.counts(seed)
    given = chosen(problem, counts, rounds)
    for head in range(problem.pooled.heads):
        for row in range(problem.pooled.rows):
            assert given[head][row] == restored(row_of(problem, head, row), int(counts[head, row]), rounds)


@given(PROBLEMS, st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_every_number_that_is_compared_is_a_recomputed_drift(problem: Problem, seed: int) -> None:
    pooled = problem.pooled
    drift = ChunkDrift(pooled, head_values(pooled, problem.values, ALL), ALL, ALL)
    generator = torch.Generator().manual_seed(seed)
    shape = (pooled.heads, pooled.rows, pooled.columns)
    keep = (torch.rand(shape, generator=generator) < 0.5).double()
    keep[..., torch.randint(0, pooled.columns, (1,), generator=generator)] = 1.0  # one at least
    state = drift.state(keep)
    found = {1: drift.after(state, 1), -1: drift.after(state, -1)}
    for head in range(pooled.heads):
        unit = unit_of(problem, head)
        for row in range(pooled.rows):
            numbers, kept = row_of(problem, head, row), set(keep[head, row].nonzero().flatten().tolist())
            close(drift.objective(state)[head, row], numbers.drift(kept) / unit)
            blocks = set(range(pooled.columns))
            for j in blocks:
                if blocks != {j}:  # without a second one nothing is left to tell a drift of
                    close(drift.alone()[head, row, j], numbers.drift(blocks - {j}) / unit)
                if kept != {j}:  # a swap never leaves a row without blocks
                    close(found[-1 if j in kept else 1][head, row, j], numbers.drift(kept ^ {j}) / unit)


def unit_of(problem: Problem, head: int) -> float:
    """What squared drifts of a head are told in: the largest component of its values, squared."""
    values = torch.cat([problem.values.v[head], problem.values.special_v[head]])
    return float(values.abs().max()) ** 2


def close(given: Tensor, wanted: float) -> None:
    # What is left of a difference of numbers near one is divided by 1e-8 where next to nothing is kept.
    assert float(given) == pytest.approx(wanted, rel=1e-6, abs=1e-7)


@given(PROBLEMS, st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_more_rounds_never_raise_the_drift(problem: Problem, seed: int) -> None:
    counts = problem.counts(seed)
    by_rounds = [chosen(problem, counts, rounds) for rounds in range(ROUNDS + 1)]
    for head in range(problem.pooled.heads):
        for row in range(problem.pooled.rows):
            numbers = row_of(problem, head, row)
            drifts = [numbers.drift(sets[head][row]) for sets in by_rounds]
            assert all(later <= sooner * (1 + 1e-9) + 1e-15 for sooner, later in itertools.pairwise(drifts))


def test_chunks_change_nothing() -> None:
    shape = {"heads": 3, "query_tokens": 50, "key_tokens": 90, "pool": (2, 3), "parts": (2, 2), "special": 5}
    problems = [make(7, chunk_entries=entries, **shape) for entries in (None, 1, 130, 700, 3000)]
    counts = problems[0].counts(3)
    first, *others = [chosen(problem, counts) for problem in problems]
    assert all(other == first for other in others)


ROWS = [(seed, parts) for seed in range(12) for parts in ((1, 1), (2, 2))]


def problem_of_nine(seed: int, parts: tuple[int, int]) -> Problem:
    """One row of nine blocks, whose values have more components than there are blocks, as those of a model have."""
    return make(seed, query_tokens=2 * parts[0], key_tokens=18 * parts[1], parts=parts, special=3, width=12)


def test_drift_is_near_the_least_of_all_sets() -> None:
    ratios = []
    for seed, parts in ROWS:
        problem = problem_of_nine(seed, parts)
        row = row_of(problem, 0, 0)
        (given,) = chosen(problem, torch.tensor([[3]]))[0]
        least = min(row.drift(kept) for kept in itertools.combinations(range(9), 3))
        ratios.append(row.drift(given) / least)
    assert min(ratios) >= 1 - 1e-9
    assert mean(ratios) < 1.1


class Flipped(ChunkDrift):
    """Likes best what moves the output most."""

    def objective(self, state: State) -> Tensor:
        """Minus the drift."""
        return -super().objective(state)

    def after(self, state: State, sign: int) -> Tensor:
        """Minus the drift after a swap."""
        return -super().after(state, sign)


def test_with_the_sign_flipped_drift_is_larger_than_that_of_random_blocks() -> None:
    drifts: dict[str, list[float]] = {"restored": [], "start": [], "random": [], "flipped": []}
    counts = torch.tensor([[3]])
    for seed, parts in ROWS:
        problem = problem_of_nine(seed, parts)
        row = row_of(problem, 0, 0)
        flipped = Flipped(problem.pooled, head_values(problem.pooled, problem.values, ALL), ALL, ALL)
        sets = {
            "restored": chosen(problem, counts)[0][0],
            "start": chosen(problem, counts, rounds=0)[0][0],
            "random": torch.randperm(9, generator=torch.Generator().manual_seed(seed))[:3].tolist(),
            "flipped": restore(flipped, counts, ROUNDS)[0, 0].nonzero().flatten().tolist(),
        }
        for name, kept in sets.items():
            assert len(kept) == 3
            drifts[name].append(row.drift(kept))
    means = {name: mean(values) for name, values in drifts.items()}
    assert 1.1 * means["restored"] < means["start"] < 0.7 * means["random"] < 0.5 * means["flipped"], means


@pytest.mark.parametrize(
    ("count", "columns", "moves"),
    [(1, 1, [0] * 5), (1, 9, [1] * 5), (9, 9, [0] * 5), (8, 9, [1] * 5), (40, 80, [10, 5, 2, 1, 1]),
     (70, 80, [10, 9, 4, 2, 1]), (6, 80, [2, 1, 1, 1, 1])],
)  # fmt: skip
def test_swaps_halve_from_round_to_round(count: int, columns: int, moves: list[int]) -> None:
    assert [int(swaps(torch.tensor([[count]]), columns, turn)) for turn in range(5)] == moves


def test_a_special_key_holds_what_blocks_cannot_move() -> None:
    problem = make(0, query_tokens=2, key_tokens=8, special=1)
    pooled, values = problem.pooled, problem.values
    values.special_k[:] = 60 * pooled.q[:, 0] / pooled.q[:, 0].square().sum()  # has nearly all of the attention
    drift = ChunkDrift(pooled, head_values(pooled, values, ALL), ALL, ALL)
    assert float(drift.alone().max()) < 1e-20
    values.special_k.neg_()
    drift = ChunkDrift(pooled, head_values(pooled, values, ALL), ALL, ALL)
    assert float(drift.alone().max()) > 1e-3


def test_equal_drifts_keep_the_lower_blocks() -> None:
    problem = make(0, query_tokens=6, key_tokens=16, special=0)
    problem.pooled.k.zero_()
    problem.values.v.copy_(torch.tensor([1.0, 0, 0, 0]).mul(torch.tensor([[1.0], [-1.0]]).repeat(4, 1)))
    assert chosen(problem, torch.tensor([[3, 2, 1]]), rounds=0)[0] == [{0, 1, 2}, {0, 1}, {0}]
    # Any even number of neighbours leaves the output where it is.
    assert chosen(problem, torch.tensor([[4, 2, 8]]))[0] == [{0, 1, 2, 3}, {0, 1}, set(range(8))]
