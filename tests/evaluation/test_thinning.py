"""Thinning at once is thinning one point at a time."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hess_plugin.evaluation import thinning
from hess_plugin.evaluation.thinning import thin, visiting_order
from hess_plugin.exceptions import CalibrationError, MissingDependency


def thin_one_by_one(points: Tensor, distance: float, seed: int) -> Tensor:
    """What the benchmark's loop does: a point that is still there removes all others within the distance."""
    points = points.double()
    kept = torch.ones(len(points), dtype=torch.bool)
    for index in visiting_order(len(points), seed).tolist():
        if kept[index]:
            kept[(points - points[index]).square().sum(-1) <= distance * distance] = False
            kept[index] = True
    return kept


# Whole numbers give many pairs at the very distance, and points in one place.
wholes = st.integers(0, 7)
grids = st.lists(st.tuples(wholes, wholes, wholes), max_size=60)


@settings(deadline=None)  # the first example imports SciPy
@given(grids, st.sampled_from([1.0, 2.0, 3.0, 2**0.5]), st.integers(0, 999), st.sampled_from([(1, 4), (3, 9), (9, 99)]))
def test_a_grid_is_thinned_as_by_the_loop(
    rows: list[tuple[int, ...]], distance: float, seed: int, stretches: tuple[int, int]
) -> None:
    points = torch.tensor(rows).reshape(-1, 3).double()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(thinning, "FIRST", stretches[0])
        patched.setattr(thinning, "LARGEST", stretches[1])
        assert torch.equal(thin(points, distance, seed=seed), thin_one_by_one(points, distance, seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(4))
def test_crowds_are_thinned_as_by_the_loop(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = 10 ** (2 * torch.rand(3000, 1, generator=generator) - 1)  # from one crowd to loners
    points = (600 + spread * torch.randn(3000, 3, generator=generator)).to(dtype)
    kept = thin(points, 0.2, seed=seed)
    assert torch.equal(kept, thin_one_by_one(points, 0.2, seed))
    assert 300 < int(kept.sum()) < 2700
    left = points[kept].double()
    assert float((torch.cdist(left, left) + 9 * torch.eye(len(left))).min()) > 0.2
    assert float(torch.cdist(points.double(), left).amin(1).max()) <= 0.2 + 1e-9
    assert not torch.equal(kept, thin(points, 0.2, seed=seed + 1))


def test_many_points_in_one_place_leave_one() -> None:
    assert int(thin(torch.full((20_000, 3), 3.0), 0.2).sum()) == 1


def test_what_cannot_be_thinned_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for points in (torch.zeros(4, 2), torch.full((4, 3), torch.nan)):
        with pytest.raises(CalibrationError, match="A cloud to thin is"):
            thin(points, 0.2)
    with pytest.raises(CalibrationError, match=r"to a distance of 0\.0; give one above 0"):
        thin(torch.rand(4, 3), 0.0)
    monkeypatch.setitem(sys.modules, "scipy.spatial", None)
    with pytest.raises(MissingDependency, match="pip install scipy"):
        thin(torch.rand(4, 3), 0.2)
