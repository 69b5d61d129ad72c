"""Measurements of cells, one JSON line each, which a kill does not lose."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hess_plugin.files import write_bytes

LINES = "measurements.jsonl"
ABOUT = "about.json"


@dataclass(frozen=True)
class Line:
    """One cell on one scene.

    Attributes:
        cell: name of the cell.
        scene: name of the scene.
        auc30: AUC@30 of relative poses, 0 to 1.
        point_error: mean distance of predicted to true points, in units of the normalised scene; NaN where the
            prediction could not be aligned.
        kept: block pairs that each layer kept.
        seconds: in attention, selection included; what the probe took left out.
        drift: of each layer (see `Probe`); empty where it was not measured.
        recall: likewise.
    """

    cell: str
    scene: str
    auc30: float
    point_error: float
    kept: tuple[int, ...]
    seconds: float
    drift: tuple[float, ...] = ()
    recall: tuple[float, ...] = ()


class Journal:
    """Lines of a folder, by cell and scene."""

    def __init__(self, folder: Path) -> None:
        """Read what earlier runs left; a line that a kill cut off is dropped."""
        self.path = folder / LINES
        self.lines: dict[str, dict[str, Line]] = {}
        text = self.path.read_bytes() if self.path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        self._cut = len(whole) < len(text)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._take(_line(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise SystemExit(f"{self.path}: line {number} is damaged ({error}); remove it.") from error
        self._whole = whole

    def add(self, line: Line) -> None:
        """Append one line; it is on the disk when this returns. A later line of a cell and scene replaces the first."""
        if self._cut:
            write_bytes(self.path, self._whole)
            self._cut = False
        record = asdict(line)
        record = {name: None if value != value else value for name, value in record.items()}  # JSON has no NaN
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._take(line)

    def _take(self, line: Line) -> None:
        self.lines.setdefault(line.cell, {})[line.scene] = line


def _line(record: Mapping[str, Any]) -> Line:
    values = {name: math.nan if value is None else value for name, value in record.items()}
    return Line(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def check_same(folder: Path, about: Mapping[str, Any]) -> None:
    """Write what all lines of a folder have in common, or compare it with what is there.

    Raises:
        SystemExit: the folder is of another experiment.
    """
    path = folder / ABOUT
    if not path.exists():
        write_bytes(path, (json.dumps(about, indent=1) + "\n").encode())
        return
    stored = json.loads(path.read_text())
    for name in ("weights", "views", "calibration_scenes"):
        if stored.get(name) != about[name]:
            raise SystemExit(
                f"{folder} is of an experiment with {name} {stored.get(name)}, this one has {about[name]}; "
                "give another folder."
            )
