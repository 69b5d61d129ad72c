"""What a score owes to the choice of scenes: intervals from resampling them, agreement between halves of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .agreement import default_top, spearman, top_overlap, total_variation
from .exceptions import ProfileError
from .scoring import ERROR_NAMES, Scoring, head_scores, mix, scene_shares

if TYPE_CHECKING:
    from .profiles import Profile

DRAWS = 1000
SPLITS = 200
LEVEL = 0.95


@dataclass(frozen=True)
class Bootstrap:
    """What the scores would have been with other scenes, by drawing the same number of them with replacement.

    Intervals of few scenes are too narrow: a resample cannot show what no scene has.

    Attributes:
        scenes: scenes that the score rests on (see `scenes_behind`).
        draws: resamples drawn.
        level: share of the resamples between `low` and `high`.
        low: lower end of the percentile interval of every head's score, ``[L, H]``; NaN with a single scene, which
            cannot differ from itself.
        high: upper end, ``[L, H]``.
        noise: share of a layer's budget that a resample moves against the full score, mean over draws, ``[L]``.
    """

    scenes: int
    draws: int
    level: float
    low: Tensor
    high: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Halves:
    """How far random halves of the scenes agree.

    Attributes:
        splits: random splits into two halves.
        top: how many heads of a layer count as its most sensitive ones.
        spearman: rank correlation of the heads between halves, mean over splits, ``[L]``.
        overlap: share of the `top` most sensitive heads that both halves have, mean over splits, ``[L]``.
        expected: rank correlation to expect between all scenes and as many others, ``[L]``: Spearman-Brown,
            ``2 r / (1 + r)``, 0 where halves do not agree at all.
        mean_spearman: mean over the layers.
        mean_overlap: mean over the layers.
        mean_expected: Spearman-Brown of `mean_spearman`.
    """

    splits: int
    top: int
    spearman: Tensor
    overlap: Tensor
    expected: Tensor
    mean_spearman: float
    mean_overlap: float
    mean_expected: float


def scenes_behind(profile: Profile, scoring: Scoring | None = None) -> int:
    """Count the scenes that a score rests on: those of the rarest error that the weight selects and any scene has."""
    scoring = (scoring or Scoring()).resolved(profile)
    weight = scoring.camera_weight or 0.0
    counts = [
        int(_measured(profile.scene_traces(error, scoring.projection, scoring.rows)).sum())
        for error, share in zip(ERROR_NAMES, (weight, 1.0 - weight), strict=True)
        if share > 0.0
    ]
    return min((count for count in counts if count), default=0)


def sampled_scores(profile: Profile, weights: Tensor, scoring: Scoring | None = None) -> Tensor:
    """Score the heads as if each scene had been measured a number of times.

    Args:
        profile: the raw traces.
        weights: how often each scene counts, ``[draws, scenes]``, at least 0.
        scoring: which score; the method with the profile's own camera weight by default.

    Returns:
        float64 ``[draws, L, H]``. A draw without any scene of an error is scored by the other error alone, as the
        profile itself would be; NaN in a layer where it has neither.
    """
    scoring = (scoring or Scoring()).resolved(profile)
    assert scoring.camera_weight is not None
    means = []
    for error in ERROR_NAMES:
        traces = profile.scene_traces(error, scoring.projection, scoring.rows).double()
        measured = _measured(traces)
        kept, traces = weights.double()[:, measured], traces[measured]
        counts = kept.sum(1)[:, None, None]
        if scoring.normalisation == "scene":
            traces = scene_shares(traces)
            counts = (kept @ (~traces.isnan().any(-1)).double())[..., None]
            traces = traces.nan_to_num(0.0)
        total = (kept @ traces.flatten(1)).unflatten(1, traces.shape[1:])
        means.append(total / counts)  # 0/0: this draw has no such error
    return mix(means[0], means[1], scoring.camera_weight, scoring.normalisation)


def bootstrap(
    profile: Profile,
    scoring: Scoring | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = LEVEL,
) -> Bootstrap:
    """Draw the scenes again with replacement and see how the scores change (percentile bootstrap).

    Args:
        profile: the raw traces.
        scoring: which score; the method with the profile's own camera weight by default.
        draws: resamples.
        seed: of the draws.
        level: share of the resamples in an interval, between 0 and 1.

    Raises:
        ProfileError: the profile has no such score, `draws` is below 1 or `level` not between 0 and 1.
    """
    if draws < 1 or not 0.0 < level < 1.0:
        raise ProfileError(f"draws is {draws} and level {level}, wanted at least 1 draw and a level between 0 and 1.")
    full = head_scores(profile, scoring)
    scenes = scenes_behind(profile, scoring)
    samples = sampled_scores(profile, resamples(len(profile.scenes), draws, seed), scoring)
    noise = total_variation(samples, full).nanmean(0)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    # Layer by layer: torch.nanquantile refuses more than 16 million numbers at once.
    low, high = torch.stack([layer.nanquantile(ends, dim=0) for layer in samples.unbind(1)], dim=1)
    if scenes < 2:
        low, high = torch.full_like(low, torch.nan), torch.full_like(high, torch.nan)
    return Bootstrap(scenes, draws, level, low, high, noise)


def resamples(scenes: int, draws: int, seed: int) -> Tensor:
    """Count how often each scene is drawn when as many are drawn with replacement: float64 ``[draws, scenes]``."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(scenes, (draws, scenes), generator=generator)
    counts = torch.zeros(draws, scenes, dtype=torch.float64)
    return counts.scatter_add_(1, picks, torch.ones_like(counts))


