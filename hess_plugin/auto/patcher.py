"""Patching every model that an adapter knows, the moment it is built or its weights are loaded."""

from __future__ import annotations

import atexit
import os
import warnings
import weakref
from dataclasses import dataclass
from multiprocessing import util
from pathlib import Path
from typing import Any

from torch import nn

from hess_plugin.exceptions import HessError, PatchError
from hess_plugin.handle import Patch
from hess_plugin.interception import is_patched
from hess_plugin.patching import patch, unpatch
from hess_plugin.pickling import is_left_out, leave_out
from hess_plugin.plugins import get_plugin_manager
from hess_plugin.profiles import Profile
from hess_plugin.registration.registry import Registry

from .building import listen
from .claims import Claims
from .saying import say
from .waiting import Waiting


@dataclass(frozen=True)
class PatchedModel:
    """One model that was patched while its program ran.

    Attributes:
        name: its class.
        adapter: the adapter that claimed it.
        patch: its report; does not keep the model in memory.
        model: the model itself, as long as the program keeps it.
    """

    name: str
    adapter: str
    patch: Patch
    model: weakref.ref[nn.Module]


class AutoPatch:
    """Patches models as they are built, until it is removed; made by `hess_plugin.auto_patch`.

    Attributes:
        models: what was patched so far.
        refusals: why a model that an adapter claims was not patched, one sentence each.
        last_built: the last module that was built and is nobody's, its class and where that is from, or None.
    """

    def __init__(self, profile: Profile | None, options: dict[str, Any], record: Path | None) -> None:
        self.models: list[PatchedModel] = []
        self.refusals: list[str] = []
        self.last_built: str | None = None
        self._profile, self._options, self._record = profile, {"unfit": "dense", **options}, record
        self._strict = bool(options.get("strict", True))
        self._manager = _manager()
        self._claims = Claims(self._manager, options.get("adapter"))
        self._waiting = Waiting(self._patch, self._refuse)
        self._copies: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._process = os.getpid()
        self._end: Any = None
        self._spoken: tuple[str, ...] = ()
        self._inherited = self._patched_already = 0
        self._finished = 0

    @property
    def copies(self) -> int:
        """Models that were built patched, as copies of one are, or that hold one."""
        return self._patched_already

    @property
    def waiting(self) -> list[str]:
        """Classes of the models whose weights are still to come."""
        return self._waiting.models

    @property
    def active(self) -> bool:
        """Whether models are still patched as they are built."""
        return self._end is not None

    def begin(self, spoken: tuple[str, ...]) -> None:
        """Start to look at what is built, and say at the program's end what is `spoken` of (see `begin`)."""
        self._end, self._spoken = listen(self.built), spoken
        atexit.register(self._finish)
        # Forked workers of multiprocessing end without exit handlers, and know only finalizers of their own.
        util.Finalize(None, self._finish, exitpriority=0)
        util.register_after_fork(self, AutoPatch._in_worker)

    def _in_worker(self) -> None:
        """Begin to count anew in a forked worker, which speaks of what happens in it alone."""
        self._process, self._inherited, self.refusals = os.getpid(), len(self.models), []
        self._spoken = tuple(word for word in self._spoken if word != "nothing")
        for found in self.models:
            found.patch.reset()
        util.Finalize(None, self._finish, exitpriority=0)

    def used(self) -> list[PatchedModel]:
        """The models to speak of: all but those of a parent process that a forked worker never called."""
        return [m for n, m in enumerate(self.models) if n >= self._inherited or m.patch.was_called()]

    def remove(self) -> None:
        """End it and unpatch every model that the program still has; a second call does nothing."""
        if self._end is None:
            return
        self._end()
        self._end = None
        self._waiting.end()
        for found in self.models:
            found.patch.remove()
        for copy in list(self._copies):
            _unpatch(weakref.ref(copy))

    def __repr__(self) -> str:
        state = "active" if self.active else "removed" if self._spoken else "off"
        return f"<AutoPatch, {state}, {len(self.models)} models patched>"

    def __enter__(self) -> AutoPatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def built(self, module: nn.Module) -> None:
        """Look at a module that was just built; whatever goes wrong here must not stop the program."""
        try:
            adapters = self._claims.of(module)
            if not adapters:
                self.last_built = f"{type(module).__name__} ({type(module).__module__})"
            elif is_patched(module):
                self._patched_already += 1
                self._copies.add(module)  # or a model around one that is patched
            elif len(adapters) > 1:
                self._refuse(module, self._claims.quarrel(adapters))
            else:
                self._take(module, adapters[0])
        except Exception as error:  # whatever a stranger's adapter raises
            self._refuse(module, _told(error))

    def _take(self, module: nn.Module, adapter: str) -> None:
        if self._profile is None or not self._strict:
            self._patch(module, adapter)
            return
        if self._profile.adapter != adapter:
            raise PatchError(
                f"the profile is of adapter {self._profile.adapter!r} and this model of {adapter!r}; calibrate it, or "
                "leave the profile out for uniform budgets."
            )
        self._waiting.for_weights(module, self._profile, self._claims.adapter(adapter))

    def _patch(self, module: nn.Module, adapter: str) -> None:
        try:
            options = {**self._options, "adapter": adapter}
            handle = patch(module, profile=self._profile, manager=self._manager, **options)
        except Exception as error:  # whatever a stranger's adapter raises
            self._refuse(module, _told(error))
            return
        leave_out(module)  # a program that saves its model gets a file that loads without
        known = weakref.ref(module)
        handle.release(lambda: _unpatch(known))  # a program that drops its model gets its memory back
        self.models.append(PatchedModel(type(module).__name__, adapter, handle, known))

    def _refuse(self, module: nn.Module, why: str) -> None:
        text = f"{type(module).__name__} was not patched: {why}"
        if text not in self.refusals:
            self.refusals.append(text)
            say(text)

    def _finish(self) -> None:
        """Tell what was done; runs when the program ends, in the process that began."""
        if self._finished == self._process or os.getpid() != self._process:
            return
        self._finished = self._process
        from .summary import finish

        finish(self, self._record, self._spoken)


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, HessError) else f"{type(error).__name__}: {text}"


def _unpatch(known: weakref.ref[nn.Module]) -> None:
    model = known()
    if model is not None and is_left_out(model):  # else the program has patched it anew
        unpatch(model)


def _manager() -> Registry:
    """A plugin manager; what is wrong with installed adapters is said as the rest is, not warned of in the program."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = get_plugin_manager()
    for warning in caught:
        say(str(warning.message))
    return made
