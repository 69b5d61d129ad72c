"""Traces on disk while a calibration runs: one file, rewritten whole as scenes are finished, read again on restart."""

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
class Findings:
    """What was found out about some scenes.

    Attributes:
        traces: by scene, by ``"<error>.<projection>"``: float64 ``[L, H]``.
        facts: by scene, how it was measured (scale, alignment, errors), JSON types only.
        skipped: reason by scene, for scenes that gave no usable error.
        digests: by scene, `Scene.digest` of what was measured or skipped.
    """

    traces: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def done(self, scene: str, digest: str) -> bool:
        """Whether a scene was measured or skipped already; one that has changed since is forgotten."""
        if self.digests.get(scene) == digest and (scene in self.traces or scene in self.skipped):
            return True
        self._forget(scene)
        return False

    def take(self, other: Findings) -> None:
        """Take over what was found out elsewhere; a scene known already is replaced."""
        for scene in other.digests:
            self._forget(scene)
        for mine, theirs in zip(self._tables(), other._tables(), strict=True):
            mine.update(theirs)

    def pack(self, **header: Any) -> bytes:
        """Put everything, with further JSON values, into the bytes of a safetensors file."""
        scenes = list(self.traces)
        tensors = {f"{i}.{name}": t for i, scene in enumerate(scenes) for name, t in self.traces[scene].items()}
        header |= {"scenes": scenes, "facts": self.facts, "skipped": self.skipped, "digests": self.digests}
        return safetensors.torch.save(tensors, metadata={_METADATA_KEY: json.dumps(header)})

    @classmethod
    def unpack(cls, data: bytes) -> tuple[Findings, dict[str, Any]]:
        """Undo `pack`: what was found, and the further values.

        Raises:
            SafetensorError, KeyError, TypeError, ValueError, AttributeError: the bytes are not of `pack`.
        """
        tensors = safetensors.torch.load(data)
        # The library gives no metadata of bytes: the file begins with the length of its header, which is JSON.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"][_METADATA_KEY]
        header = json.loads(header)
        found = cls({}, dict(header.pop("facts")), dict(header.pop("skipped")), dict(header.pop("digests")))
        for index, scene in enumerate(header.pop("scenes")):
            prefix = f"{index}."
            found.traces[scene] = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        return found, header

    def _tables(self) -> tuple[dict[str, Any], ...]:
        return self.traces, self.facts, self.skipped, self.digests

    def _forget(self, scene: str) -> None:
        for table in self._tables():
            table.pop(scene, None)


@dataclass
class Record:
    """What a calibration has found out so far, and its file.

    Attributes:
        path: the file, or None to keep it in memory only.
        settings: everything the traces depend on; another calibration's record is refused by it.
        started: ISO date of the first scene, kept over restarts.
        found: what was found out.
    """

    path: Path | None
    settings: dict[str, Any]
    started: str
    found: Findings = field(default_factory=Findings)

    @classmethod
    def open(cls, path: Path | None, settings: dict[str, Any], started: str) -> Record:
        """Resume from `path` if it exists, else start.

        Raises:
            CalibrationError: the file is damaged or belongs to a calibration with other settings.
        """
        settings = json.loads(json.dumps(settings))  # as it is read back; tells now what cannot be written later
        if path is None or not path.exists():
            return cls(path, settings, started)
        hint = f"delete {path} to start again"
        try:
            record = cls.from_bytes(path.read_bytes(), path)
            stored = dict(record.settings)
        except (safetensors.SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise CalibrationError(f"{path} is damaged ({error}); {hint}.") from error
        for name in sorted(settings | stored):
            if settings.get(name) != stored.get(name):
                raise CalibrationError(
                    f"{path} is of a calibration with {name} = {stored.get(name)!r}, this one has "
                    f"{settings.get(name)!r}; {hint}."
                )
        return record

    @classmethod
    def from_bytes(cls, data: bytes, path: Path | None = None) -> Record:
        """Undo `to_bytes`; errors as of `Findings.unpack`."""
        found, header = Findings.unpack(data)
        return cls(path, header["settings"], header["started"], found)

    def to_bytes(self) -> bytes:
        """The record as it is written."""
        return self.found.pack(settings=self.settings, started=self.started)

    def add(self, found: Findings) -> None:
        """Note what was found out and write the file."""
        if not found.digests:
            return
        self.found.take(found)
        if self.path is not None:
            write_bytes(self.path, self.to_bytes())

    def delete(self) -> None:
        """Remove the file once the profile is written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
