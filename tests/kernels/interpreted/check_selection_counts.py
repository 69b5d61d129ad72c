"""Counts by cumulative probability: those of the CPU, except where a sum is within rounding of the threshold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from selection_problems import cleaned, hard_rows, padded
from torch import Tensor

from hess_plugin.sparsity.ranking import covering_counts
from hess_plugin_cuda.triton_selection import launch, shapes

# Infinite and huge scores: the interpreter computes with numpy, which warns of what a GPU is asked to do.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")

ROUNDING = 2e-6
SLACK = 1e-5


def counted(scores: Tensor, share: float, least: int, device: torch.device) -> Tensor:
    wide = padded(scores, device)
    counts = torch.full((len(scores),), -7, device=device)
    launch.count(wide[:2], scores.shape[1], 0, counts, share, least)
    launch.count(wide[2:], scores.shape[1], 2, counts, share, least)
    return counts.cpu()


def check(scores: Tensor, threshold: float, least: int, device: torch.device) -> int:
    """Compare counts; returns how many rows differ, each for a sum within rounding."""
    share = threshold + SLACK
    probabilities = cleaned(scores).softmax(-1).nan_to_num(0.0)
    wanted, given_counts = covering_counts(probabilities, share, least), counted(scores, share, least, device)
    sums = probabilities.double().sort(-1, descending=True).values.cumsum(-1)
    different = (wanted != given_counts).nonzero().flatten().tolist()
    for row in different:
        low, high = sorted((int(wanted[row]), int(given_counts[row])))
        assert (sums[row, low:high] - share).abs().max() <= ROUNDING, (row, low, high)
    return len(different)


@pytest.mark.parametrize("columns", [1, 2, 33, 100])
def test_hard_rows(columns: int, device: torch.device) -> None:
    for threshold, least in ((0.6, min(2, columns)), (1.0, 1)):
        check(hard_rows(columns), threshold, least, device)


def test_hard_rows_in_pieces(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "LONGEST_ROW", 16)
    monkeypatch.setattr(shapes, "_PIECE", 64)
    assert not shapes.row_shape(75).whole
    check(hard_rows(75, seed=1), 0.7, 2, device)


def test_away_from_the_threshold_nothing_differs(device: torch.device) -> None:
    scores = torch.randn(12, 90, generator=torch.Generator().manual_seed(0)) * 2
    assert check(scores, 0.7, 1, device) == 0


def test_ties_are_counted_one_by_one(device: torch.device) -> None:
    even = torch.full((3, 8), 0.3)
    assert counted(even, 0.5 + SLACK, 1, device).tolist() == [4, 4, 4]  # the fourth stays within the slack
    assert counted(even, 0.49 + SLACK, 1, device).tolist() == [3, 3, 3]
    assert counted(even, 1.0 + SLACK, 1, device).tolist() == [8, 8, 8]
    assert counted(even, 0.0 + SLACK, 2, device).tolist() == [2, 2, 2]


def test_rows_without_probabilities_keep_everything(device: torch.device) -> None:
    scores = torch.tensor([[float("nan")] * 5, [float("-inf")] * 5, [1.0, 2.0, float("inf"), 0.0, 0.0]])
    assert counted(scores, 0.5, 1, device).tolist() == [5, 5, 5]


@given(
    rows=st.lists(st.lists(st.floats(-60, 60, width=32), min_size=12, max_size=12), min_size=3, max_size=4),
    threshold=st.sampled_from([0.25, 0.5, 0.9]) | st.floats(0, 1),
    least=st.integers(1, 12),
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_floats(rows: list[list[float]], threshold: float, least: int, device: torch.device) -> None:
    check(torch.tensor(rows), threshold, least, device)
