"""What a score owes to the choice of scenes: resampling against loops, halves, and a verdict that comes true."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hess_plugin import Profile, ProfileError
from hess_plugin.agreement import spearman, top_overlap, total_variation
from hess_plugin.scoring import ERROR_NAMES, NORMALISATIONS, Scoring
from hess_plugin.sites import PROJECTIONS
from hess_plugin.stability import (
    bootstrap,
    half_splits,
    resamples,
    sampled_scores,
    scenes_behind,
    spearman_brown,
    split_half,
)
from hess_plugin.verdict import THRESHOLD, _two_digits, judge


def profile_of(camera: Tensor, points: Tensor, camera_weight: float = 0.5) -> Profile:
    """A profile with these traces ``[scenes, L, H]`` for every projection."""
    scenes, layers, heads = camera.shape
    return Profile(
        adapter="vggt",
        sites=tuple(f"aggregator.global_blocks.{i}.attn" for i in range(layers)),
        num_heads=heads,
        scenes=tuple(f"scene {i}" for i in range(scenes)),
        traces={f"{e}.{p}": t for e, t in zip(ERROR_NAMES, (camera, points), strict=True) for p in PROJECTIONS},
        camera_weight=camera_weight,
        fingerprint="0123456789abcdef",
    )


def random_profile(seed: int, scenes: int, layers: int = 2, heads: int = 4, missing: float = 0.3) -> Profile:
    """Any traces; some scenes lack an error."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.rand(2, scenes, layers, heads, dtype=torch.float64, generator=generator) ** 4
    both[torch.rand(2, scenes, generator=generator) < missing] = torch.nan
    return profile_of(both[0], both[1])


def drawn(scenes: int, noise: float, spread: float, seed: int, heads: int = 12) -> Profile:
    """Scenes of one model: the true sensitivities of its heads, times noise of each scene and head."""
    generator = torch.Generator().manual_seed(99)
    truth = (spread * torch.randn(6, heads, dtype=torch.float64, generator=generator)).exp()
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, scenes, 6, heads, dtype=torch.float64, generator=generator)
    both = truth * (noise * both).exp()
    return profile_of(both[0], both[1])


def subset(profile: Profile, picks: list[int]) -> Profile:
    """The profile of these scenes, some perhaps several times."""
    traces = {name: trace[picks] for name, trace in profile.traces.items()}
    return profile_of(traces["camera.q"], traces["points.q"], profile.camera_weight)


def scores_or_nan(profile: Profile, scoring: Scoring) -> Tensor:
    try:
        return profile.scores(scoring.camera_weight, normalisation=scoring.normalisation)
    except ProfileError:
        return torch.full((len(profile.sites), profile.num_heads), torch.nan, dtype=torch.float64)


SCORINGS = st.builds(
    Scoring, st.sampled_from([None, 0.0, 0.3, 1.0]), st.just("q"), st.sampled_from(NORMALISATIONS), st.just("all")
)


# ---------------------------------------------------------------- resampling


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), SCORINGS)
def test_resampled_scores_are_those_of_the_resampled_profile(seed: int, scenes: int, scoring: Scoring) -> None:
    profile = random_profile(seed, scenes)
    weights = resamples(scenes, 6, seed)
    found = sampled_scores(profile, weights, scoring)
    for draw, counts in enumerate(weights.tolist()):
        picks = [scene for scene, count in enumerate(counts) for _ in range(int(count))]
        torch.testing.assert_close(found[draw], scores_or_nan(subset(profile, picks), scoring), equal_nan=True)


def test_a_resample_draws_as_many_scenes_and_each_equally_often() -> None:
    counts = resamples(4, 20_000, 0)
    assert bool((counts.sum(1) == 4).all()) and torch.equal(counts, counts.round())
    torch.testing.assert_close(counts.mean(0), torch.ones(4, dtype=torch.float64), atol=0.03, rtol=0)
    seen = Counter(map(tuple, counts.tolist()))
    assert len(seen) == 35  # multisets of 4 out of 4
    assert seen[(1.0, 1.0, 1.0, 1.0)] / 20_000 == pytest.approx(math.factorial(4) / 4**4, abs=0.01)
    assert torch.equal(resamples(4, 50, 3), resamples(4, 50, 3)) and not torch.equal(counts[:50], resamples(4, 50, 3))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), SCORINGS, st.sampled_from([0.5, 0.9, 0.95]))
