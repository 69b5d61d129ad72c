"""Asking every adapter about every module that is built, at a price that nobody notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pluggy
from torch import nn

from hess_plugin.adapting import Adapter
from hess_plugin.exceptions import UnknownModel
from hess_plugin.plugins import claimed_twice
from hess_plugin.registration.registry import called

from .saying import say


class Claims:
    """The claims of a manager's adapters; of one that fails this is told once.

    Args:
        manager: with the adapters.
        only: name of the one adapter to ask, or None for all.

    Raises:
        UnknownModel: no adapter is called `only`.
    """

    def __init__(self, manager: pluggy.PluginManager, only: str | None) -> None:
        self._manager, self._told = manager, set[str]()
        plugins = {name: plugin for name, plugin in manager.list_name_plugin() if plugin is not None}
        if only is not None and only not in plugins:
            raise UnknownModel(f"no adapter is called {only!r}; known: {', '.join(sorted(plugins))}.")
        self._hooks: dict[str, Callable[..., Any]] = {
            name: manager.subset_hook_caller("hess_claim_model", [p for n, p in plugins.items() if n != name])
            for name in ([only] if only else sorted(plugins))
        }

    def of(self, module: nn.Module) -> list[str]:
        """Names of the adapters that claim a module."""
        return [name for name, hook in self._hooks.items() if self._claims(name, hook, module)]

    def quarrel(self, names: list[str]) -> str:
        """Say which of several adapters claim one model, and what to do about it."""
        return claimed_twice("it", names, self._manager)

    def adapter(self, name: str) -> Adapter:
        """Return one of the adapters."""
        return Adapter(name, self._manager)

    def _claims(self, name: str, hook: Callable[..., Any], module: nn.Module) -> bool:
        try:
            return any(answer is True for answer in hook(model=module))
        except Exception as error:  # neither a stranger's adapter nor an odd module may stop the program
            if name in self._told:
                return False
            self._told.add(name)
            who, kind = called(self._manager, name), type(module).__name__
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            say(f"{who} failed when asked about {kind} ({what}), which is taken as a no; repair its hess_claim_model.")
            return False
