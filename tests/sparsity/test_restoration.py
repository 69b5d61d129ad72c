"""Selection by drift against loops that recompute the attention of every set of blocks they compare."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hess_plugin.sparsity.restoration import ROUNDS, restored_rows

from .restoration_problems import Problem, largest_drifts, make, restored, row_of


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
@settings(max_examples=60, deadline=None)
def test_blocks_of_the_largest_drift_are_kept(problem: Problem, seed: int) -> None:
    counts = problem.counts(seed)
    given = chosen(problem, counts, rounds=0)
    for head in range(problem.pooled.heads):
        for row in range(problem.pooled.rows):
            assert given[head][row] == largest_drifts(row_of(problem, head, row), int(counts[head, row]))


@given(PROBLEMS, st.integers(0, 10**6), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_swaps_are_those_that_lower_the_recomputed_drift(problem: Problem, seed: int, rounds: int) -> None:
    counts = problem.counts(seed)
    given = chosen(problem, counts, rounds)
    for head in range(problem.pooled.heads):
        for row in range(problem.pooled.rows):
            assert given[head][row] == restored(row_of(problem, head, row), int(counts[head, row]), rounds)
