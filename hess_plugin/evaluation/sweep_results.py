"""What a sweep found so far, read from its folder, and its main result in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hess_plugin.exceptions import HessError, SceneError
from hess_plugin.profiles import Profile
from hess_plugin.student import t_interval

from .arms import Row
from .shown import SHOWN
from .statistics import Statistic, Summary, paired, summarise
from .sweep import Cell
from .sweep_folder import SweepFolder

PROFILE, CLOUDS = "profile.hess", "clouds.safetensors"
LEVEL = 0.95


@dataclass(frozen=True)
class SweepResults:
    """A sweep, finished or not.

    Attributes:
        folder: where it is kept, with its plan.
        cells: those that are finished, rows in order of measured sparsity, dense first.
        summaries: one for each cell, in their order.
        profile: whose budgets were compared; None if the folder has none.
        planned: labels of all rows that were asked for.
    """

    folder: SweepFolder
    cells: tuple[Cell, ...]
    summaries: tuple[Summary, ...]
    profile: Profile | None
    planned: tuple[str, ...]

    @classmethod
    def load(cls, path: Path) -> SweepResults:
        """Read a folder.

        Raises:
            SceneError: no sweep, no finished cell, or a damaged file.
            ProfileError: the copy of the profile is damaged.
        """
        folder = SweepFolder.load(path)
        try:
            cells = _in_order(folder.cells())
            summaries = {(s.row, s.arm): s for s in summarise([m for cell in cells for m in cell.measurements])}
            planned = tuple(Row(**row).label for row in folder.plan["rows"])
            found = tuple(summaries[cell.arm.label, cell.arm.name] for cell in cells)
        except HessError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SceneError(f"{path} is damaged ({error!r}); delete it and sweep again.") from error
        profile = Profile.load(path / PROFILE) if (path / PROFILE).is_file() else None
        return cls(folder, cells, found, profile, planned)

    @property
    def rows(self) -> tuple[str, ...]:
        """Labels of the finished rows, by measured sparsity, without dense."""
        return tuple(dict.fromkeys(s.row for s in self.summaries if s.arm != "dense"))

    @property
    def missing(self) -> tuple[str, ...]:
        """Labels of the rows that are not finished."""
        return tuple(row for row in self.planned if row not in self.rows)

    @property
    def scenes(self) -> int:
        """Number of scenes."""
        return max(s.scenes for s in self.summaries)

    def known(self, metrics: Sequence[str]) -> tuple[str, ...]:
        """Those metrics that the scenes allow to measure."""
        return tuple(m for m in metrics if any(not math.isnan(s.value.mean[m]) for s in self.summaries))

    def summary(self, arm: str, row: str) -> Summary | None:
        """One cell, if it is finished."""
        return next((s for s in self.summaries if (s.arm, s.row) == (arm, row)), None)

    def cell(self, arm: str, row: str) -> Cell | None:
        """One cell with its measurements, if it is finished."""
        return next((c for c in self.cells if (c.arm.name, c.arm.label) == (arm, row)), None)

    def minus(self, arm: str, baseline: str, row: str) -> Statistic | None:
        """Every metric of an arm minus that of another in the same row, paired by scene, if both are finished."""
        first, second = self.cell(arm, row), self.cell(baseline, row)
        return None if first is None or second is None else paired(first.measurements, second.measurements)

    @property
    def headline(self) -> str:
        """The main result in a sentence, with its error, whatever it is."""
        if not self.rows:
            dense = self.summaries[0]
            return f"No row is finished yet; the dense model has AUC@30 {_told(dense.value, 'auc30', signed=False)}."
        row = self.rows[-1]
        arm, baseline = ("hess", "uniform") if self.cell("hess", row) else ("uniform", "dense")
        summary = self.summary(arm, row)
        if summary is None or baseline not in summary.against:
            return f"In the sparsest row ({row}) nothing was measured that could be compared."
        difference = summary.against[baseline]
        metrics = [m for m in ("auc30", "point_error", "chamfer") if difference.count[m]][:2]
        where = f"At the sparsest row ({row}; measured sparsity {summary.value.mean['sparsity']:.3f})"
        parts = [f"{SHOWN[m].heading} {_told(difference, m)} ({_judged(difference, m)})" for m in metrics]
        text = f"{where}, {arm} minus {baseline}: {'; '.join(parts)}"
        cell = self.cell(arm, row)
        if cell is not None and not cell.matched and arm != "uniform":
            text += f"; measured sparsity is not matched, it differs by {cell.gap:+.3f}"
        scenes = f"{summary.scenes} scenes, paired by scene" if summary.scenes > 1 else "one scene, so without errors"
        return f"{text}; {scenes}."


def direction(difference: Statistic, metric: str) -> int:
    """1 where a difference is better and -1 where it is worse beyond its 95 % interval, 0 where that is not shown."""
    low, high = t_interval(difference.mean[metric], difference.error[metric], difference.count[metric], LEVEL)
    if low <= 0.0 <= high or math.isnan(low):
        return 0
    return SHOWN[metric].better * (1 if low > 0.0 else -1)


def _judged(difference: Statistic, metric: str) -> str:
    low, high = t_interval(difference.mean[metric], difference.error[metric], difference.count[metric], LEVEL)
    if math.isnan(low):
        return "no error known"
    word = ("within error, no difference shown", "better", "worse")[direction(difference, metric)]
    shown = SHOWN[metric]
    return f"{word}, {LEVEL:.0%} interval {shown.number(low, signed=True)} to {shown.number(high, signed=True)}"


def _told(statistic: Statistic, metric: str, signed: bool = True) -> str:
    """A mean with its standard error and unit."""
    shown = SHOWN[metric]
    text = shown.number(statistic.mean[metric], signed)
    if not math.isnan(statistic.error[metric]):
        text += f" ± {shown.number(statistic.error[metric])}"
    return f"{text} {shown.unit}".rstrip()


def _in_order(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Dense, then rows by the measured sparsity of their uniform arm; arms stay as they were given."""
    at = {cell.arm.label: cell.sparsity for cell in cells}
    at |= {cell.arm.label: cell.sparsity for cell in cells if cell.arm.name == "uniform"}
    return tuple(sorted(cells, key=lambda cell: (not cell.arm.dense, at[cell.arm.label])))