def test_intervals_are_percentiles_and_noise_is_the_budget_moved(
    seed: int, scenes: int, scoring: Scoring, level: float
) -> None:
    profile = random_profile(seed, scenes)
    full = scores_or_nan(profile, scoring)
    if full.isnan().any():
        with pytest.raises(ProfileError, match="no gradient"):
            bootstrap(profile, scoring, draws=9)
        return
    found = bootstrap(profile, scoring, draws=40, seed=seed, level=level)
    samples = sampled_scores(profile, resamples(scenes, 40, seed), scoring)
    known = samples[~samples.isnan().any(2).any(1)]
    for layer, head in itertools.product(range(2), range(4)):
        values = sorted(known[:, layer, head].tolist())
        for end, quantile in ((found.low, (1 - level) / 2), (found.high, (1 + level) / 2)):
            place = quantile * (len(values) - 1)
            below, above = values[math.floor(place)], values[math.ceil(place)]
            wanted = below + (place - math.floor(place)) * (above - below)
            if scenes_behind(profile, scoring) < 2:
                assert bool(end.isnan().all())
            else:
                assert end[layer, head].item() == pytest.approx(wanted, abs=1e-12)
        moved = [total_variation(sample[layer], full[layer]).item() for sample in known]
        assert found.noise[layer].item() == pytest.approx(sum(moved) / len(moved), abs=1e-12)
    assert found.draws == 40 and found.level == level


def test_a_bootstrap_is_repeatable_and_its_seed_matters() -> None:
    profile = drawn(6, 0.5, 1.0, seed=0)
    one, same, other = (bootstrap(profile, draws=200, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.low, same.low) and torch.equal(one.noise, same.noise)
    assert not torch.equal(one.low, other.low)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    truth = drawn(4000, 0.6, 1.0, seed=0).scores()
    held = [
        ((b.low <= truth) & (truth <= b.high)).double().mean().item()
        for b in (bootstrap(drawn(30, 0.6, 1.0, seed=seed), draws=400) for seed in range(1, 21))
    ]
    assert 0.88 < sum(held) / len(held) < 0.97


@pytest.mark.slow
def test_many_draws_of_a_large_model_are_not_too_large_for_a_quantile() -> None:
    found = bootstrap(drawn(5, 0.5, 1.0, seed=0, heads=30), draws=100_000)  # 18 million numbers
    assert bool((found.low < found.high).all())


def test_a_single_scene_has_no_interval() -> None:
    found = bootstrap(random_profile(0, 1, missing=0.0))
    assert bool(found.low.isnan().all() & found.high.isnan().all()) and not found.noise.any()


@pytest.mark.parametrize("options", [{"draws": 0}, {"level": 0.0}, {"level": 1.0}, {"level": float("nan")}])
def test_impossible_bootstraps_are_told(options: dict[str, float]) -> None:
    with pytest.raises(ProfileError, match="wanted at least 1 draw and a level between 0 and 1"):
        bootstrap(random_profile(0, 3, missing=0.0), **options)  # type: ignore[arg-type]


def test_the_scenes_behind_a_score_are_those_with_its_rarest_error() -> None:
    camera, points = torch.rand(2, 5, 2, 4, dtype=torch.float64)
    points[1:4] = torch.nan
    profile = profile_of(camera, points)
    assert [scenes_behind(profile, Scoring(weight)) for weight in (None, 0.0, 1.0)] == [2, 2, 5]
    points[:] = torch.nan
    assert scenes_behind(profile_of(camera, points)) == 5  # an error nobody has plays no part


# ---------------------------------------------------------------- halves


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), SCORINGS, st.integers(1, 4))
def test_halves_are_scored_apart(seed: int, scenes: int, scoring: Scoring, top: int) -> None:
    profile = random_profile(seed, scenes)
    if scores_or_nan(profile, scoring).isnan().any():
        with pytest.raises(ProfileError, match="no gradient"):
            split_half(profile, scoring)
        return
    found = split_half(profile, scoring, top=top, splits=7, seed=seed)
    ranks, shares = [], []
    for half in half_splits(scenes, 7, seed).tolist():
        picks = [[i for i in range(scenes) if half[i] == side] for side in (True, False)]
        one, other = (scores_or_nan(subset(profile, part), scoring) for part in picks)
        ranks.append(spearman(one, other))
        shares.append(top_overlap(one, other, top))
    for mine, wanted in ((found.spearman, ranks), (found.overlap, shares)):
        torch.testing.assert_close(mine, torch.stack(wanted).nanmean(0), equal_nan=True)
    assert found.mean_spearman == pytest.approx(found.spearman.nanmean().item(), nan_ok=True)
    assert found.mean_overlap == pytest.approx(found.overlap.nanmean().item(), nan_ok=True)


