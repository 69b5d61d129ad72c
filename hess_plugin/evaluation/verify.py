"""Does a profile help? Its budgets against uniform ones and the dense model, on scenes it was not calibrated on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import pluggy
import torch
from torch import nn

import hess_plugin
from hess_plugin.exceptions import PatchError, SceneError
from hess_plugin.machine import describe_machine
from hess_plugin.plugins import resolve_adapter
from hess_plugin.profiles import Profile, weights_fingerprint
from hess_plugin.scenes.scene import Scene
from hess_plugin.scoring import Scoring, head_scores
from hess_plugin.settings import make_settings
from hess_plugin.verification import METRICS, TESTED, Difference, Verification
from hess_plugin.verified_profiles import harm_digest, traces_digest

from .arms import Arm, Row
from .comparison import compare
from .metrics import MetricSettings
from .records import Measurement

# Neighbours of whole clouds are most of the time of a measurement, and no verdict goes by them.
_WITHOUT_CLOUDS = MetricSettings(clouds=False)


class HeldOut(Sequence[Scene]):
    """Those of some scenes that a profile was not calibrated on, read when they are asked for."""

    def __init__(self, scenes: Sequence[Scene], profile: Profile) -> None:
        """Look at the names; where the scenes tell them without being read, nothing is read.

        Args:
            scenes: any scenes.
            profile: those that it was calibrated on, by name, are left out.

        Raises:
            SceneError: none is left.
        """
        names = list(getattr(scenes, "names", None) or (scene.name for scene in scenes))
        calibrated = set(profile.scenes)
        self._scenes = scenes
        self._kept = [i for i, name in enumerate(names) if name not in calibrated]
        self.names = [names[i] for i in self._kept]
        self.left_out = [name for name in names if name in calibrated]
        if not self._kept:
            raise SceneError(
                f"none of {len(names)} scenes is held out: the profile was calibrated on scenes of these names; give "
                "others, or if these are others, give them names of their own."
            )

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int | slice) -> Scene:  # type: ignore[override]  # a slice has no use here
        """Read one scene."""
        assert isinstance(index, int)
        return self._scenes[self._kept[index]]


@dataclass(frozen=True)
class Verified:
    """What a verification found: one verdict for each sparsity, and every measurement behind them, without clouds."""

    verifications: list[Verification]
    rows: list[Measurement]


def arms_of(sparsities: Sequence[float], allocation: str = "hess") -> list[Arm]:
    """What is compared: the dense model once, uniform budgets and the profile's at each sparsity.

    Args:
        sparsities: the targets.
        allocation: how the profile divides budgets: ``hess`` or ``harm``.

    Raises:
        PatchError: no sparsity, or one at which nothing or everything is dropped.
    """
    for sparsity in sparsities:
        if not 0.0 < sparsity < 1.0:
            raise PatchError(f"sparsity {sparsity} cannot be verified, wanted a number above 0 (dense) and below 1.")
    if not sparsities:
        raise PatchError("no sparsity to verify at was given; give one or several above 0 and below 1.")
    arms = [Arm(name, s, name) for s in dict.fromkeys(sparsities) for name in ("uniform", allocation)]
    return [Arm("dense"), *arms]


def verify(
    model: nn.Module,
    scenes: Sequence[Scene],
    profile: Profile,
    sparsities: Sequence[float] = (0.73,),
    *,
    scoring: Scoring | None = None,
    block_q: int = 128,
    block_k: int = 64,
    selection: Mapping[str, Any] | None = None,
    strict: bool = True,
    data: str = "",
    progress: Callable[[str, str], None] | None = None,
    adapter: str | None = None,
    manager: pluggy.PluginManager | None = None,
) -> Verified:
    """Compare a profile's budgets with uniform ones at the same sparsity, and with the dense model.

    The profile's are those that a patch with it takes: by harm with a preset that goes by it, if there are curves, else
    by score. Blocks are chosen alike in all.

    Nothing is written; `hess_plugin.verified_profiles` puts verdicts into a profile. Those it has already play no part.

    Args:
        model: a model that an adapter claims, unpatched.
        scenes: scenes with true cameras and, for the point error, depth; those that the profile was calibrated on are
            left out by name (see `HeldOut`).
        profile: the profile.
        sparsities: the targets, each above 0 and below 1.
        scoring: which score; the method with the profile's own camera weight by default.
        block_q: patch queries in a block.
        block_k: patch keys in a block.
        selection: arguments of `hess_plugin.patch` that say how blocks are chosen; by the profile's preset by default.
        strict: refuse a profile that was calibrated on other weights.
        data: where the scenes are from, to be recorded.
        progress: called as ``progress(scene, arm)`` before each run.
        adapter: take this adapter instead of asking which one claims the model.
        manager: plugin manager; a fresh one by default.

    Raises:
        PatchError: a sparsity that cannot be verified, or too few blocks for anything to be dropped.
        ProfileError, ProfileMismatch: the profile is not this model's or has no such score.
        SceneError: no scene is left, or one has no true cameras.
    """
    arms_of(sparsities)  # what cannot be verified is told first
    blocks = {"block_q": block_q, "block_k": block_k, **(selection or {})}
    settings = make_settings(profile=profile, **blocks)  # alike at every plain sparsity
    arms = arms_of(sparsities, settings.allocation)
    scoring = (scoring or Scoring()).resolved(profile)
    head_scores(profile, scoring)
    held_out = HeldOut(scenes, profile)
    fingerprint = weights_fingerprint(resolve_adapter(model, adapter, manager).sites(model))
    views: list[int] = []

    def counted() -> Iterator[Scene]:
        for index in range(len(held_out)):
            scene = held_out[index]
            yield scene
            views.append(scene.views)

    rows = compare(
        model,
        counted(),
        arms,
        profile=profile,
        metrics=_WITHOUT_CLOUDS,
        progress=progress,
        adapter=adapter,
        manager=manager,
        strict=strict,
        **blocks,
        **asdict(scoring),
    )
    found = []
    for sparsity in dict.fromkeys(sparsities):
        columns = _columns(rows, sparsity, settings.allocation)
        measured = {
            arm: statistics.fmean(row.sparsity for row in columns[arm].values())
            for arm in ("uniform", settings.allocation)
        }
        if min(measured.values()) == 0.0:
            raise PatchError(
                f"at sparsity {sparsity:g} nothing was dropped, so there is nothing to verify: these scenes have too "
                f"few patches for blocks of {block_q} x {block_k}; give more views or smaller blocks."
            )
        found.append(
            Verification(
                sparsity=sparsity,
                measured=measured,
                scoring=scoring,
                block_q=block_q,
                block_k=block_k,
                scenes=len(views),
                views=(min(views), max(views)),
                data=data,
                means={arm: {metric: _mean(column, metric) for metric in METRICS} for arm, column in columns.items()},
                differences={metric: _difference(columns, metric, settings.allocation) for metric in TESTED},
                traces=traces_digest(profile),
                fingerprint=fingerprint,
                machine=describe_machine(),
                versions={"hess_plugin": hess_plugin.__version__, "torch": torch.__version__},
                date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                allocation=settings.allocation,
                selection=settings.selection,
                harm=harm_digest(profile) if settings.allocation == "harm" else None,
            )
        )
    return Verified(found, rows)


_Columns = dict[str, dict[str, Measurement]]


def _columns(rows: Sequence[Measurement], sparsity: float, allocation: str = "hess") -> _Columns:
    """Measurements of the dense model and of both arms at one sparsity, by arm and scene."""
    labels = {"dense": Row(0.0).label, "uniform": Row(sparsity).label, allocation: Row(sparsity).label}
    columns: _Columns = {arm: {} for arm in labels}
    for row in rows:
        if row.row == labels[row.arm]:
            columns[row.arm][row.scene] = row
    return columns


def _mean(column: dict[str, Measurement], metric: str) -> float:
    """Mean over the scenes that have the metric, NaN without one."""
    known = [value for row in column.values() if not math.isnan(value := getattr(row, metric))]
    return statistics.fmean(known) if known else math.nan


def _difference(columns: _Columns, metric: str, allocation: str = "hess") -> Difference:
    """The profile's arm minus uniform, over the scenes that have the metric in both.

    None at all where only one of the arms has it in some scene: a prediction too broken to be measured must not leave
    its arm the easier scenes. AUC counts such a scene as a miss and decides alone.
    """
    uniform, mine = columns["uniform"], columns[allocation]
    if any(
        math.isnan(getattr(row, metric)) != math.isnan(getattr(uniform[scene], metric)) for scene, row in mine.items()
    ):
        return Difference(math.nan, math.nan, 0)
    both = [getattr(row, metric) - getattr(uniform[scene], metric) for scene, row in mine.items()]
    values = [value for value in both if not math.isnan(value)]
    mean = statistics.fmean(values) if values else math.nan
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Difference(mean, error, len(values))
