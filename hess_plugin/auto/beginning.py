"""`auto_patch`: one line, or one variable, and every model that this program builds is patched."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import hess_plugin_cuda
from hess_plugin.exceptions import PatchError
from hess_plugin.following import check_verdict
from hess_plugin.patching import patch
from hess_plugin.profiles import Profile
from hess_plugin.settings import Settings, check_unfit, make_settings

from .environment import OPTIONS, is_off, options_in_environment
from .patcher import AutoPatch


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
    fields = {"preset", *Settings.__dataclass_fields__}
    settings = {name: value for name, value in options.items() if name in fields}
    if settings.get("dense_below", 0) is None:
        del settings["dense_below"]
    made = make_settings(profile=profile, **settings)
    if not guided and profile is None and made.allocation not in ("uniform", "equal"):
        raise PatchError(
            f"allocation {made.allocation!r} divides budgets by a profile and none was given; give a profile."
        )
