"""Waiting for an import: run something right after a module has been imported, whoever imports it."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(name: str, then: Callable[[], None]) -> None:
    """Call `then` once, as soon as the module is imported: now, if it is already.

    The module itself, its spec and its loader are what they would be without.

    Args:
        name: of a top-level module.
        then: called without arguments; what it raises comes out of the program's import statement.
    """
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Finder(name, then))


class _Finder(MetaPathFinder):
    """Finds one module by the finders after it and has its loader report."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self._name, self._then = name, then
        self._asking = threading.local()  # the other finders are asked through the function that asks this one

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name or getattr(self._asking, "now", False):
            return None
        self._asking.now = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking.now = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Reporting(spec.loader, self._loaded)
        return spec

    def _loaded(self) -> None:
        # Only now: a program may look for a spec without importing (is torch installed?), or fail to import.
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            self._then()


class _Reporting(Loader):
    """A loader that steps out of the way of the one it wraps and reports when the module has run."""

    def __init__(self, loader: Any, loaded: Callable[[], None]) -> None:
        self._loader, self._loaded = loader, loaded

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._loaded()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
