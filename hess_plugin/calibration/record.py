"""Traces on disk while a calibration runs: one file, rewritten whole after every scene, read again on restart."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from hess_plugin.exceptions import CalibrationError
from hess_plugin.files import write_bytes

_METADATA_KEY = "hess_calibration"


@dataclass
class Record:
    """What a calibration has measured so far.

    Attributes:
        path: the file, or None to keep it in memory only.
        settings: everything the traces depend on; another calibration's record is refused by it.
        started: ISO date of the first scene, kept over restarts.
        traces: by scene, by ``"<error>.<projection>"``: float64 ``[L, H]``.
        facts: by scene, how it was measured (scale, alignment, errors), JSON types only.
        skipped: reason by scene, for scenes that gave no usable error.
        digests: by scene, `Scene.digest` of what was measured or skipped.
    """

    path: Path | None
    settings: dict[str, Any]
    started: str
    traces: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None, settings: dict[str, Any], started: str) -> Record:
        """Resume from `path` if it exists, else start.

        Raises:
            CalibrationError: the file is damaged or belongs to a calibration with other settings.
        """
        settings = json.loads(json.dumps(settings))  # as it is read back; tells now what cannot be written later
        record = cls(path, settings, started)
        if path is None or not path.exists():
            return record
        hint = f"delete {path} to start again"
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[_METADATA_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            record.started, record.facts = header["started"], dict(header["facts"])
            record.skipped, record.digests = dict(header["skipped"]), dict(header["digests"])
            for index, scene in enumerate(header["scenes"]):
                prefix = f"{index}."
                record.traces[scene] = {
                    name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
                }
            stored = dict(header["settings"])
        except (safetensors.SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise CalibrationError(f"{path} is damaged ({error}); {hint}.") from error
        for name in sorted(settings | stored):
            if settings.get(name) != stored.get(name):
                raise CalibrationError(
                    f"{path} is of a calibration with {name} = {stored.get(name)!r}, this one has "
                    f"{settings.get(name)!r}; {hint}."
                )
        return record

    def done(self, scene: str, digest: str) -> bool:
        """Whether a scene was measured or skipped already; one that has changed since is forgotten."""
        if scene not in self.traces and scene not in self.skipped:
            return False
        if self.digests.get(scene) == digest:
            return True
        for table in (self.traces, self.facts, self.skipped, self.digests):
            table.pop(scene, None)
        return False

    def add(self, scene: str, digest: str, traces: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Note one scene's traces and how they were measured, and write the file."""
        self.traces[scene], self.facts[scene], self.digests[scene] = traces, facts, digest
        self._write()

    def skip(self, scene: str, digest: str, reason: str) -> None:
        """Note that a scene gave no usable error and write the file."""
        self.skipped[scene], self.digests[scene] = reason, digest
        self._write()

    def delete(self) -> None:
        """Remove the file once the profile is written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        if self.path is None:
            return
        scenes = list(self.traces)
        tensors = {f"{i}.{name}": t for i, scene in enumerate(scenes) for name, t in self.traces[scene].items()}
        header = {
            "settings": self.settings,
            "started": self.started,
            "scenes": scenes,
            "facts": self.facts,
            "skipped": self.skipped,
            "digests": self.digests,
        }
        write_bytes(self.path, safetensors.torch.save(tensors, metadata={_METADATA_KEY: json.dumps(header)}))
