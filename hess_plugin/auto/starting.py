"""What every Python under `hess-patch run` does first: wait for torch, then for a model."""

from __future__ import annotations

import atexit
import contextlib
import os
from typing import TYPE_CHECKING

from .environment import RECORD, ROOT, TEMPORARY, is_off, options_in_environment
from .imports import after_import
from .saying import say

if TYPE_CHECKING:
    from torch import nn

    from .patcher import AutoPatch


class Start:
    """The patching of this process, which begins when its first model is built.

    Not earlier: torch may be imported in the middle of an import of hess_plugin, by a program that uses it as well.
    """

    def __init__(self) -> None:
        self.process, self.record = os.getpid(), os.environ.get(RECORD)
        self.made: AutoPatch | None = None
        self.failed = self.aside = False
        self.options = options_in_environment()
        if "profile" in self.options:  # the program may change its folder, and the environment
            self.options["profile"] = os.path.abspath(str(self.options["profile"]))

    def listen(self) -> None:
        """Wait for the first module; torch has been imported."""
        if self.aside:
            return
        from .building import listen

        self._end = listen(self._first_built)

    def _first_built(self, module: nn.Module) -> None:
        if self.made is not None or self.failed:
            return
        self._end()
        try:
            from . import beginning

            self.made = beginning.begin(None, dict(self.options), record=self.record, spoken=("patched",))
            self.made.built(module)
        except Exception as error:  # the program goes on, whatever it is
            self.failed = True
            say(f"nothing will be patched: {' '.join(str(error).split())}")

    def finish(self) -> None:
        """Say at the end of the process that `hess-patch run` became if no process of the run patched anything."""
        if self.aside or os.getpid() != self.process or os.environ.get(ROOT) != str(self.process):
            return
        from .summary import nothing_was_patched

        if not self.failed:
            nothing_was_patched(self.made, self.record)
        if self.record is not None and os.environ.get(TEMPORARY) == self.record:
            with contextlib.suppress(OSError):
                os.unlink(self.record)


_started: list[Start] = []


def stand_aside() -> None:
    """Patch nothing in this process after all: hess-patch itself runs in it."""
    for made in _started:
        made.aside = True


def start() -> None:
    """Patch the models of this process as the environment says; costs nothing until torch is imported."""
    if is_off():
        return
    try:
        made = Start()
    except Exception as error:  # nonsense in the environment
        say(f"nothing will be patched: {' '.join(str(error).split())}")
        return
    _started.append(made)
    atexit.register(made.finish)  # registered first, this runs last
    after_import("torch", made.listen)
