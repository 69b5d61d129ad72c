"""Means over scenes with standard errors, and differences between arms paired by scene."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .records import METRICS, Measurement, sparsity_of


@dataclass(frozen=True)
class Statistic:
    """A mean over scenes and its standard error (NaN for a single scene), by metric, and how many scenes have it."""

    mean: dict[str, float]
    error: dict[str, float]
    count: dict[str, int]


@dataclass(frozen=True)
class Summary:
    """One arm over all scenes.

    Attributes:
        arm: name of the arm.
        row: the row it is compared in.
        scenes: number of scenes.
        value: every metric.
        against: every metric minus that of a baseline, scene by scene: ``dense``, and ``uniform`` and ``equal`` in the
            same row. Pairing takes out how hard each scene is, which is most of the error of `value`.
        layers: mean measured sparsity of every site.
        alignment: how the scenes were aligned, several where scenes differ, and in how many that failed.
    """

    arm: str
    row: str
    scenes: int
    value: Statistic
    against: dict[str, Statistic]
    layers: tuple[float, ...] = ()
    alignment: str = ""

    @property
    def target(self) -> float:
        """The row as a sparsity; NaN for one of rho and tau."""
        return sparsity_of(self.row)


def summarise(rows: Sequence[Measurement]) -> list[Summary]:
    """Average every arm over its scenes and compare it, scene by scene, with dense, uniform and equal."""
    groups: dict[tuple[str, str], dict[str, Measurement]] = {}
    for row in rows:
        groups.setdefault((row.arm, row.row), {})[row.scene] = row
    dense = next((by_scene for (arm, _), by_scene in groups.items() if arm == "dense"), None)
    summaries = []
    for (arm, label), by_scene in groups.items():
        baselines = {"dense": dense, "uniform": groups.get(("uniform", label)), "equal": groups.get(("equal", label))}
        against = {
            name: _differences(by_scene, baseline)
            for name, baseline in baselines.items()
            if baseline is not None and baseline is not by_scene
        }
        value = _statistic([[getattr(row, m) for row in by_scene.values()] for m in METRICS])
        summaries.append(Summary(arm, label, len(by_scene), value, against, _layers(by_scene), _alignment(by_scene)))
    return summaries


def paired(first: Sequence[Measurement], second: Sequence[Measurement]) -> Statistic:
    """Every metric of one arm minus that of another, on the scenes that both have."""
    return _differences({row.scene: row for row in first}, {row.scene: row for row in second})


def _differences(by_scene: Mapping[str, Measurement], baseline: Mapping[str, Measurement]) -> Statistic:
    pairs = [(row, baseline[scene]) for scene, row in by_scene.items() if scene in baseline]
    return _statistic([[getattr(row, m) - getattr(base, m) for row, base in pairs] for m in METRICS])


def _statistic(columns: list[list[float]]) -> Statistic:
    """Mean and standard error of each metric's column, over the scenes that have the metric."""
    columns = [[value for value in column if not math.isnan(value)] for column in columns]
    mean = {m: statistics.fmean(c) if c else math.nan for m, c in zip(METRICS, columns, strict=True)}
    spread = [statistics.stdev(c) / math.sqrt(len(c)) if len(c) > 1 else math.nan for c in columns]
    counts = {m: len(c) for m, c in zip(METRICS, columns, strict=True)}
    return Statistic(mean, dict(zip(METRICS, spread, strict=True)), counts)


def _layers(by_scene: Mapping[str, Measurement]) -> tuple[float, ...]:
    known = [row.layers for row in by_scene.values() if row.layers]
    return tuple(statistics.fmean(column) for column in zip(*known, strict=True)) if known else ()


def _alignment(by_scene: Mapping[str, Measurement]) -> str:
    done = sorted({row.alignment for row in by_scene.values() if row.alignment and not row.failure})
    failed = sum(bool(row.failure) for row in by_scene.values())
    return "; ".join([*done, *([f"failed in {failed} of {len(by_scene)} scenes"] if failed else [])])


def failed_lines(rows: Sequence[Measurement]) -> list[str]:
    """A sentence for each arm and row with predictions that could not be aligned: in how many scenes, the first why."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for row in rows:
        groups.setdefault((row.arm, row.row), []).append(row)
    lines = []
    for (arm, label), members in groups.items():
        failed = [row for row in members if row.failure]
        if failed:
            lines.append(
                f"{arm} at {label} could not be aligned in {len(failed)} of {len(members)} scenes, which its means and "
                f"differences leave out but for AUC and ATE; {failed[0].scene}: {failed[0].failure}"
            )
    return lines
