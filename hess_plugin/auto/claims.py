"""Asking every adapter about every module that is built, at a price that nobody notices."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pluggy
from torch import nn

from hess_plugin.adapting import Adapter
from hess_plugin.exceptions import UnknownModel
from hess_plugin.registration.registry import called


class Claims:
    """The claims of a manager's adapters; one that fails is told once and not asked again.

    Args:
        manager: with the adapters.
        only: name of the one adapter to ask, or None for all.

    Raises:
        UnknownModel: no adapter is called `only`.
    """

    def __init__(self, manager: pluggy.PluginManager, only: str | None) -> None:
        self._manager = manager
        plugins = {name: plugin for name, plugin in manager.list_name_plugin() if plugin is not None}
        if only is not None and only not in plugins:
            raise UnknownModel(f"no adapter is called {only!r}; known: {', '.join(sorted(plugins))}.")
        self._hooks: dict[str, Callable[..., Any]] = {
            name: manager.subset_hook_caller("hess_claim_model", [p for n, p in plugins.items() if n != name])
            for name in ([only] if only else sorted(plugins))
        }

    def of(self, module: nn.Module) -> list[str]:
        """Names of the adapters that claim a module."""
        return [name for name, hook in list(self._hooks.items()) if self._claims(name, hook, module)]

    def adapter(self, name: str) -> Adapter:
        """Return one of the adapters."""
        return Adapter(name, self._manager)

    def _claims(self, name: str, hook: Callable[..., Any], module: nn.Module) -> bool:
        try:
            return any(answer is True for answer in hook(model=module))
        except Exception as error:  # a stranger's adapter must not stop the program
            del self._hooks[name]
            who, kind = called(self._manager, name), type(module).__name__
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            sys.stderr.write(
                f"hess-patch: {who} failed when asked about {kind} ({what}) and is left out; repair its "
                "hess_claim_model.\n"
            )
            return False
