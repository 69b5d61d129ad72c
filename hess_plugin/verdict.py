"""Whether a profile rests on enough scenes: sampling noise against what the score changes, in a sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .agreement import total_variation
from .scoring import Scoring, head_scores
from .stability import Bootstrap, bootstrap

if TYPE_CHECKING:
    from .profiles import Profile

MIN_SCENES = 4  # fewer say too little about their own spread to judge by
THRESHOLD = 0.25  # of what the score moves, the share that the choice of scenes may move
_NOTHING = 1e-9


@dataclass(frozen=True)
class Verdict:
    """Whether the scenes are enough.

    Attributes:
        enough: None where that cannot be told.
        scenes: scenes that the score rests on.
        noise: share of the budget that the choice of scenes moves, mean over the layers (`Bootstrap.noise`, corrected
            for drawing from the scenes themselves).
        effect: share of the budget that the score moves away from equal shares, mean over the layers.
        needed: about how many scenes would be enough; None where that cannot be told.
        text: the same in one or two sentences.
    """

    enough: bool | None
    scenes: int
    noise: float
    effect: float
    needed: int | None
    text: str


def judge(profile: Profile, scoring: Scoring | None = None, sample: Bootstrap | None = None) -> Verdict:
    """Say whether more scenes are needed.

    The choice of scenes moves a share of every layer's budget between heads (the noise), the score moves a share away
    from equal budgets (the effect); both are total variation distances, averaged over the layers. Part of the effect
    is noise, too, which more scenes would take away; like independent deviations the two are taken to add in squares,
    so ``sqrt(effect^2 - noise^2)`` is left. Scenes are enough when the noise is at most `THRESHOLD` of that. How many
    would be enough assumes that noise falls with the square root of their number. It tends to be a low estimate: few
    scenes understate how much scenes differ, above all where a few of them have much larger gradients than the rest.

    That scenes are enough says that the score would come out much the same with others like them. It does not say that
    budgets by this score beat uniform ones: only measuring both does.

    Args:
        profile: the raw traces.
        scoring: which score; the method with the profile's own camera weight by default.
        sample: of the same profile and scoring, to save drawing it again.

    Raises:
        ProfileError: the profile has no such score.
    """
    sample = sample or bootstrap(profile, scoring)
    score = head_scores(profile, scoring)
    scenes = sample.scenes
    effect = total_variation(score, torch.full_like(score, 1 / profile.num_heads)).mean().item()
    # Drawn from n scenes, means vary by (n - 1) / n of the variance that means of n fresh scenes have.
    noise = sample.noise.nanmean().item() * math.sqrt(scenes / max(scenes - 1, 1))
    left = math.sqrt(max(effect**2 - noise**2, 0.0))
    if scenes < MIN_SCENES:
        counted = "1 scene is" if scenes == 1 else f"{scenes} scenes are"
        text = (
            f"cannot tell: {counted} too few to see how much the score depends on their choice; calibrate on "
            f"{MIN_SCENES} or more (the paper took 40)."
        )
        return Verdict(None, scenes, noise, effect, None, text)
    moved = (
        f"the choice of these {scenes} scenes moves {noise:.1%} of a layer's budget between heads, the score "
        f"{effect:.1%} away from equal budgets ({left:.1%} without what chance adds)"
    )
    if left < _NOTHING:
        text = f"more scenes are needed, if they help at all: {moved}, so no difference between heads was found."
        return Verdict(False, scenes, noise, effect, None, text)
    needed = math.ceil(scenes * (noise / (THRESHOLD * left)) ** 2)
    if needed <= scenes:
        return Verdict(True, scenes, noise, effect, needed, f"enough scenes: {moved}.")
    text = (
        f"more scenes are needed: {moved}. About {_two_digits(needed)} would bring {noise:.1%} down to "
        f"{THRESHOLD:.0%} of {left:.1%}, if chance falls with the square root of their number."
    )
    return Verdict(False, scenes, noise, effect, needed, text)


def _two_digits(count: int) -> int:
    """Round up to two leading digits: an estimate has no more."""
    unit = 10 ** max(len(str(count)) - 2, 0)
    return math.ceil(count / unit) * unit
