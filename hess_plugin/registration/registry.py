"""A plugin manager that knows where each adapter comes from, and which adapters were left out and why."""

from __future__ import annotations

import difflib
import os
import types
from dataclasses import dataclass

import pluggy

from hess_plugin import hookspecs
from hess_plugin.exceptions import AdapterError


@dataclass(frozen=True)
class Origin:
    """Where an adapter that is not built in comes from.

    Attributes:
        package: name of the distribution that was installed, or None.
        version: of the package.
        file: the file that somebody named, or None.
    """

    package: str | None = None
    version: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return f"file {self.file}" if self.file else f"package {self.package} {self.version or ''}".rstrip()


@dataclass(frozen=True)
class LeftOut:
    """An adapter that is installed and not used.

    Attributes:
        name: of its entry point.
        module: that the entry point names.
        origin: its package.
        status: ``disabled`` (by the user) or ``broken``.
        why: one clause.
    """

    name: str
    module: str
    origin: Origin
    status: str
    why: str


class Registry(pluggy.PluginManager):
    """A plugin manager of the contract, with the origins of its adapters.

    Attributes:
        origins: where adapters come from, by name; the built-in ones have no entry.
        left_out: installed adapters that were not registered.
    """

    def __init__(self) -> None:
        super().__init__(hookspecs.PROJECT)
        self.add_hookspecs(hookspecs)
        self.origins: dict[str, Origin] = {}
        self.left_out: list[LeftOut] = []


def hook_names() -> list[str]:
    """List the hooks of the contract."""
    return [name for name in vars(hookspecs) if name.startswith("hess_")]


def called(manager: pluggy.PluginManager, name: str) -> str:
    """What an adapter is called in a message: its name, and its package or file where it has one."""
    origin = getattr(manager, "origins", {}).get(name)
    return f"adapter {name!r}" if origin is None else f"adapter {name!r} of {origin}"


def register(manager: pluggy.PluginManager, plugin: object, name: str, origin: Origin | None = None) -> None:
    """Register one adapter and refuse hooks that the contract does not know.

    Args:
        manager: where to.
        plugin: a module or object with hooks.
        name: what the adapter is called.
        origin: its package or file, for messages.

    Raises:
        AdapterError: it has no hook, one is misspelt, not marked with `hookimpl`, or takes an argument the contract
            does not give, or the plugin's name is taken. The manager is then as before.
    """
    label = f"adapter {name!r}" if origin is None else f"adapter {name!r} of {origin}"
    if manager.has_plugin(name):
        raise AdapterError(f"{label} {_taken(manager, name, origin)}")
    problem = _hooks_that_do_not_fit(manager, plugin)
    if problem is not None:
        raise AdapterError(f"{label} {problem}")
    try:
        manager.register(plugin, name)
    except (pluggy.PluginValidationError, ValueError) as error:
        if manager.get_plugin(name) is plugin:
            manager.unregister(plugin)
        raise AdapterError(f"{label} does not fit the contract: {one_line(error)}; {_compare()}") from error
    if origin is not None and isinstance(manager, Registry):
        manager.origins[name] = origin


def one_line(error: BaseException) -> str:
    """Squeeze an error into one line without its final full stop."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def cause_of(error: BaseException, file: str | None = None) -> str:
    """Say in one clause what went wrong in an adapter's code, with the line where `file` is the adapter's own."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f"{type(error).__name__}: {error.msg} ({os.path.basename(error.filename or '')} line {error.lineno})"
    text = one_line(error)
    text = text if text == type(error).__name__ else f"{type(error).__name__}: {text}"
    line = None if file is None else last_line_in(file, error)
    return text if line is None else f"{text} ({os.path.basename(file or '')} line {line})"


def last_line_in(file: str, error: BaseException) -> int | None:
    """The last line of a file that an error came through, or None."""
    found, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            found = trace.tb_lineno
        trace = trace.tb_next
    return found


def _taken(manager: pluggy.PluginManager, name: str, origin: Origin | None) -> str:
    holder = getattr(manager, "origins", {}).get(name)
    advice = ""
    if origin is None or origin.file:  # for a package, whoever warns says what to do
        advice = "; give it another name" if origin is None else "; rename the file"
        if holder is not None and holder.package:
            advice += f", or leave the package out: HESS_DISABLE_PLUGINS={holder.package}"
    return f"has a name that is taken by {holder or 'hess-plugin itself'}{advice}."


def _hooks_that_do_not_fit(manager: pluggy.PluginManager, plugin: object) -> str | None:
    """Name the first hook that pluggy would overlook or not explain."""
    names, own = hook_names(), [name for name in dir(plugin) if name.startswith("hess_")]
    marked = [name for name in dir(plugin) if manager.parse_hookimpl_opts(plugin, name) is not None]
    for name in own:
        if name in names and name not in marked:
            return f"defines {name} without @hess_plugin.hookimpl; mark it."
    for name in [*marked, *(n for n in own if isinstance(getattr(plugin, n), types.FunctionType | types.MethodType))]:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
        if name not in names and (near or name in marked):
            meant = f", did you mean {near[0]}?" if near else ""
            return f"does not fit the contract: {name} is no hook{meant}; {_compare()}"
    if not marked:
        return "has no hook; mark functions such as hess_claim_model with @hess_plugin.hookimpl."
    return None


def _compare() -> str:
    return f"compare its hooks with hess_plugin.hookspecs ({', '.join(hook_names())})."
