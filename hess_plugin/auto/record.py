"""The file in which the processes of one run note what they patched: JSON, one entry a process."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from hess_plugin.files import write_bytes


def begin_record(path: str | Path) -> None:
    """Make an empty record, in place of one of an earlier run."""
    write_bytes(path, _encode([]))


def read_record(path: str | Path) -> list[dict[str, Any]]:
    """Read the entries of all processes so far; none if the file is gone or not a record."""
    try:
        processes = json.loads(Path(path).read_text(encoding="utf-8"))["processes"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return list(processes)


def add_to_record(path: str | Path, entry: dict[str, Any]) -> None:
    """Add the entry of this process; several processes may do so at once.

    Raises:
        OSError: the folder cannot be written to.
    """
    # The record is replaced as a whole, so the lock is held on its folder, which stays.
    folder = os.open(Path(path).absolute().parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        write_bytes(path, _encode([*read_record(path), entry]))
    finally:
        os.close(folder)


def _encode(processes: list[dict[str, Any]]) -> bytes:
    return (json.dumps({"processes": processes}, indent=2) + "\n").encode()
