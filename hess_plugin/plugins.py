"""Finding adapters: built-in ones by name, installed ones and named files; and the one that a model belongs to."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING

import pluggy
from torch import nn

from .adapting import Adapter
from .exceptions import AmbiguousModel, HessError, UnknownModel
from .registration.files import register_files
from .registration.installed import register_installed
from .registration.registry import LeftOut, Registry, called, cause_of, hook_names, one_line, register

if TYPE_CHECKING:
    import torch

__all__ = [
    "BUILT_IN",
    "describe_plugins",
    "get_plugin_manager",
    "hook_names",
    "load_model",
    "register",
    "require_claim",
    "resolve_adapter",
]

BUILT_IN = {
    "vggt": "hess_plugin.adapters.vggt",
    "pi3": "hess_plugin.adapters.pi3",
    "da3": "hess_plugin.adapters.da3",
    "vggt-omega": "hess_plugin.adapters.vggt_omega",
    "mapanything": "hess_plugin.adapters.mapanything",
    "demo": "hess_plugin.demo.loader",
}
GUIDE = "hess_plugin/adapters/README.md"


def get_plugin_manager(*, entry_points: bool = True) -> Registry:
    """Make a plugin manager with the built-in adapters and, if wanted, those of others.

    There is no global manager: each call reads the environment afresh.

    Args:
        entry_points: take installed adapters, but for those that ``HESS_DISABLE_PLUGINS`` names, and adapters in files
            that ``HESS_PLUGINS`` names. An installed one that is broken is warned of and left out.

    Raises:
        AdapterError: a file that was named cannot be used.
    """
    manager = Registry()
    for name, module in BUILT_IN.items():
        register(manager, importlib.import_module(module), name)
    if entry_points:
        register_installed(manager)
        register_files(manager)
    return manager


def resolve_adapter(model: nn.Module, name: str | None = None, manager: pluggy.PluginManager | None = None) -> Adapter:
    """Find the one adapter that claims a model.

    Args:
        model: any module.
        name: skip the claims and take the adapter of this name.
        manager: plugin manager; a fresh one by default.

    Raises:
        UnknownModel: no adapter claims the model, or none has this name.
        AmbiguousModel: two or more claim it.
    """
    if not isinstance(model, nn.Module):
        raise UnknownModel(f"a model of type {type(model).__name__} was given, wanted a torch.nn.Module.")
    manager = manager or get_plugin_manager()
    known = sorted(_names(manager))
    if name is not None:
        if name not in known:
            raise UnknownModel(f"no adapter is called {name!r}; known: {', '.join(known)}{_missing(manager)}.")
        return Adapter(name, manager)
    claims = [n for n in known if _claims(Adapter(n, manager), model)]
    kind = f"{type(model).__name__} ({type(model).__module__})"
    if not claims:
        raise UnknownModel(
            f"no adapter claims {kind}; known: {', '.join(known)}{_missing(manager)}; write one: {GUIDE}."
        )
    if len(claims) > 1:
        raise AmbiguousModel(claimed_twice(kind, claims, manager))
    return Adapter(claims[0], manager)


def claimed_twice(kind: str, names: list[str], manager: pluggy.PluginManager) -> str:
    """Say who claims a model that several adapters claim, and what to do about it."""
    origins = getattr(manager, "origins", {})
    packages = [origins[name].package for name in names if name in origins and origins[name].package]
    out = f", or leave a package out with HESS_DISABLE_PLUGINS={packages[0]}" if packages else ""
    claimants = " and ".join(called(manager, n).removeprefix("adapter ") if n in origins else n for n in names)
    return f"{kind} is claimed by {claimants}; choose one with adapter=NAME (--adapter NAME){out}."


def require_claim(model: nn.Module, name: str, manager: pluggy.PluginManager | None = None) -> Adapter:
    """Find the adapter of this name, which must claim the model: for names that a person typed.

    Raises:
        UnknownModel: no adapter has this name, or it does not claim the model.
    """
    adapter = resolve_adapter(model, name, manager)
    if not _claims(adapter, model):
        raise UnknownModel(
            f"adapter {name!r} does not claim {type(model).__name__}; leave the adapter out to have the one found that "
            "does."
        )
    return adapter


def load_model(
    name: str,
    weights: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    manager: pluggy.PluginManager | None = None,
) -> nn.Module:
    """Build a model by name through the adapters (`hess_load_model`): the built-in ones are asked first.

    Raises:
        UnknownModel: no adapter loads a model of this name.
        AdapterError: an adapter failed, or returned something other than a model in eval mode.
    """
    manager = manager or get_plugin_manager()
    failed: list[HessError] = []
    for asked in _loading_order(manager):
        try:
            model = Adapter(asked, manager).load(name, weights, device, dtype)
        except HessError as error:  # perhaps this model is another adapter's
            failed.append(error)
            continue
        if model is not None:
            for problem in failed:
                warnings.warn(f"while {name!r} was looked for: {problem}", RuntimeWarning, stacklevel=2)
            return model
    if failed:
        raise failed[0]
    loaders = sorted(n for n, p in _names(manager).items() if hasattr(p, "hess_load_model"))
    raise UnknownModel(
        f"no adapter loads a model called {name!r}; adapters that load: {', '.join(loaders)}{_missing(manager)}."
    )


def describe_plugins(manager: pluggy.PluginManager | None = None) -> list[dict[str, object]]:
    """Describe every adapter, sorted by name.

    Returns:
        For each: ``name``; ``module``; ``package`` with its version, None for a ``file``; the ``hooks`` it implements;
        its ``status``, ``ok``, ``disabled`` or ``broken``, and ``why`` where it is not ``ok``.
    """
    manager = manager or get_plugin_manager()
    described: list[dict[str, object]] = []
    for name, plugin in _names(manager).items():
        origin = getattr(manager, "origins", {}).get(name)
        marked = {caller.name for caller in manager.get_hookcallers(plugin) or ()}  # without the marker it is no hook
        package = "hess-plugin" if name in BUILT_IN else None
        described.append(
            {
                "name": name,
                "module": getattr(plugin, "__name__", type(plugin).__name__),
                "package": str(origin).removeprefix("package ") if origin and origin.package else package,
                "file": origin.file if origin else None,
                "hooks": [hook for hook in hook_names() if hook in marked],
                "status": "ok",
                "why": None,
            }
        )
    for left in _left_out(manager):
        described.append(
            {
                "name": left.name,
                "module": left.module,
                "package": str(left.origin).removeprefix("package "),
                "file": None,
                "hooks": [],
                "status": left.status,
                "why": left.why,
            }
        )
    return sorted(described, key=lambda plugin: str(plugin["name"]))


def _names(manager: pluggy.PluginManager) -> dict[str, object]:
    return {name: plugin for name, plugin in manager.list_name_plugin() if plugin is not None}


def _left_out(manager: pluggy.PluginManager) -> list[LeftOut]:
    return getattr(manager, "left_out", [])


def _missing(manager: pluggy.PluginManager) -> str:
    """Name the adapters that were left out: one of them may be the one looked for."""
    names = [f"{left.name} ({left.status})" for left in _left_out(manager)]
    return f"; left out: {', '.join(names)}, see hess-patch plugins" if names else ""


def _loading_order(manager: pluggy.PluginManager) -> list[str]:
    """Built-in adapters, then files, then installed ones, so that no stranger stands before one of ours."""
    origins = getattr(manager, "origins", {})
    return sorted(_names(manager), key=lambda name: 0 if name not in origins else 1 if origins[name].file else 2)


def _claims(adapter: Adapter, model: nn.Module) -> bool:
    """Ask one adapter; one that fails on a model it does not know must not keep the others from answering."""
    try:
        answers = adapter.ask("hess_claim_model", model=model)
    except Exception as error:
        cause = cause_of(error, adapter.file_of("hess_claim_model"))
        what = f"failed when asked whether it knows {type(model).__name__} ({cause})"
    else:
        strange = [answer for answer in answers if not isinstance(answer, bool)]
        if not strange:
            return True in answers
        what = (
            f"answered whether it knows {type(model).__name__} with {one_line(strange[0])[:60]!r} of type "
            f"{type(strange[0]).__name__}, wanted True, False or None,"
        )
    origin = getattr(adapter.manager, "origins", {}).get(adapter.name)
    way_out = f", or leave it out: HESS_DISABLE_PLUGINS={origin.package}" if origin and origin.package else ""
    warnings.warn(
        f"{called(adapter.manager, adapter.name)} {what} and was left out; repair its hess_claim_model{way_out}.",
        RuntimeWarning,
        stacklevel=4,
    )
    return False
