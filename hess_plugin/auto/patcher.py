"""`auto_patch`: patch every model that an adapter knows, the moment it is built or its weights are loaded."""

from __future__ import annotations

import atexit
import inspect
import os
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hess_plugin.exceptions import HessError, PatchError
from hess_plugin.handle import Patch
from hess_plugin.interception import is_patched
from hess_plugin.patching import make_settings, patch, unpatch
from hess_plugin.pickling import leave_out
from hess_plugin.plugins import get_plugin_manager
from hess_plugin.profiles import Profile
from hess_plugin.settings import Settings

from .building import listen
from .claims import Claims
from .environment import is_off, options_in_environment
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
    given = options_in_environment() | options
    profile = given.pop("profile", None) if profile is None else profile
    given.pop("profile", None)
    if isinstance(profile, (str, Path)):
        profile = Profile.load(profile)  # now: a relative path may mean another file later
    check_options(given, profile)
    made = AutoPatch(profile, given, None if record is None else Path(record).absolute())
    if not is_off():
        made.begin(spoken)
    return made


def check_options(options: dict[str, Any], profile: Profile | None) -> None:
    """Check options of `patch` before there is a model.

    Raises:
        PatchError: an option that `patch` does not have, or a value out of range.
    """
    known = [name for name in inspect.signature(patch).parameters if name not in ("model", "profile", "manager")]
    for name in options:
        if name not in known:
            raise PatchError(f"there is no option {name!r}; wanted one of {', '.join(known)}.")
    settings = {name: value for name, value in options.items() if name in Settings.__dataclass_fields__}
    if settings.get("dense_below", 0) is None:
        del settings["dense_below"]
    made = make_settings(guided=profile is not None, **settings)
    if profile is None and made.allocation not in ("uniform", "equal"):
        raise PatchError(
            f"allocation {made.allocation!r} divides budgets by a profile and none was given; give a profile."
        )


class AutoPatch:
    """Patches models as they are built, until it is removed; made by `auto_patch`.

    Attributes:
        models: what was patched so far.
        refusals: why a model that an adapter claims was not patched, one sentence each.
        last_built: class of the last module that was built and is nobody's, or None.
    """

    def __init__(self, profile: Profile | None, options: dict[str, Any], record: Path | None) -> None:
        self.models: list[PatchedModel] = []
        self.refusals: list[str] = []
        self.last_built: type[nn.Module] | None = None
        self._profile, self._options, self._record = profile, {"unfit": "dense", **options}, record
        self._strict = bool(options.get("strict", True))
        self._manager = get_plugin_manager()
        self._claims = Claims(self._manager, options.get("adapter"))
        self._waiting = Waiting()
        self._process = os.getpid()
        self._end: Any = None
        self._spoken: tuple[str, ...] = ()

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
        self._end, self._spoken = listen(self._built), spoken
        atexit.register(self._finish)

    def remove(self) -> None:
        """End it and unpatch every model that the program still has; a second call does nothing."""
        if self._end is None:
            return
        self._end()
        self._end = None
        self._waiting.end()
        for found in self.models:
            model = found.model()
            if model is not None:
                unpatch(model)

    def __enter__(self) -> AutoPatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _built(self, module: nn.Module) -> None:
        """Look at a module that was just built; whatever goes wrong here must not stop the program."""
        try:
            adapters = self._claims.of(module)
            if not adapters:
                self.last_built = type(module)
            elif len(adapters) > 1:
                self._refuse(
                    module, f"{' and '.join(adapters)} claim it; choose one with adapter=NAME (--adapter NAME)."
                )
            elif not is_patched(module):
                self._take(module, adapters[0])
        except HessError as error:
            self._refuse(module, str(error))
        except Exception as error:  # whatever a stranger's adapter raises
            self._refuse(module, f"{type(error).__name__}: {' '.join(str(error).split())}")

    def _take(self, module: nn.Module, adapter: str) -> None:
        if self._profile is None or not self._strict:
            self._patch(module, adapter)
            return
        if self._profile.adapter != adapter:
            raise PatchError(
                f"the profile is of adapter {self._profile.adapter!r} and this model of {adapter!r}; calibrate it, or "
                "leave the profile out for uniform budgets."
            )
        self._waiting.for_weights(module, self._profile, self._claims.adapter(adapter), self._patch)

    def _patch(self, module: nn.Module, adapter: str) -> None:
        try:
            options = {**self._options, "adapter": adapter}
            handle = patch(module, profile=self._profile, manager=self._manager, **options)
        except HessError as error:
            self._refuse(module, str(error))
            return
        leave_out(module)  # a program that saves its model gets the file that it would
        handle.release()  # a program that drops its model gets its memory back
        self.models.append(PatchedModel(type(module).__name__, adapter, handle, weakref.ref(module)))

    def _refuse(self, module: nn.Module, why: str) -> None:
        text = f"{type(module).__name__} was not patched: {why}"
        if text not in self.refusals:
            self.refusals.append(text)
            sys.stderr.write(f"hess-patch: {text}\n")

    def _finish(self) -> None:
        """Tell what was done; runs when the program ends, in the process that began."""
        if os.getpid() != self._process:
            return
        from .summary import finish

        finish(self, self._record, self._spoken)
