"""What a program and the processes it starts are told through the environment."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hess_plugin.exceptions import PatchError

OPTIONS = "HESS_AUTO_PATCH"
"""Options of `hess_plugin.patch`: JSON, or ``name=value,name=value``; ``off`` patches nothing, ``on`` by default."""
RECORD = "HESS_AUTO_PATCH_RECORD"
"""File in which the processes of one run note what they patched."""
ROOT = "HESS_AUTO_PATCH_ROOT"
"""Number of the process that `hess-patch run` became."""
TEMPORARY = "HESS_AUTO_PATCH_TEMPORARY"
"""The record, where that process has to delete it in the end."""
OFF = ("off", "0", "no", "false")
ON = ("on", "1", "yes", "true")


def is_off() -> bool:
    """Whether the environment forbids patching."""
    return os.environ.get(OPTIONS, "").strip().lower() in OFF


def options_in_environment() -> dict[str, Any]:
    """Read the options of `OPTIONS`; empty where it is unset or off.

    Raises:
        PatchError: it is neither JSON nor a list of names with values.
    """
    text = os.environ.get(OPTIONS, "").strip()
    if not text or is_off() or text.lower() in ON:
        return {}
    if text.startswith("{"):
        try:
            options = json.loads(text)
        except ValueError as error:
            raise PatchError(f"{OPTIONS}={text!r} is not JSON ({error}); correct it, or set it to `off`.") from error
        return dict(options)
    return dict(_pair(part, text) for part in text.split(","))


def _pair(part: str, text: str) -> tuple[str, Any]:
    name, equals, value = part.partition("=")
    if not equals or not name.strip():
        raise PatchError(
            f"{OPTIONS}={text!r} has {part.strip()!r}, wanted name=value, as in sparsity=0.73,profile=vggt.hess; "
            "correct it, or set it to `off`."
        )
    return name.strip(), _value(value.strip())


def _value(text: str) -> Any:
    """A number, true, false or null; anything else is a name or a path, and needs no quotes."""
    for read in (json.loads, float):  # JSON has no .5
        with contextlib.suppress(ValueError):
            return read(text)
    return text


def environment_for(options: Mapping[str, Any], record: Path | None) -> dict[str, str]:
    """The variables that make every Python of a program patch what it builds.

    Args:
        options: of `hess_plugin.patch`, JSON types.
        record: file in which the processes note what they patched.
    """
    bootstrap = str(Path(__file__).resolve().parent / "bootstrap")
    given = os.environ.get("PYTHONPATH", "")
    # An empty entry means the current folder: what was given stays as it is, but for this very entry.
    entries = [entry for entry in given.split(os.pathsep) if entry != bootstrap] if given else []
    variables = {OPTIONS: json.dumps(dict(options)), "PYTHONPATH": os.pathsep.join([bootstrap, *entries])}
    return variables if record is None else {**variables, RECORD: str(record)}
