"""The folder of a sweep: its plan, every measurement as it comes, and one line a cell."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from hess_plugin.block_choice import with_choice
from hess_plugin.exceptions import SceneError
from hess_plugin.files import write_bytes

from .arms import Arm, Row
from .records import METRICS, Journal, Measurement, read_measurements, write_table
from .statistics import Summary, summarise
from .sweep import Cell

PLAN, MEASUREMENTS, CELLS = "sweep.json", "measurements.csv", "cells.csv"
BASELINES = ("uniform", "equal", "dense")
_VERSION = 1


@dataclass(frozen=True)
class SweepFolder:
    """Where one sweep is kept.

    Attributes:
        path: the folder.
        plan: everything its figures depend on, JSON types only; a sweep is gone on with only if it has the same.
        about: what is told beside it: command, machine, versions.
    """

    path: Path
    plan: Mapping[str, Any]
    about: Mapping[str, Any]

    @classmethod
    def start(cls, path: Path, plan: Mapping[str, Any], about: Mapping[str, Any]) -> SweepFolder:
        """Begin a sweep, or go on with one.

        Raises:
            SceneError: the folder holds another sweep, or something that is no sweep.
        """
        folder = cls(path, json.loads(json.dumps(plan)), json.loads(json.dumps(about)))
        if (path / PLAN).exists():
            folder._check_same(cls.load(path))
        elif path.exists() and any(path.iterdir()):
            raise SceneError(f"{path} is not empty and holds no sweep; name a new folder.")
        else:
            text = json.dumps({"version": _VERSION, "plan": folder.plan, "about": folder.about}, indent=1)
            write_bytes(path / PLAN, f"{text}\n".encode())
        return folder

    def _check_same(self, other: SweepFolder) -> None:
        plan, held = with_choice(self.plan), with_choice(other.plan)
        for key in (*plan, *(key for key in held if key not in plan)):
            mine, theirs = plan.get(key), held.get(key)
            if mine != theirs:
                was, now = _first_difference(theirs, mine)
                raise SceneError(
                    f"{self.path} holds a sweep with other settings ({key} was {_short(was)}, now {_short(now)}); "
                    "name a new folder, or delete this one."
                )

    @classmethod
    def load(cls, path: Path) -> SweepFolder:
        """Read what a sweep was started with.

        Raises:
            SceneError: no such folder, or its plan is damaged or of another version.
        """
        if not (path / PLAN).is_file():
            raise SceneError(f"{path} holds no sweep ({PLAN} is missing); give a folder written by `hess-patch sweep`.")
        try:
            held = json.loads((path / PLAN).read_text(encoding="utf-8"))
            if held["version"] != _VERSION:
                raise SceneError(f"{path / PLAN} is of version {held['version']}, wanted {_VERSION}; sweep again.")
            return cls(path, dict(held["plan"]), dict(held["about"]))
        except (ValueError, KeyError, TypeError) as error:
            raise SceneError(f"{path / PLAN} is damaged ({error!r}); delete the folder and sweep again.") from error

    def journal(self) -> Journal:
        """Open the measurements, which carry the machine they were made on."""
        return Journal(self.path / MEASUREMENTS, {key: self.about[key] for key in ("machine", "hess_plugin")})

    def write_cells(self, cells: Sequence[Cell]) -> None:
        """Write one line a cell: figures with standard errors, differences to the baselines, and the plan."""
        summaries = {(s.row, s.arm): s for s in summarise([row for cell in cells for row in cell.measurements])}
        rows = [self._line(cell, summaries[cell.arm.label, cell.arm.name]) for cell in cells]
        write_table(self.path / CELLS, rows, list(rows[0]))

    def _line(self, cell: Cell, summary: Summary) -> dict[str, Any]:
        arm = cell.arm
        line: dict[str, Any] = {"row": summary.row, "arm": arm.name, "allocation": arm.allocation}
        score = self.plan["scoring"] if arm.scoring is None else asdict(arm.scoring)
        line |= {name: value if arm.guided else "" for name, value in score.items()}
        line |= {"pruning": arm.pruning or "", "knob": arm.knob}
        line |= {"asked_sparsity": arm.sparsity, "sparse_ratio": arm.sparse_ratio, "cdf_threshold": arm.cdf_threshold}
        line |= {"scenes": summary.scenes, "gap": cell.gap, "matched": cell.matched}
        for metric in METRICS:
            line |= {metric: summary.value.mean[metric], f"{metric}_se": summary.value.error[metric]}
        for name in BASELINES:
            against = summary.against.get(name)
            for metric in METRICS:
                line[f"{metric}_minus_{name}"] = "" if against is None else against.mean[metric]
                line[f"{metric}_minus_{name}_se"] = "" if against is None else against.error[metric]
        line |= {"layers": " ".join(f"{value:.6g}" for value in summary.layers), "alignment": summary.alignment}
        facts = {key: value for key, value in self.plan.items() if isinstance(value, (str, int, float, type(None)))}
        return {**line, **facts, **self.about}

    def cells(self) -> list[Cell]:
        """Read the cells that are finished.

        Raises:
            SceneError: there are none yet, or a file is damaged.
        """
        if not (self.path / CELLS).is_file():
            raise SceneError(f"{self.path} has no finished cell yet; let `hess-patch sweep` go on.")
        if not (self.path / CELLS).read_bytes().endswith(b"\n"):
            raise SceneError(f"{self.path / CELLS} is cut off; run the same sweep again, which writes it anew.")
        known: dict[tuple[str, str, float], list[Measurement]] = {}
        for row in read_measurements(self.path / MEASUREMENTS):
            known.setdefault((row.row, row.arm, row.knob), []).append(row)
        with (self.path / CELLS).open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        try:
            return [self._cell(line, known) for line in lines]
        except (KeyError, ValueError, TypeError) as error:
            raise SceneError(
                f"{self.path / CELLS} is damaged or does not belong to {MEASUREMENTS} beside it ({error!r}); run the "
                "same sweep again, which writes what is missing."
            ) from error

    def _cell(self, line: Mapping[str, str], known: Mapping[tuple[str, str, float], list[Measurement]]) -> Cell:
        sparsity, rho, tau = (
            float(line[key]) if line[key] else None for key in ("asked_sparsity", "sparse_ratio", "cdf_threshold")
        )
        arm = Arm(
            line["arm"],
            sparsity,
            line["allocation"],
            rho,
            tau,
            pruning=line["pruning"] or None,
            group=line["row"],
            turned_to=float(line["knob"]),
        )
        row = next((Row(**row) for row in self.plan["rows"] if Row(**row).label == line["row"]), Row(sparsity=0.0))
        rows = tuple(known[line["row"], line["arm"], float(line["knob"])])
        return Cell(row, arm, float(line["gap"]), line["matched"] == "True", rows)


def _first_difference(was: Any, now: Any) -> tuple[Any, Any]:
    """Of two lists the first entries that differ, of anything else itself; null stands for no entry."""
    if not isinstance(was, list) or not isinstance(now, list):
        return was, now
    pairs = zip_longest(was, now)
    return next((first, second) for first, second in pairs if first != second)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
