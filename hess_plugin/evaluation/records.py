"""Measurements of one arm on one scene, and the files that hold them."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hess_plugin.exceptions import SceneError
from hess_plugin.files import write_bytes

METRICS = (
    "auc30", "auc15", "auc5", "auc3", "ate", "centre_error", "point_error", "accuracy", "completeness", "chamfer",
    "f1", "sparsity", "seconds",
)  # fmt: skip
FAILED = "failed: "


@dataclass(frozen=True)
class Measurement:
    """One arm on one scene; NaN where a scene does not have what a metric needs.

    Lengths are in units of the normalised scene (mean distance of true points, or without any of the other cameras, to
    the first camera is 1); under DTU's protocol all of them are in millimetres.

    Attributes:
        scene: scene id.
        row: what the arms of one comparison have in common: the sparsity asked for, or rho and tau.
        arm: name of the arm.
        auc30: area under the accuracy curve of relative poses up to 30 degrees, 0 to 1 (larger is better);
            `auc15`, `auc5`, `auc3` likewise.
        ate: RMSE of camera centres after their own best similarity (Umeyama).
        centre_error: RMSE of camera centres under the alignment that the clouds have.
        point_error: mean distance of predicted to true points of the same pixels.
        accuracy: mean distance from predicted points to the true cloud.
        completeness: mean distance from true points to the predicted cloud.
        chamfer: mean of accuracy and completeness.
        f1: harmonic mean of the shares of predicted and of true points that are within the threshold.
        sparsity: measured, the dropped share of patch-block pairs.
        seconds: wall time of the forward.
        knob: value of the row's knob that was set; see `Row`.
        alignment: how the prediction was aligned, for all metrics but AUC and ATE, which are NaN where that failed.
        layers: measured sparsity of every site, in execution order.
    """

    scene: str
    row: str
    arm: str
    auc30: float
    auc15: float
    auc5: float
    auc3: float
    ate: float
    centre_error: float
    point_error: float
    accuracy: float
    completeness: float
    chamfer: float
    f1: float
    sparsity: float
    seconds: float
    knob: float = math.nan
    alignment: str = ""
    layers: tuple[float, ...] = ()

    @property
    def target(self) -> float:
        """The row as a sparsity; NaN for one of rho and tau."""
        return sparsity_of(self.row)

    @property
    def failure(self) -> str:
        """Why the prediction could not be aligned with the scene; empty where it was."""
        return self.alignment[len(FAILED) :] if self.alignment.startswith(FAILED) else ""


def sparsity_of(row: str) -> float:
    """The sparsity that a row's label asks for; NaN for one of rho and tau."""
    try:
        return float(row)
    except ValueError:
        return math.nan


_COLUMNS = tuple(field.name for field in fields(Measurement))
_TEXT = ("scene", "row", "arm", "alignment")


def write_csv(path: str | Path, rows: Sequence[Measurement], provenance: Mapping[str, Any]) -> None:
    """Write one line for each measurement, every line carrying the provenance columns as well."""
    write_table(path, [{**_flat(row), **provenance} for row in rows], [*_COLUMNS, *provenance])


def write_table(path: str | Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write a CSV of these columns, atomically."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, buffer.getvalue().encode())


def _flat(row: Measurement) -> dict[str, Any]:
    return {**asdict(row), "layers": " ".join(map(repr, row.layers))}


def read_measurements(path: str | Path) -> list[Measurement]:
    """Read what `write_csv` or a `Journal` wrote; a last line cut off by a kill is left out.

    Raises:
        SceneError: the file is not such a CSV, or a line other than the last is damaged.
    """
    text = Path(path).read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(whole))
    if not set(_COLUMNS) <= set(reader.fieldnames or ()):
        raise SceneError(f"{path} does not hold measurements; give the CSV of an evaluation or the folder of a sweep.")
    try:
        return [_parsed(row) for row in reader]
    except (TypeError, ValueError, AttributeError) as error:
        raise SceneError(
            f"{path} is damaged in line {reader.line_num} ({error}); remove that line, or delete the file."
        ) from error


def _parsed(row: Mapping[str, str]) -> Measurement:
    values: dict[str, Any] = {name: row[name] if name in _TEXT else row[name].strip() for name in _COLUMNS}
    values |= {name: float(values[name]) for name in _COLUMNS if name not in (*_TEXT, "layers")}
    return Measurement(**{**values, "layers": tuple(map(float, values["layers"].split()))})


class Journal:
    """A CSV of measurements that grows while a long run goes on; what is in it survives a kill."""

    def __init__(self, path: str | Path, provenance: Mapping[str, Any]) -> None:
        """Open a journal, with what an earlier run left in it.

        Args:
            path: the file; made if missing.
            provenance: columns that every new line carries.
        """
        self._path, self._provenance = Path(path), dict(provenance)
        self.rows: list[Measurement] = []
        if self._path.exists():
            self.rows = read_measurements(self._path)
            self._drop_cut_line()
        else:
            write_table(self._path, [], [*_COLUMNS, *self._provenance])

    def _drop_cut_line(self) -> None:
        text = self._path.read_bytes()
        if not text.endswith(b"\n"):
            write_bytes(self._path, text[: text.rfind(b"\n") + 1])

    def add(self, rows: Sequence[Measurement]) -> None:
        """Append measurements; they are on the disk when this returns."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, [*_COLUMNS, *self._provenance], lineterminator="\n")
        writer.writerows({**_flat(row), **self._provenance} for row in rows)
        with self._path.open("a", encoding="utf-8", newline="") as file:
            file.write(buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())
        self.rows += rows
