"""Finding adapters: the built-in ones by name, installed ones through entry points, one for each model."""

from __future__ import annotations

import importlib
import warnings
from importlib import metadata
from typing import TYPE_CHECKING

import pluggy
from torch import nn

from . import hookspecs
from .adapting import Adapter
from .exceptions import AdapterError, AmbiguousModel, UnknownModel

if TYPE_CHECKING:
    import torch

BUILT_IN = {
    "vggt": "hess_plugin.adapters.vggt",
    "pi3": "hess_plugin.adapters.pi3",
    "demo": "hess_plugin.demo.loader",
}
GUIDE = "hess_plugin/adapters/README.md"


def get_plugin_manager(*, entry_points: bool = True) -> pluggy.PluginManager:
    """Make a plugin manager with the built-in adapters and, if wanted, every installed one.

    There is no global manager: each call reads the environment afresh.

    Raises:
        AdapterError: a built-in adapter has a hook that is not in the contract.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    for name, module in BUILT_IN.items():
        register(manager, importlib.import_module(module), name)
    if entry_points:
        _register_entry_points(manager)
    return manager


def register(manager: pluggy.PluginManager, plugin: object, name: str) -> None:
    """Register one adapter and refuse hooks that the contract does not know.

    Raises:
        AdapterError: a hook is misspelt, not marked with `hookimpl`, or takes an argument the contract does not
            give, or the plugin's name is taken. The manager is then as before.
    """
    unmarked = [h for h in hook_names() if hasattr(plugin, h) and manager.parse_hookimpl_opts(plugin, h) is None]
    if unmarked:
        raise AdapterError(f"adapter {name!r} defines {unmarked[0]} without @hess_plugin.hookimpl; mark it.")
    try:
        manager.register(plugin, name)
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        if manager.get_plugin(name) is plugin:
            manager.unregister(plugin)
        raise AdapterError(
            f"adapter {name!r} does not fit the contract: {_one_line(error)}; compare its hooks with "
            f"hess_plugin.hookspecs ({', '.join(hook_names())})."
        ) from error


def hook_names() -> list[str]:
    """List the hooks of the contract."""
    return [name for name in vars(hookspecs) if name.startswith("hess_")]


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
    known = sorted(name for name, plugin in manager.list_name_plugin() if plugin is not None)
    if name is not None:
        if name not in known:
            raise UnknownModel(f"no adapter is called {name!r}; known: {', '.join(known)}.")
        return Adapter(name, manager)
    claims = [n for n in known if _claims(Adapter(n, manager), model)]
    kind = f"{type(model).__name__} ({type(model).__module__})"
    if not claims:
        raise UnknownModel(f"no adapter claims {kind}; known: {', '.join(known)}; write one: {GUIDE}.")
    if len(claims) > 1:
        raise AmbiguousModel(
            f"{kind} is claimed by {' and '.join(claims)}; choose one with adapter=NAME (--adapter NAME)."
        )
    return Adapter(claims[0], manager)


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


def _claims(adapter: Adapter, model: nn.Module) -> bool:
    """Ask one adapter; one that fails on a model it does not know must not keep the others from answering."""
    try:
        return True in adapter.call("hess_claim_model", model=model)
    except Exception as error:
        warnings.warn(
            f"adapter {adapter.name!r} failed when asked whether it knows {type(model).__name__} "
            f"({type(error).__name__}: {_one_line(error)}) and was left out; repair its hess_claim_model.",
            RuntimeWarning,
            stacklevel=4,
        )
        return False


def load_model(
    name: str,
    weights: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    manager: pluggy.PluginManager | None = None,
) -> nn.Module:
    """Build a model by name through the adapters (`hess_load_model`).

    Raises:
        UnknownModel: no adapter loads a model of this name.
    """
    manager = manager or get_plugin_manager()
    model = manager.hook.hess_load_model(name=name, weights=weights, device=device, dtype=dtype)
    if model is None:
        loaders = sorted(n for n, p in manager.list_name_plugin() if p is not None and hasattr(p, "hess_load_model"))
        raise UnknownModel(f"no adapter loads a model called {name!r}; adapters that load: {', '.join(loaders)}.")
    return model


def describe_plugins(manager: pluggy.PluginManager | None = None) -> list[dict[str, object]]:
    """Describe every registered adapter: name, module, package with version, the hooks it implements."""
    manager = manager or get_plugin_manager()
    packages = {entry.name: entry.dist for entry in metadata.entry_points(group=hookspecs.PROJECT)}
    described: list[dict[str, object]] = []
    for name, plugin in sorted(manager.list_name_plugin()):
        if plugin is None:
            continue
        owner = None if name in BUILT_IN else packages.get(name)
        marked = {caller.name for caller in manager.get_hookcallers(plugin) or ()}  # without the marker it is no hook
        described.append(
            {
                "name": name,
                "module": getattr(plugin, "__name__", type(plugin).__name__),
                "package": "hess-plugin" if owner is None else f"{owner.name} {owner.version}",
                "hooks": [hook for hook in hook_names() if hook in marked],
            }
        )
    return described


def _register_entry_points(manager: pluggy.PluginManager) -> None:
    """Register installed adapters; one that cannot be imported is named and left out, the others stay."""
    for entry in sorted(metadata.entry_points(group=hookspecs.PROJECT), key=lambda entry: entry.name):
        try:
            register(manager, entry.load(), entry.name)
        except Exception as error:  # whatever a stranger's module raises while it is imported
            owner = entry.dist.name if entry.dist else entry.value
            warnings.warn(
                f"adapter {entry.name!r} of package {owner!r} was left out: {_one_line(error)} "
                f"(uninstall or repair {owner!r} to end this warning).",
                RuntimeWarning,
                stacklevel=3,
            )


def _one_line(error: Exception) -> str:
    """Squeeze an error into one line without its final full stop."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
