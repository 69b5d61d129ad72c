"""Rows turn one way, arms keep their identity, and matching finds its target."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hess_plugin import PatchError
from hess_plugin.evaluation.arms import PAPER_ROWS, Arm, Row, scene_seed
from hess_plugin.evaluation.matching import next_knob

SHARES = st.floats(0.01, 0.99)
ROWS = st.one_of(
    st.builds(Row, SHARES),
    st.builds(Row, st.none(), SHARES, st.one_of(st.none(), SHARES)),
    st.builds(Row, st.none(), st.none(), SHARES),
)


def keeps_at_least(first: Row, second: Row) -> bool:
    """Whether the first rule keeps every block that the second keeps, whatever the input."""
    if first.sparsity is not None and second.sparsity is not None:
        return first.sparsity <= second.sparsity
    ratios = [1.0 if row.sparse_ratio is None else row.sparse_ratio for row in (first, second)]
    masses = [0.0 if row.cdf_threshold is None else row.cdf_threshold for row in (first, second)]
    return ratios[0] <= ratios[1] and masses[0] >= masses[1]


@given(ROWS, st.floats(0, 2), st.floats(0, 2))
def test_a_larger_knob_never_keeps_more(row: Row, first: float, second: float) -> None:
    low, high = sorted((first, second))
    assert keeps_at_least(row.turned(low), row.turned(high))


@given(ROWS)
def test_a_row_turned_to_its_own_knob_is_itself(row: Row) -> None:
    turned = row.turned(row.knob)
    for name in ("sparsity", "sparse_ratio", "cdf_threshold"):
        mine, own = getattr(turned, name), getattr(row, name)
        assert (mine is None) == (own is None) and (own is None or mine == pytest.approx(own, abs=1e-12))
    low, high = row.knob_range
    assert low <= row.knob <= high


def test_a_row_is_one_kind_of_rule() -> None:
    for wrong in ({}, {"sparsity": 0.5, "sparse_ratio": 0.5}, {"sparsity": 0.5, "cdf_threshold": 0.5}):
        with pytest.raises(PatchError, match="either a sparsity or rho"):
            Row(**wrong)


def test_the_papers_rows_are_in_order_of_its_tables() -> None:
    assert len(PAPER_ROWS) == len({row.label for row in PAPER_ROWS}) == 16
    assert PAPER_ROWS[0].label == "rho 0.1 tau 0.97" and PAPER_ROWS[-1].label == "rho 0.8 tau 0.4"


def test_arms_say_what_they_are() -> None:
    assert Arm("dense").dense and not Arm("dense").guided
    assert Arm("hess", 0.5, "hess").guided and not Arm("equal", 0.5, "equal").guided
    pruned = Arm("kwon", pruning="kwon").set_to(0.25, Row(sparse_ratio=0.5))
    assert not pruned.dense and not pruned.guided and pruned.label == "rho 0.5" and pruned.knob == 0.25
    turned = Arm("hess", allocation="hess").at(PAPER_ROWS[-1], 1.5)
    assert turned.label == PAPER_ROWS[-1].label and turned.knob == 1.5
    assert turned.sparse_ratio == pytest.approx(0.9) and turned.cdf_threshold == 0.0
    own = replace(turned, turned_to=None, group=None).at(PAPER_ROWS[-1])
    assert (own.sparse_ratio, own.cdf_threshold) == (0.8, 0.4) and own.knob == pytest.approx(0.6)


def test_scenes_have_seeds_of_their_own() -> None:
    assert len({scene_seed(f"room-{i}") for i in range(100)}) == 100
    assert scene_seed("room-1") == 3203663878  # the same on every machine


@settings(max_examples=300, deadline=None)
@given(
    start=st.floats(0.05, 0.9),
    target=st.floats(0.05, 0.85),
    bend=st.floats(0.4, 3.0),
    kink=st.floats(0.1, 0.9),
    flat=st.floats(0.1, 1.0),
)
def test_matching_finds_the_target(start: float, target: float, bend: float, kink: float, flat: float) -> None:
    """On curves that bend, and that are flatter beyond a kink, as where tau stops to matter."""

    def measure(knob: float) -> float:
        knob = knob if knob < kink else kink + flat * (knob - kink)
        return min(knob, 0.999) ** bend

    assume(measure(0.0) <= target <= measure(1.999))
    tried = [(start, measure(start))]
    for _ in range(30):
        if abs(tried[-1][1] - target) <= 0.005:
            break
        knob = next_knob(tried, target, 0.0, 1.999)
        assert 0.0 <= knob <= 1.999
        tried.append((knob, measure(knob)))
    assert min(abs(sparsity - target) for _, sparsity in tried) <= 0.005
    assert len(tried) <= 20


def test_an_unreachable_target_ends_at_the_bound() -> None:
    tried = [(0.5, 0.4)]
    for _ in range(30):
        knob = next_knob(tried, 0.9, 0.0, 0.999)
        if knob == tried[-1][0]:
            break
        tried.append((knob, 0.4))
    assert tried[-1][0] == 0.999 and len(tried) < 12


def test_the_label_of_a_row_without_tau() -> None:
    assert Row(cdf_threshold=0.9).label == "tau 0.9" and math.isclose(Row(cdf_threshold=0.9).knob, 0.1)
