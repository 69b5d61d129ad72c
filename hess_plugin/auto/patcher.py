"""`auto_patch`: patch every model that an adapter knows, the moment it is built or its weights are loaded."""

from __future__ import annotations

import atexit
import inspect
import os
import warnings
import weakref
from dataclasses import dataclass
from multiprocessing import util
from pathlib import Path
from typing import Any

from torch import nn

import hess_plugin_cuda
from hess_plugin.exceptions import HessError, PatchError
from hess_plugin.following import check_verdict
from hess_plugin.handle import Patch
from hess_plugin.interception import is_patched
from hess_plugin.patching import check_unfit, make_settings, patch, unpatch
from hess_plugin.pickling import leave_out
from hess_plugin.plugins import get_plugin_manager
from hess_plugin.profiles import Profile
from hess_plugin.registration.registry import Registry
from hess_plugin.settings import Settings

from .building import listen
from .claims import Claims
from .environment import OPTIONS, is_off, options_in_environment
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


def auto_patch(
    profile: Profile | str | Path | None = None,
    *,
    record: str | Path | None = None,
    summary: bool = True,
    **options: Any,
) -> AutoPatch:
    """Patch every model that an adapter claims, from now on, wherever this program builds one.

    One line before the first model is built; nothing else changes::

        hess_plugin.auto_patch(sparsity=0.73)

    Without a profile a model is patched when its constructor returns. With one, whose traces are bound to weights, it
    is patched when they are loaded (``load_state_dict``) or, at the latest, when it is first called; a model with
    other weights, or of another family, stays as it is, and that is said on standard error. Attention calls that
    cannot be made sparse run dense. What was patched, and the sparsity that was measured, is printed on standard error
    when the program ends.

    The environment variable ``HESS_AUTO_PATCH`` gives what a call leaves open, as ``sparsity=0.85,profile=vggt.hess``
    or as JSON; ``HESS_AUTO_PATCH=off`` patches nothing.

    Args:
        profile: a calibrated `Profile` or its file; None divides budgets uniformly.
        record: JSON file to which this process adds its report when it ends.
        summary: print a summary when the program ends.
        **options: of `hess_plugin.patch`.

    Returns:
        The handle: `AutoPatch.models` tells what was patched, `AutoPatch.remove` ends it and unpatches them.

    Raises:
        PatchError: an option that `patch` does not have, or a value out of range.
        ProfileError: the profile cannot be read.
    """
    return begin(profile, options, record=record, spoken=("patched", "nothing") if summary else ())


def begin(
    profile: Profile | str | Path | None,
    options: dict[str, Any],
    *,
    record: str | Path | None,
    spoken: tuple[str, ...],
) -> AutoPatch:
    """Begin as `auto_patch` does.

    Args:
        profile: as there.
        options: as there.
        record: as there.
        spoken: what to print when the program ends: ``patched``, what was done to each model; ``nothing``, why no
            model was patched.
    """
    outside = options_in_environment()
    try:
        check_options({name: value for name, value in outside.items() if name != "profile"}, None, guided=True)
    except PatchError as error:
        raise PatchError(f"in the variable {OPTIONS}: {error}") from error
    given = outside | options
    profile = given.pop("profile", None) if profile is None else profile
    given.pop("profile", None)
    if isinstance(profile, (str, Path)):
        profile = Profile.load(profile)  # now: a relative path may mean another file later
    check_options(given, profile)
    made = AutoPatch(profile, given, None if record is None else Path(record).absolute())
    if not is_off():
        made.begin(spoken)
    return made


def check_options(options: dict[str, Any], profile: Profile | None, *, guided: bool = False) -> None:
    """Check options of `patch` before there is a model.

    Raises:
        PatchError: an option that `patch` does not have, or a value out of range.
    """
    known = [name for name in inspect.signature(patch).parameters if name not in ("model", "profile", "manager")]
    for name in options:
        if name not in known:
            raise PatchError(f"there is no option {name!r}; wanted one of {', '.join(known)}.")
    check_verdict(options.get("verdict", "follow"))
    check_unfit(options.get("unfit", "dense"))
    if not isinstance(options.get("strict", True), bool):
        raise PatchError(f"strict is {options['strict']!r}, wanted true or false.")
    backends = ("auto", *hess_plugin_cuda.available_backends())
    if options.get("backend", "auto") not in backends:
        raise PatchError(f"backend is {options['backend']!r}, wanted one of {', '.join(backends)}.")
    if profile is not None and not isinstance(profile, Profile):
        raise PatchError(f"profile is of type {type(profile).__name__}, wanted a Profile or the name of its file.")
    settings = {name: value for name, value in options.items() if name in Settings.__dataclass_fields__}
    if settings.get("dense_below", 0) is None:
        del settings["dense_below"]
    made = make_settings(guided=guided or profile is not None, **settings)
    if not guided and profile is None and made.allocation not in ("uniform", "equal"):
        raise PatchError(
            f"allocation {made.allocation!r} divides budgets by a profile and none was given; give a profile."
        )


class AutoPatch:
    """Patches models as they are built, until it is removed; made by `auto_patch`.

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
        self._process, self._inherited = os.getpid(), len(self.models)
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
            unpatch(copy)

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
    if model is not None:
        unpatch(model)


def _manager() -> Registry:
    """A plugin manager; what is wrong with installed adapters is said as the rest is, not warned of in the program."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = get_plugin_manager()
    for warning in caught:
        say(str(warning.message))
    return made