@pytest.mark.parametrize("scenes", [2, 3, 4, 7])
def test_every_half_is_a_half_and_every_choice_comes(scenes: int) -> None:
    halves = half_splits(scenes, 3000, 0)
    assert bool((halves.sum(1) == scenes // 2).all())
    assert len({tuple(half) for half in halves.tolist()}) == math.comb(scenes, scenes // 2)


def test_spearman_brown_predicts_what_all_scenes_reach() -> None:
    """Against as many other scenes of the same model, which a user does not have."""
    found, wanted = [], []
    for seed in range(24):
        one, other = drawn(20, 0.6, 0.3, 2 * seed + 1), drawn(20, 0.6, 0.3, 2 * seed + 2)
        found.append(split_half(one).mean_expected)
        wanted.append(spearman(one.scores(), other.scores()).mean().item())
    assert sum(found) / 24 == pytest.approx(sum(wanted) / 24, abs=0.03) and 0.8 < sum(wanted) / 24 < 0.95


def test_spearman_brown_of_known_halves() -> None:
    half = torch.tensor([1.0, 0.5, 0.0, -0.3, -1.0])
    torch.testing.assert_close(spearman_brown(half), torch.tensor([1.0, 2 / 3, 0.0, 0.0, 0.0]))


def test_a_single_scene_has_no_halves() -> None:
    found = split_half(random_profile(0, 1, missing=0.0))
    assert math.isnan(found.mean_spearman) and math.isnan(found.mean_overlap) and math.isnan(found.mean_expected)
    with pytest.raises(ProfileError, match="splits is 0, wanted at least 1"):
        split_half(random_profile(0, 4, missing=0.0), splits=0)


# ---------------------------------------------------------------- verdict


def test_the_verdict_is_the_comparison_it_describes() -> None:
    for noise, spread in ((0.3, 1.0), (1.0, 0.5), (1.0, 0.2)):
        profile = drawn(12, noise, spread, seed=5)
        sample = bootstrap(profile, draws=500)
        found = judge(profile, None, sample)
        effect = (profile.scores() - 1 / 12).abs().sum(1).mean().item() / 2
        moved = sample.noise.mean().item() * math.sqrt(12 / 11)
        left = math.sqrt(effect**2 - moved**2)
        assert found.effect == pytest.approx(effect) and found.noise == pytest.approx(moved) and found.scenes == 12
        assert found.needed == math.ceil(12 * (moved / (THRESHOLD * left)) ** 2)
        assert found.enough == (moved <= THRESHOLD * left) == (found.needed <= 12)
        assert f"{moved:.1%} of a layer's budget" in found.text and f"{effect:.1%} away from equal" in found.text
        assert found.text.startswith("enough scenes" if found.enough else "more scenes are needed")
        assert ("About" in found.text) == (not found.enough)


def test_an_estimate_is_named_with_two_digits_and_never_too_low() -> None:
    assert [_two_digits(count) for count in (7, 25, 99, 101, 123, 7646)] == [7, 25, 99, 110, 130, 7700]


@pytest.mark.parametrize("scenes", [8, 24])
def test_the_number_of_scenes_that_it_names_is_about_enough(scenes: int) -> None:
    named = [judge(drawn(scenes, 1.0, 0.4, seed)).needed for seed in range(1, 11)]
    assert all(number is not None and number > scenes for number in named)
    middle = sorted(number for number in named if number is not None)[5]
    found = [judge(drawn(middle, 1.0, 0.4, seed)) for seed in range(20, 26)]
    ratio = sum(v.noise / math.sqrt(v.effect**2 - v.noise**2) for v in found) / len(found)
    assert ratio == pytest.approx(THRESHOLD, rel=0.25)


@pytest.mark.parametrize("scenes", [1, 2, 3])
def test_few_scenes_cannot_tell(scenes: int) -> None:
    found = judge(drawn(scenes, 0.1, 1.0, seed=0))
    counted = "1 scene is" if scenes == 1 else f"{scenes} scenes are"
    assert found.enough is None and found.needed is None and found.scenes == scenes
    assert found.text.startswith(f"cannot tell: {counted} too few") and "4 or more" in found.text


def test_scenes_without_the_error_do_not_count() -> None:
    camera, points = drawn(8, 0.1, 1.0, 0).traces["camera.q"], drawn(8, 0.1, 1.0, 1).traces["points.q"].clone()
    points[:6] = torch.nan
    assert judge(profile_of(camera, points, 0.0)).enough is None
    assert judge(profile_of(camera, points, 1.0)).enough is True


def test_heads_that_do_not_differ_are_not_called_enough() -> None:
    same = torch.ones(6, 2, 4, dtype=torch.float64)
    found = judge(profile_of(same, same))
    assert found.enough is False and found.needed is None and "no difference between heads was found" in found.text
    chance = judge(drawn(16, 1.0, 0.0, seed=1))
    assert chance.enough is False and (chance.needed is None or chance.needed > 200)
