"""What every Python under `hess-patch run` does first: wait for torch, then for models."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from typing import TYPE_CHECKING

from .environment import RECORD, ROOT, TEMPORARY, is_off
from .imports import after_import

if TYPE_CHECKING:
    from .patcher import AutoPatch


def start() -> None:
    """Patch the models of this process as the environment says; costs nothing until torch is imported."""
    if is_off():
        return
    made: list[AutoPatch] = []
    process, record = os.getpid(), os.environ.get(RECORD)

    def begin() -> None:
        try:
            from . import patcher

            made.append(patcher.begin(None, {}, record=record, spoken=("patched",)))
        except Exception as error:  # the program goes on, whatever it is
            sys.stderr.write(f"hess-patch: nothing will be patched: {' '.join(str(error).split())}\n")

    def finish() -> None:
        # Registered first, this runs last: after `begin` has told of this process.
        if os.getpid() != process or os.environ.get(ROOT) != str(process):
            return
        from .summary import nothing_was_patched

        nothing_was_patched(made[0] if made else None, record)
        if record is not None and os.environ.get(TEMPORARY):
            with contextlib.suppress(OSError):
                os.unlink(record)

    atexit.register(finish)
    after_import("torch", begin)
