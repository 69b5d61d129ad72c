"""Two scores compared: ranks as SciPy has them, ties by lot, and profiles that cannot be compared refused."""

from __future__ import annotations

import dataclasses
import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor

from hess_plugin import Profile, ProfileError, ProfileMismatch
from hess_plugin.agreement import compare_profiles, default_top, spearman, top_overlap, total_variation
from hess_plugin.scoring import ERROR_NAMES, Scoring
from hess_plugin.sites import PROJECTIONS

# Few distinct values, so that ties are common; and many, so that they are not.
VALUES = st.one_of(st.integers(0, 3).map(float), st.floats(0, 1, allow_subnormal=False))
PAIRS = st.integers(1, 7).flatmap(
    lambda n: st.tuples(st.lists(VALUES, min_size=n, max_size=n), st.lists(VALUES, min_size=n, max_size=n))
)


@settings(max_examples=300, deadline=None)
@given(PAIRS)
def test_spearman_is_scipys(pair: tuple[list[float], list[float]]) -> None:
    found = spearman(*(torch.tensor(values, dtype=torch.float64) for values in pair)).item()
    if any(len(set(values)) == 1 for values in pair):
        assert found != found  # no order to correlate
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = spearmanr(*pair).statistic
    assert found == pytest.approx(wanted, abs=1e-12)


def lots(values: list[float], top: int) -> list[set[int]]:
    """The `top` largest, for every order in which ties may be broken."""
    orders = itertools.permutations(range(len(values)))
    return [set(sorted(range(len(values)), key=lambda i: (-values[i], order[i]))[:top]) for order in orders]


@settings(max_examples=60, deadline=None)
@given(PAIRS.filter(lambda pair: len(pair[0]) <= 5), st.data())
def test_overlap_is_the_mean_over_every_way_to_break_ties(
    pair: tuple[list[float], list[float]], data: st.DataObject
) -> None:
    top = data.draw(st.integers(1, len(pair[0])))
    found = top_overlap(*(torch.tensor(values, dtype=torch.float64) for values in pair), top).item()
    chosen = [lots(values, top) for values in pair]
    shares = [len(a & b) / top for a in chosen[0] for b in chosen[1]]
    assert found == pytest.approx(sum(shares) / len(shares), abs=1e-12)


def test_rows_are_compared_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(5, (3, 2, 6), generator=generator).double() for _ in range(2))
    first[2, 1, 3] = torch.nan
    for function in (spearman, lambda a, b: top_overlap(a, b, 2)):
        batched = function(first, second)
        assert batched.shape == (3, 2) and bool(batched[2, 1].isnan()) and batched.isnan().sum() == 1
        for index in itertools.product(range(3), range(2)):
            assert torch.equal(batched[index], function(first[index], second[index])) or index == (2, 1)


@given(PAIRS)
def test_total_variation_is_the_budget_that_moves(pair: tuple[list[float], list[float]]) -> None:
    first, second = ([value + 0.1 for value in values] for values in pair)
    first, second = ([value / sum(values) for value in values] for values in (first, second))
    found = total_variation(*(torch.tensor(values, dtype=torch.float64) for values in (first, second))).item()
    gained = sum(max(b - a, 0.0) for a, b in zip(first, second, strict=True))
    assert found == pytest.approx(gained, abs=1e-12) and -1e-12 <= found <= 1


@pytest.mark.parametrize("top", [0, 5, -1])
def test_a_top_that_is_no_number_of_heads_is_told(top: int) -> None:
    with pytest.raises(ProfileError, match=rf"top is {top}, wanted a number of heads from 1 to 4"):
        top_overlap(torch.rand(4), torch.rand(4), top)


def test_a_quarter_of_the_heads_counts_as_top() -> None:
    assert [default_top(heads) for heads in (1, 3, 4, 8, 12, 16)] == [1, 1, 1, 2, 3, 4]


# ---------------------------------------------------------------- two profiles


def profile_of(seed: int, scenes: int = 3, layers: int = 2, heads: int = 8, name: str = "s") -> Profile:
    generator = torch.Generator().manual_seed(seed)
    traces: dict[str, Tensor] = {
        f"{error}.{projection}": torch.rand(scenes, layers, heads, dtype=torch.float64, generator=generator)
        for error in ERROR_NAMES
        for projection in PROJECTIONS
    }
    sites = tuple(f"aggregator.global_blocks.{i}.attn" for i in range(layers))
    return Profile("vggt", sites, heads, tuple(f"{name}{i}" for i in range(scenes)), traces, 0.5, "a" * 16)


def test_a_profile_agrees_with_itself() -> None:
    profile = profile_of(0)
    same = compare_profiles(profile, dataclasses.replace(profile, scenes=("x", "y", "z")))
    one = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(same.spearman, one)
    torch.testing.assert_close(same.overlap, one)
    assert not same.moved.any() and same.notes == () and same.top == 2
    uniform = (profile.scores() - 1 / 8).abs().sum(1) / 2
    torch.testing.assert_close(same.from_uniform, torch.stack([uniform, uniform]))


def test_the_numbers_are_of_the_scores_asked_for() -> None:
    first, second = profile_of(0), profile_of(1, scenes=5, name="t")
    found = compare_profiles(first, second, Scoring(0.2, "k", "log"), top=3)
    scores = first.scores(0.2, "k", "log"), second.scores(0.2, "k", "log")
    assert all(torch.equal(a, b) for a, b in zip(found.scores, scores, strict=True))
    assert torch.equal(found.spearman, spearman(*scores)) and torch.equal(found.overlap, top_overlap(*scores, 3))
    assert torch.equal(found.moved, total_variation(*scores)) and found.sites == first.sites


def test_what_differs_without_harm_is_noted() -> None:
    first = profile_of(0)
    other = dataclasses.replace(profile_of(1), fingerprint="b" * 16, camera_weight=0.25, adapter="mine")
    notes = " ".join(compare_profiles(first, other).notes)
    for words in (f"different weights ({'a' * 16}, {'b' * 16})", "own camera weight (0.5, 0.25)", "(vggt, mine)"):
        assert words in notes
    assert "3 scene names are in both" in notes and "ground truth" not in notes
    own = dataclasses.replace(first, metadata={**first.metadata, "target": "self"})
    assert "calibrated without ground truth" in " ".join(compare_profiles(first, own).notes)
    assert "ground truth" not in " ".join(compare_profiles(own, own).notes)
    assert "camera weight" not in " ".join(compare_profiles(first, other, Scoring(0.5)).notes)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"layers": 3}, "the first profile has 2 sites, the second 3; only profiles of the same model"),
        ({"heads": 4}, "the first profile has 8 heads a site, the second 4"),
    ],
)
def test_profiles_of_other_models_are_refused(change: dict[str, int], sentence: str) -> None:
    with pytest.raises(ProfileMismatch, match=sentence):
        compare_profiles(profile_of(0), profile_of(0, **change))


def test_the_first_site_that_differs_is_named() -> None:
    first = profile_of(0)
    other = dataclasses.replace(first, sites=(first.sites[0], "decoder.1.attn"))
    with pytest.raises(ProfileMismatch, match=r"site 1 is 'aggregator\.global_blocks\.1\.attn' in the first profile"):
        compare_profiles(first, other)
