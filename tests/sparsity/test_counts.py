"""The uniform rule against itself spelt out row by row."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hess_plugin.sparsity import (
    SparsityError,
    block_map,
    pool,
    pooled_uniform_counts,
    streamed_uniform_counts,
    uniform_counts,
)
from hess_plugin.sparsity.counts import ratio_count

RATIO = st.none() | st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.73, 0.9, 1.0]) | st.floats(0, 1)
THRESHOLD = st.none() | st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]) | st.floats(0, 1)


def count_row(row: list[float], ratio: float | None, threshold: float | None, minimum: int) -> int:
    """The rule for one row, in a loop."""
    kept = 0
    if threshold is not None:
        mass = 0.0
        for probability in sorted(row, reverse=True):
            mass += probability
            if mass > threshold + 1e-5:
                break
            kept += 1
    if ratio is not None:
        kept = max(kept, int(len(row) * (1 - ratio) + 1e-6))
    return max(kept, min(minimum, len(row)))


@given(
    st.integers(1, 20), RATIO, THRESHOLD, st.integers(1, 4), st.sampled_from([0.3, 3.0, 30.0]), st.integers(0, 10**6)
)
@settings(max_examples=150, deadline=None)
def test_counts_are_the_rule(
    columns: int, ratio: float | None, threshold: float | None, minimum: int, sharpness: float, seed: int
) -> None:
    if ratio is None and threshold is None:
        ratio = 0.5
    scores = torch.randn(1, 2, 5, columns, generator=torch.Generator().manual_seed(seed))
    probabilities = (scores * sharpness).softmax(-1)
    counts = uniform_counts(probabilities, ratio, threshold, minimum)
    assert counts.dtype == torch.int64
    expected = [count_row(row, ratio, threshold, minimum) for row in probabilities.flatten(0, 2).tolist()]
    assert counts.flatten().tolist() == expected


def test_ties_are_counted_one_by_one() -> None:
    even = torch.full((1, 1, 1, 8), 0.125)
    assert uniform_counts(even, cdf_threshold=0.5).item() == 4  # the fourth reaches .5 and stays within the slack
    assert uniform_counts(even, cdf_threshold=0.49).item() == 3
    assert uniform_counts(even, cdf_threshold=1.0).item() == 8


@given(st.integers(1, 2000), st.integers(0, 1000))
def test_ratio_counts_as_in_decimals(columns: int, thousandths: int) -> None:
    exact = columns * (1 - Fraction(thousandths, 1000))
    assert ratio_count(columns, thousandths / 1000) == exact.numerator // exact.denominator


@pytest.mark.parametrize(("columns", "ratio", "kept"), [(10, 0.7, 3), (10, 0.9, 1), (10, 0.75, 2), (100, 0.29, 71)])
def test_ratio_counts_that_rounding_would_spoil(columns: int, ratio: float, kept: int) -> None:
    assert ratio_count(columns, ratio) == kept


@given(st.integers(1, 3), st.integers(1, 40), st.sampled_from([1, 7, 30, 10**6]), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_streamed_counts_are_the_counts_of_the_map(batch: int, tokens: int, entries: int, seed: int) -> None:
    # Whole numbers and blocks of a power of two: every sum is exact, whatever the order of additions.
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randint(-4, 5, (2, batch, 3, tokens * 4, 4), generator=generator).float().unbind(0)
    whole = uniform_counts(block_map(q, k, 8, 4), 0.8, 0.6)
    assert torch.equal(streamed_uniform_counts(q, k, 0.8, 0.6, block_q=8, block_k=4), whole)
    assert torch.equal(pooled_uniform_counts(pool(q, k, 8, 4, chunk_entries=entries), 0.8, 0.6), whole)


def test_without_a_threshold_nothing_is_scored() -> None:
    q = k = torch.full((2, 3, 40, 4), float("nan"))
    counts = streamed_uniform_counts(q, k, sparse_ratio=0.5, block_q=8, block_k=4)
    assert torch.equal(counts, torch.full((2, 3, 5), 5))


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({}, "sparse_ratio, cdf_threshold or both; got neither"),
        ({"sparse_ratio": 1.2}, "sparse_ratio must lie in 0..1; got 1.2"),
        ({"cdf_threshold": float("nan")}, "cdf_threshold must lie in 0..1; got nan"),
        ({"sparse_ratio": 0.5, "minimum": 0}, "minimum must be at least one"),
    ],
)
def test_refuses(rule: dict[str, float], says: str) -> None:
    with pytest.raises(SparsityError, match=says):
        uniform_counts(torch.ones(1, 1, 2, 2), **rule)  # type: ignore[arg-type]
    with pytest.raises(SparsityError, match=says):
        streamed_uniform_counts(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), block_q=1, block_k=1, **rule)  # type: ignore[arg-type]
