"""Student's t against scipy, and what an interval of few values is."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hess_plugin.student import t_interval, t_quantile


@settings(deadline=None)
@given(st.floats(0.001, 0.99999), st.one_of(st.integers(1, 1100), st.integers(1, 10**7)))
def test_quantiles_are_scipys(level: float, degrees: int) -> None:
    assert t_quantile(level, degrees) == pytest.approx(stats.t.isf((1 - level) / 2, degrees), rel=1e-8)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.975, 0.999])
@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 999, 1000, 1001, 1002])
def test_quantiles_are_exact_at_both_sides_of_the_expansion(level: float, degrees: int) -> None:
    assert t_quantile(level, degrees) == pytest.approx(stats.t.isf((1 - level) / 2, degrees), rel=1e-11)


@settings(deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=2, max_size=30), st.sampled_from([0.9, 0.95, 0.975]))
def test_intervals_are_scipys(values: list[float], level: float) -> None:
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    low, high = t_interval(mean, error, len(values), level)
    if error > 0.0:  # scipy gives NaN for no spread
        assert (low, high) == pytest.approx(stats.t.interval(level, len(values) - 1, mean, error), rel=1e-8, abs=1e-12)
    else:
        assert low == high == mean


@pytest.mark.parametrize("given_", [(0.3, math.nan, 1), (0.3, 0.1, 1), (math.nan, math.nan, 0), (0.3, math.nan, 5)])
def test_fewer_than_two_values_have_no_interval(given_: tuple[float, float, int]) -> None:
    assert all(math.isnan(end) for end in t_interval(*given_))


@pytest.mark.parametrize("level, degrees", [(0.0, 3), (1.0, 3), (math.nan, 3), (0.9, 0), (0.9, 2.5)])
def test_what_is_out_of_range_is_refused(level: float, degrees: int) -> None:
    with pytest.raises(ValueError, match=r"wanted a (probability|whole number)"):
        t_quantile(level, degrees)
