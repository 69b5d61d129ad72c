"""Runs cells on scenes: one model, its profiles, and a journal of what is measured already."""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hess_plugin import Profile, Scene, calibrate, patch
from hess_plugin.calibration.harm import HarmSettings
from hess_plugin.evaluation.metrics import (
    MetricSettings,
    PredictionScores,
    measure_prediction,
    scores_without_alignment,
)
from hess_plugin.exceptions import CalibrationError
from hess_plugin.plugins import resolve_adapter
from hess_plugin.sparsity import selection
from hess_plugin_cuda import block_count

from .cells import BLOCK, Cell, total
from .probe import Probe
from .records import Journal, Line

_METRICS = MetricSettings(clouds=False)


@dataclass(frozen=True)
class Scenes:
    """Rooms to calibrate on and rooms to measure on."""

    calibration: Sequence[Scene]
    test: Sequence[Scene]
    names: Sequence[str]
    """Of the test rooms, without rendering them."""


class Experiment:
    """A model measured cell by cell.

    Args:
        model: unpatched; a model whose sites join heads by ``proj``.
        scenes: to calibrate and to measure on.
        folder: of the journal and the profiles.
        drift_scenes: on how many of the test rooms drift and recall are measured.
        progress: called with a line to show.
    """

    def __init__(
        self, model: nn.Module, scenes: Scenes, folder: Path, drift_scenes: int, progress: Callable[[str], None] = print
    ) -> None:
        self.model, self.scenes, self.folder, self.progress = model, scenes, folder, progress
        self.adapter = resolve_adapter(model)
        self.sites = self.adapter.sites(model)
        self.journal = Journal(folder)
        self._probed = set(scenes.names[:drift_scenes])
        self._prepared: dict[str, Scene] = {}
        self.profile = functools.cache(self._profile)

    def missing(self, cell: Cell) -> list[str]:
        """Scenes on which a cell is still to be measured."""
        done = self.journal.lines.get(cell.name, {})
        return [
            name
            for name in self.scenes.names
            if name not in done or (cell.sparsity > 0.0 and name in self._probed and not done[name].drift)
        ]

    def run(self, cells: Sequence[Cell]) -> None:
        """Measure what is missing; shows a line for each cell, with what it found and the time left."""
        left = {cell: scenes for cell in cells if (scenes := self.missing(cell))}
        runs, done, started = sum(map(len, left.values())), 0, time.perf_counter()
        for index, (cell, names) in enumerate(left.items(), len(cells) - len(left) + 1):
            self._profile_of(cell)  # made now, and not while runs are timed
            before = time.perf_counter()
            for name in names:
                self.journal.add(self.measure(cell, self._scene(name)))
            done += len(names)
            now = time.perf_counter()
            remaining = (now - started) / done * (runs - done)
            self.progress(
                f"[{index}/{len(cells)}] {cell.name}: {self._found(cell)}; {now - before:.0f} s, "
                f"{remaining / 60:.0f} min left"
            )

    def measure(self, cell: Cell, scene: Scene) -> Line:
        """Run one cell on one prepared scene."""
        probe = Probe(self.sites) if cell.sparsity > 0.0 and scene.name in self._probed else None
        blocks = self._blocks(scene)
        with torch.inference_mode(), probe or contextlib.nullcontext(), self._patched(cell, blocks) as handle:
            prediction = self.adapter.predict(self.model, scene.images)
        heads, layers = self.sites[0].num_heads, len(self.sites)
        kept, seconds = (heads * blocks * blocks,) * layers, 0.0
        if handle is not None:
            report = handle.report()
            kept = tuple(
                sum(round((1.0 - share) * blocks * blocks) for share in site.head_sparsity or ())
                for site in report.sites
            )
            seconds = report.seconds - (probe.seconds if probe else 0.0)
        if sum(kept) != (wanted := total(cell.sparsity, layers, heads, blocks)):
            raise SystemExit(f"{cell.name} kept {sum(kept)} block pairs of {scene.name}, the others keep {wanted}.")
        scores = self._scores(prediction, scene)
        drift, recall = (tuple(probe.drift), tuple(probe.recall)) if probe else ((), ())
        return Line(cell.name, scene.name, scores.auc30, scores.point_error, kept, seconds, drift, recall)

    def _scores(self, prediction: Any, scene: Scene) -> PredictionScores:
        try:
            return measure_prediction(prediction, scene, _METRICS)
        except CalibrationError as error:
            self.progress(f"{scene.name} cannot be aligned: {error}")
            return scores_without_alignment(prediction, scene, str(error), _METRICS)

    @contextlib.contextmanager
    def _patched(self, cell: Cell, blocks: int) -> Iterator[Any]:
        if cell.sparsity == 0.0:
            yield None
            return
        options = cell.options(self._profile_of(cell), self.sites[0].num_heads, blocks)
        with warnings.catch_warnings():
            # Curves of one selector under another are a part of the experiment.
            warnings.filterwarnings("ignore", message="Budgets go by harm", category=UserWarning)
            handle = patch(self.model, **options)
        with handle, _rounds(cell.rounds):
            yield handle

    def _profile_of(self, cell: Cell) -> Profile | None:
        return None if cell.profile is None else self.profile(cell.profile)

    def _blocks(self, scene: Scene) -> int:
        return block_count(self.adapter.token_layout(self.model, (scene.images[None],), {}).patch_tokens, BLOCK)

    def _profile(self, harm: HarmSettings) -> Profile:
        """Traces, and harm curves measured in one way; calibrated once a folder."""
        path = self.folder / f"{_name(harm)}.hess"
        if not path.exists():
            self.progress(f"calibrating on {len(self.scenes.calibration)} rooms for {path.name}")
            calibrate(self.model, self.scenes.calibration, harm=harm, output=path)
        return Profile.load(path)

    def _scene(self, name: str) -> Scene:
        if name not in self._prepared:
            self._prepared[name] = self.scenes.test[list(self.scenes.names).index(name)].normalised()
        return self._prepared[name]

    def _found(self, cell: Cell) -> str:
        lines = list(self.journal.lines[cell.name].values())
        auc = sum(line.auc30 for line in lines) / len(lines)
        drifts = [sum(line.drift) / len(line.drift) for line in lines if line.drift]
        drift = f", drift {sum(drifts) / len(drifts):.4g}" if drifts else ""
        return f"AUC {100 * auc:.2f}{drift}"


@contextlib.contextmanager
def _rounds(rounds: int | None) -> Iterator[None]:
    """Let the selector "restore" make so many rounds of swaps, which is no option of a patch."""
    usual = selection.usual_rounds
    selection.usual_rounds = lambda pooled: usual(pooled) if rounds is None else rounds
    try:
        yield
    finally:
        selection.usual_rounds = usual


def _name(harm: HarmSettings) -> str:
    """Name of a profile's file; ``mass`` for curves by mass selection of whole blocks in raster order."""
    pools = (harm.pool_q or harm.block_q, harm.pool_k or harm.block_k)
    if (harm.selector, harm.block_order, *pools) == ("mass", "raster", harm.block_q, harm.block_k):
        return "mass"
    return f"{harm.selector}-{pools[0]}.{pools[1]}-{harm.block_order}"
