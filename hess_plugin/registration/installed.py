"""Installed adapters: found through entry points; a broken one is named and left out, a disabled one left out."""

from __future__ import annotations

import os
import re
import warnings
from importlib import metadata

from hess_plugin import hookspecs
from hess_plugin.exceptions import AdapterError

from .registry import LeftOut, Origin, Registry, cause_of, register

DISABLE = "HESS_DISABLE_PLUGINS"


def register_installed(manager: Registry) -> None:
    """Register every installed adapter that works and is not disabled, and note the others in `manager.left_out`.

    ``HESS_DISABLE_PLUGINS`` lists names of adapters, or of the packages that bring them, separated by commas.
    """
    unwanted = _disabled()
    for entry in sorted(metadata.entry_points(group=hookspecs.PROJECT), key=_order):
        origin = _origin(entry)
        if {_normalised(entry.name), _normalised(origin.package or "")} & unwanted:
            manager.left_out.append(LeftOut(entry.name, entry.value, origin, "disabled", f"{DISABLE} names it"))
            continue
        try:
            register(manager, entry.load(), entry.name, origin)
        except (Exception, SystemExit) as error:  # whatever a stranger's module raises while it is imported
            why = _why(error, entry.name, origin)
            manager.left_out.append(LeftOut(entry.name, entry.value, origin, "broken", why))
            _warn(entry.name, origin, why)


def _why(error: BaseException, name: str, origin: Origin) -> str:
    if isinstance(error, AdapterError):
        return str(error).removeprefix(f"adapter {name!r} of {origin}").strip().rstrip(".")
    return f"cannot be imported ({cause_of(error)})"


def _warn(name: str, origin: Origin, why: str) -> None:
    # At this line and not at the caller's, so that a process that makes several managers is told once.
    warnings.warn(
        f"adapter {name!r} of {origin} was left out: it {why}. Repair or uninstall {origin.package}, or leave it out "
        f"without this warning: {DISABLE}={origin.package}.",
        RuntimeWarning,
        stacklevel=1,
    )


def _disabled() -> set[str]:
    return {_normalised(name) for name in os.environ.get(DISABLE, "").split(",") if name.strip()}


def _normalised(name: str) -> str:
    """Names of packages are the same however they are spelt; so are those of adapters here."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _order(entry: metadata.EntryPoint) -> tuple[str, str]:
    return entry.name, _origin(entry).package or ""


def _origin(entry: metadata.EntryPoint) -> Origin:
    """The package of an entry point; half removed, it may have lost its own name."""
    try:
        package, version = (entry.dist.name, entry.dist.version) if entry.dist else (None, None)
    except Exception:  # metadata that is damaged fails in as many ways as there are Python versions
        package, version = None, None
    return Origin(package or entry.value.partition(":")[0].partition(".")[0], version)
