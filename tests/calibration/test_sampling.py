from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hess_plugin.calibration.sampling import subsample


@settings(max_examples=60, deadline=None, derandomize=True)
@given(count=st.integers(0, 300), limit=st.integers(1, 300), seed=st.integers(0, 100))
def test_rows_are_distinct_ascending_and_seeded(count: int, limit: int, seed: int) -> None:
    rows = subsample(torch.arange(count), limit, seed).tolist()
    assert len(rows) == min(count, limit)
    assert rows == sorted(set(rows))
    assert rows == subsample(torch.arange(count), limit, seed).tolist()


def test_every_row_is_drawn_as_often() -> None:
    drawn = torch.cat([subsample(torch.arange(50), 20, seed) for seed in range(2000)])
    share = torch.bincount(drawn, minlength=50) / 2000
    assert float(share.mean()) == pytest.approx(0.4)
    assert bool((share > 0.25).all()) and bool((share < 0.6).all())


def test_no_limit_keeps_all() -> None:
    assert subsample(torch.arange(5), None, 0).tolist() == [0, 1, 2, 3, 4]
