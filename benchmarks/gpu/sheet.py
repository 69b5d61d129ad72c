"""The record of one section: rows of named tables, written to a file after every row, so that a kill loses nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hess_plugin.files import write_bytes


class Sheet:
    """Rows, notes and failures of a section.

    Args:
        path: JSON file to keep up to date; None keeps them in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self.data: dict[str, Any] = {"tables": {}, "notes": [], "failures": []}

    def row(self, table: str, **values: Any) -> None:
        """Add a row to a table."""
        self.data["tables"].setdefault(table, []).append({key: plain(value) for key, value in values.items()})
        self._write()

    def note(self, text: str) -> None:
        """Add a sentence that a reader of the tables should know."""
        self.data["notes"].append(text)
        self._write()

    def fail(self, text: str) -> None:
        """Add a sentence on something that is wrong; the suite then ends with status 1."""
        self.data["failures"].append(text)
        self._write()

    def table(self, name: str) -> list[dict[str, Any]]:
        """Rows of a table."""
        rows: list[dict[str, Any]] = self.data["tables"].get(name, [])
        return rows

    def _write(self) -> None:
        if self._path is not None:
            write_json(self._path, self.data)


def write_json(path: Path, data: object) -> None:
    """Write JSON atomically."""
    write_bytes(path, (json.dumps(data, indent=1) + "\n").encode())


def plain(value: Any) -> Any:
    """The value with four digits, and as something that JSON knows."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value if isinstance(value, (bool, int, str, dict)) or value is None else str(value)
