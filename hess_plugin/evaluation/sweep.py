"""Sweeping: every arm at every row on every scene, at matched measured sparsity, resumable."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from hess_plugin.exceptions import PatchError
from hess_plugin.scenes.scene import Scene

from .arms import Arm, Row
from .comparison import Runner
from .matching import TOLERANCE, next_knob
from .records import Journal, Measurement

PASSES = 10
REFERENCE = "uniform"
Progress = Callable[[int, int, str], None]


class NamedScenes(Protocol):
    """Scenes whose names are known without reading them."""

    @property
    def names(self) -> list[str]:
        """One name a scene."""

    def __len__(self) -> int:
        """Number of scenes."""

    def __getitem__(self, index: int) -> Scene:
        """Read one scene."""


@dataclass(frozen=True)
class Cell:
    """One arm at one row.

    Attributes:
        row: the row.
        arm: the arm, at the knob that was found.
        gap: mean measured sparsity minus that of the uniform arm of the row.
        matched: whether that is within the tolerance.
        measurements: one for each scene.
    """

    row: Row
    arm: Arm
    gap: float
    matched: bool
    measurements: tuple[Measurement, ...]

    @property
    def sparsity(self) -> float:
        """Mean measured sparsity."""
        return _mean_sparsity(self.measurements)


@dataclass
class Sweep:
    """A sweep that runs or goes on.

    Attributes:
        runner: the model.
        scenes: what it is measured on.
        journal: where measurements are kept; what it holds is not measured again.
        tolerance: largest difference of mean measured sparsity between an arm and ``uniform``.
        progress: called as ``progress(done, total, what)`` before each forward; the total is a lower bound, as
            matching may take further passes.
    """

    runner: Runner
    scenes: NamedScenes
    journal: Journal
    tolerance: float = TOLERANCE
    progress: Progress | None = None
    _known: dict[tuple[str, str, float], dict[str, Measurement]] = field(default_factory=dict, init=False)
    _done: int = field(default=0, init=False)
    _total: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:  # NaN would never match
            raise PatchError(f"tolerance is {self.tolerance}, wanted a difference of sparsities between 0 and 1.")
        for row in self.journal.rows:
            self._note(row)

    def run(self, rows: Sequence[Row], arms: Sequence[Arm], cell_done: Callable[[list[Cell]], None]) -> list[Cell]:
        """Measure the dense model, then every row.

        Args:
            rows: the amounts.
            arms: the arms, at any amount; one of them is called ``uniform`` and sets the sparsity that the others
                of a row are matched to. Arms that prune heads go to that sparsity as nearly as whole heads can, and
                ``harm`` is set to it where the row is a rule.
            cell_done: called with all cells so far when the dense model and each row are done.

        Raises:
            PatchError: no uniform arm, or an arm or row that cannot run.
        """
        if REFERENCE not in [arm.name for arm in arms]:
            raise PatchError("a sweep matches all arms to the uniform one, and it is not among the arms; add it.")
        self.runner.check([_first(arm, row) for row in rows for arm in arms])
        self._total = len(self.scenes) * (1 + len(rows) * len(arms))
        dense_row = Row(sparsity=0.0)
        cells = [Cell(dense_row, Arm("dense"), 0.0, True, self._measure([Arm("dense")])[0])]
        cell_done(cells)
        for row in rows:
            cells += self._row(row, arms)
            cell_done(cells)
        return cells

    def _row(self, row: Row, arms: Sequence[Arm]) -> list[Cell]:
        """Match and measure one row."""
        blocks = [arm for arm in arms if not arm.goes_to_sparsity(row)]
        knobs = {arm.name: row.knob for arm in blocks}
        found: dict[str, list[Cell]] = {arm.name: [] for arm in blocks}
        reference = 0.0
        for _ in range(PASSES):
            todo = [arm for arm in blocks if not any(cell.matched for cell in found[arm.name])]
            todo = [arm for arm in todo if knobs[arm.name] not in [cell.arm.knob for cell in found[arm.name]]]
            if not todo:
                break
            at = [arm.at(row, knobs[arm.name]) for arm in todo]
            measured = {arm.name: (arm, rows) for arm, rows in zip(at, self._measure(at), strict=True)}
            if REFERENCE in measured:  # in the first pass; its own knob stays
                reference = _mean_sparsity(measured[REFERENCE][1])
            for name, (arm, rows) in measured.items():
                found[name].append(self._cell(row, arm, rows, reference))
                tried = [(cell.arm.knob, cell.sparsity) for cell in found[name]]
                knobs[name] = next_knob(tried, reference, *row.knob_range)
        others = [arm.set_to(reference, row) for arm in arms if arm.goes_to_sparsity(row)]
        best = {name: min(cells, key=lambda cell: abs(cell.gap)) for name, cells in found.items()}
        for arm, rows in zip(others, self._measure(others), strict=True):
            best[arm.name] = self._cell(row, arm, rows, reference)
        return [best[arm.name] for arm in arms]

    def _cell(self, row: Row, arm: Arm, rows: tuple[Measurement, ...], reference: float) -> Cell:
        gap = _mean_sparsity(rows) - reference
        return Cell(row, arm, gap, abs(gap) <= self.tolerance, rows)

    def _measure(self, arms: Sequence[Arm]) -> list[tuple[Measurement, ...]]:
        """Measure arms on all scenes, a scene read once; what is known already is not measured again."""
        for index, name in enumerate(self.scenes.names):
            missing = [arm for arm in arms if name not in self._known.get(_key(arm), {})]
            self._done += len(arms) - len(missing)
            if not missing:
                continue
            scene = self.runner.prepared(self.scenes[index])
            rows = []
            for arm in missing:
                self._tell(f"{name} {arm.name} {arm.label}")
                rows.append(self.runner.measure(scene, arm))
            self.journal.add(rows)
            for row in rows:
                self._note(row)
        return [tuple(self._known[_key(arm)][name] for name in self.scenes.names) for arm in arms]

    def _tell(self, what: str) -> None:
        if self.progress is not None:
            self.progress(self._done, max(self._total, self._done + 1), what)
        self._done += 1

    def _note(self, row: Measurement) -> None:
        self._known.setdefault((row.row, row.arm, row.knob), {})[row.scene] = row


def _first(arm: Arm, row: Row) -> Arm:
    """The arm as a row starts with it; the sparsity that others reach is known only later."""
    return arm.set_to(0.5, row) if arm.goes_to_sparsity(row) else arm.at(row)


def _key(arm: Arm) -> tuple[str, str, float]:
    return arm.label, arm.name, arm.knob


def _mean_sparsity(rows: Sequence[Measurement]) -> float:
    return statistics.fmean(row.sparsity for row in rows)
