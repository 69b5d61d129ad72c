"""Whether a profile was shown to help: what `hess-patch verify` measured, and the verdict that follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .exceptions import ProfileError
from .scoring import Scoring
from .student import t_interval, t_quantile

OUTCOMES = ("helps", "harms", "mixed", "undecided")
VERIFIED = ("hess", "harm")  # allocations that a profile may be verified with
METRICS = ("auc30", "auc5", "point_error")
LEVEL = 0.95  # of all tested metrics together
MIN_SCENES = 8  # fewer say too little about their own spread to judge by
MOST_SCENES = 10_000  # a difference that needs more matters to nobody
_CHANCE = 0.8416  # normal quantile of 0.8: so likely the number of scenes given as enough is enough


@dataclass(frozen=True)
class _Tested:
    """How a metric that the outcome goes by is shown, and the sign of a better one."""

    title: str
    unit: str
    factor: float
    decimals: int
    better: int

    def show(self, value: float) -> str:
        return f"{value * self.factor:+.{self.decimals}f}"


# Not auc5: each further metric widens every interval, and what it sees is a part of AUC@30.
TESTED = {
    "auc30": _Tested("AUC@30", " points", 100.0, 2, +1),
    "point_error": _Tested("point error", "", 1.0, 4, -1),
}


@dataclass(frozen=True)
class Difference:
    """One metric with budgets by the profile minus the same with uniform budgets, paired by scene.

    Attributes:
        mean: over the scenes that have the metric; NaN without one.
        error: standard error of the mean; NaN for fewer than two scenes.
        scenes: how many have the metric.
    """

    mean: float
    error: float
    scenes: int

    def scenes_needed(self, level: float) -> int | None:
        """About how many scenes would show a difference of this size at `level`, four times in five; None: too many.

        Takes mean and spread to stay as they are.
        """
        spread = self.error * math.sqrt(self.scenes)

        def enough(n: int) -> bool:
            return abs(self.mean) >= (t_quantile(level, n - 1) + _CHANCE) * spread / math.sqrt(n)

        if self.mean == 0.0 or not enough(MOST_SCENES):
            return None
        low, high = MIN_SCENES - 1, MOST_SCENES  # not enough or not asked; enough
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high


@dataclass(frozen=True)
class Verification:
    """A profile's budgets against uniform ones at one sparsity, on scenes it was not calibrated on.

    A metric is *better* or *worse* where the interval of its paired difference to uniform does not hold 0. The
    intervals are Student's t, two-sided. AUC@30 and the point error are two chances to find a difference by mere
    luck, so each interval is taken at 97.5 % (Bonferroni): no more than one in twenty profiles that change neither is
    then given another outcome than ``undecided``, if differences of scenes are about normal. Where a few scenes
    differ far more than the rest, few scenes mislead more often; 20 or more are advised.

    ``helps``: something is better and nothing worse; ``harms``: something is worse and nothing better; ``mixed``: both;
    ``undecided``: neither. A metric that fewer than `MIN_SCENES` scenes have is not tested, nor one that a scene has
    with one kind of budgets alone; where none is, the outcome is ``undecided``.

    Attributes:
        sparsity: asked for.
        measured: sparsity measured, by arm ``uniform`` and `allocation`.
        scoring: the score that made the budgets, its camera weight filled in.
        block_q: patch queries in a block.
        block_k: patch keys in a block.
        scenes: number of held-out scenes.
        views: least and most images of a scene.
        data: where the scenes are from, in words.
        means: of `METRICS` over the scenes, by arm (`arms`); NaN where not known. AUC is 0 to 1, the point error in
            units of the normalised scene.
        differences: `allocation` minus ``uniform`` of each metric in `TESTED`.
        traces: `traces_digest` of the profile.
        fingerprint: `weights_fingerprint` of the model that was measured.
        machine: as `describe_machine` tells it.
        versions: of this package and of torch.
        date: when, ISO 8601.
        allocation: how the profile divided budgets: ``hess`` or ``harm``.
        selection: how blocks were chosen, in all arms alike: `Settings.selection`.
        harm: `harm_digest` of the profile where budgets went by harm; None where they did not.
    """

    sparsity: float
    measured: Mapping[str, float]
    scoring: Scoring
    block_q: int
    block_k: int
    scenes: int
    views: tuple[int, int]
    data: str
    means: Mapping[str, Mapping[str, float]]
    differences: Mapping[str, Difference]
    traces: str
    fingerprint: str
    machine: str
    versions: Mapping[str, str]
    date: str
    allocation: str = "hess"
    selection: str = "mass"
    harm: str | None = None

    def __post_init__(self) -> None:
        counts = (self.block_q, self.block_k, self.scenes, *self.views)
        for name, right in (
            ("sparsity", 0.0 < self.sparsity < 1.0),
            ("allocation", self.allocation in VERIFIED),
            ("selection", bool(self.selection)),
            ("harm", bool(self.harm) == (self.allocation == "harm") and self.harm != ""),
            ("measured", set(self.measured) == set(self.arms[1:]) and all(0 <= s <= 1 for s in self.measured.values())),
            ("scoring", self.scoring.camera_weight is not None),
            ("block_q, block_k, scenes or views", all(type(n) is int and n >= 1 for n in counts)),
            ("views", len(self.views) == 2),
            ("means", set(self.means) == set(self.arms) and all(set(m) == set(METRICS) for m in self.means.values())),
            ("means", not any(math.isinf(value) for means in self.means.values() for value in means.values())),
            ("differences", set(self.differences) == set(TESTED)),
            ("differences", all(_possible(d, self.scenes) for d in self.differences.values())),
        ):
            if not right:
                raise ProfileError(f"a verification with {name} missing or out of range was given; verify again.")

    @property
    def setting(self) -> tuple[Any, ...]:
        """What a newer verification has in common with the one it replaces."""
        blocks = (self.block_q, self.block_k, self.selection)
        return (self.sparsity, self.allocation, self.scoring, *blocks, self.fingerprint)

    @property
    def arms(self) -> tuple[str, str, str]:
        """What was compared: the dense model, uniform budgets, the profile's."""
        return ("dense", "uniform", self.allocation)

    @property
    def tested(self) -> dict[str, Difference]:
        """The differences that the outcome goes by."""
        return {name: d for name, d in self.differences.items() if d.scenes >= MIN_SCENES}

    @property
    def level(self) -> float:
        """Confidence of each interval, so that all of them hold with `LEVEL` together."""
        return 1.0 - (1.0 - LEVEL) / max(len(self.tested), 1)

    def interval(self, metric: str) -> tuple[float, float]:
        """Interval of one difference at `level`; NaN for fewer than two scenes."""
        difference = self.differences[metric]
        return t_interval(difference.mean, difference.error, difference.scenes, self.level)

    def direction(self, metric: str) -> int:
        """1 where a metric is better than with uniform budgets, -1 where it is worse, 0 where that was not shown."""
        low, high = self.interval(metric)
        if metric not in self.tested or low <= 0.0 <= high:
            return 0
        return TESTED[metric].better * (1 if low > 0.0 else -1)

    @property
    def outcome(self) -> str:
        """``helps``, ``harms``, ``mixed`` or ``undecided``."""
        found = {self.direction(metric) for metric in TESTED} - {0}
        if len(found) != 1:
            return "mixed" if found else "undecided"
        return "helps" if found == {1} else "harms"

    @property
    def scenes_needed(self) -> int | None:
        """About how many scenes would decide, if the differences stay as they are; None where that cannot be told."""
        found = [d.scenes_needed(self.level) for d in self.tested.values()]
        return min((n for n in found if n is not None), default=None)

    @property
    def text(self) -> str:
        """The verdict with its numbers, in a sentence."""
        where = f"at sparsity {self.sparsity:g} on {self.scenes} held-out scene{'s' * (self.scenes != 1)}"
        if not self.tested:
            return (
                f"undecided {where}: too few to tell whether the profile helps; give at least {MIN_SCENES}, better 20, "
                "that have true cameras."
            )
        sure = f"intervals that hold together with {LEVEL:.0%}" if len(self.tested) > 1 else f"{LEVEL:.0%} interval"
        text = f"{self.outcome} {where}: against uniform budgets {self._numbers()}; {sure}"
        return f"{text}{self._advice() if self.outcome == 'undecided' else ''}."

    def _numbers(self) -> str:
        parts = []
        for metric in self.tested:
            shown, (low, high) = TESTED[metric], self.interval(metric)
            said = ("not shown to differ", "better", "worse")[self.direction(metric)]
            parts.append(
                f"{shown.title} {shown.show(self.differences[metric].mean)}{shown.unit} "
                f"({shown.show(low)} to {shown.show(high)}, {said})"
            )
        return ", ".join(parts)

    def _advice(self) -> str:
        needed = self.scenes_needed
        if needed is not None:
            return f"; about {_two_digits(needed)} scenes would decide if the differences stay as they are"
        if all(d.mean == d.error == 0.0 for d in self.tested.values()):
            return "; no scene showed any difference"
        return f"; {MOST_SCENES} scenes would not show differences as small as these"


def _possible(difference: Difference, scenes: int) -> bool:
    if type(difference.scenes) is not int or not 0 <= difference.scenes <= scenes:
        return False
    known = math.isfinite(difference.mean) or difference.scenes < 1
    return known and (0.0 <= difference.error < math.inf or difference.scenes < 2)


def _two_digits(count: int) -> int:
    """Round up to two leading digits: an estimate has no more."""
    unit = 10 ** max(len(str(count)) - 2, 0)
    return math.ceil(count / unit) * unit