def half_splits(scenes: int, splits: int, seed: int) -> Tensor:
    """Choose random halves: bool ``[splits, scenes]``, each row with ``scenes // 2`` scenes of the first half."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(splits, scenes, generator=generator).argsort(1).argsort(1) < scenes // 2


def split_half(
    profile: Profile,
    scoring: Scoring | None = None,
    *,
    top: int | None = None,
    splits: int = SPLITS,
    seed: int = 0,
) -> Halves:
    """Score random halves of the scenes apart and compare the order of the heads.

    Spearman-Brown says what all scenes are expected to reach. It is exact for the linear correlation of equal halves
    with independent errors, and is used for ranks as an approximation. With an odd number of scenes the second half has
    one more. A half without any scene of an error is scored by the other one.

    Args:
        profile: the raw traces.
        scoring: which score; the method with the profile's own camera weight by default.
        top: how many heads count as the most sensitive ones; a quarter of the layer by default.
        splits: random splits.
        seed: of the splits.

    Returns:
        Every number is NaN for a profile of a single scene, which has no halves.

    Raises:
        ProfileError: the profile has no such score, `splits` is below 1 or `top` not a number of heads.
    """
    if splits < 1:
        raise ProfileError(f"splits is {splits}, wanted at least 1.")
    head_scores(profile, scoring)
    top = default_top(profile.num_heads) if top is None else top
    first = half_splits(len(profile.scenes), splits, seed)
    one, other = (sampled_scores(profile, half, scoring) for half in (first, ~first))
    ranks, overlap = spearman(one, other).nanmean(0), top_overlap(one, other, top).nanmean(0)
    mean = ranks.nanmean()
    return Halves(
        splits=splits,
        top=top,
        spearman=ranks,
        overlap=overlap,
        expected=spearman_brown(ranks),
        mean_spearman=mean.item(),
        mean_overlap=overlap.nanmean().item(),
        mean_expected=spearman_brown(mean).item(),
    )


def spearman_brown(half: Tensor) -> Tensor:
    """Correlation expected of the whole from that of two halves: ``2 r / (1 + r)``, 0 where r is not above 0."""
    half = half.clamp(min=0)
    return 2 * half / (1 + half)


def _measured(traces: Tensor) -> Tensor:
    """Scenes that have the error of ``[scenes, L, H]`` traces: bool ``[scenes]``."""
    return ~traces.isnan().flatten(1).any(1)
