"""Waiting for an import."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hess_plugin.auto.imports import after_import

NAME = "hess_plugin_test_awaited"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a module that nothing has imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    finders = list(sys.meta_path)
    path = tmp_path / f"{NAME}.py"
    path.write_text("VALUE = 1\ndef function():\n    return VALUE\n", encoding="utf-8")
    importlib.invalidate_caches()
    yield path
    sys.modules.pop(NAME, None)
    sys.meta_path[:] = finders


def test_it_is_called_once_when_the_module_is_complete(module: Path) -> None:
    values: list[int] = []
    finders = list(sys.meta_path)
    after_import(NAME, lambda: values.append(sys.modules[NAME].VALUE))
    assert values == []
    importlib.import_module(NAME)
    importlib.import_module(NAME)
    assert values == [1] and sys.meta_path == finders


def test_an_imported_module_is_not_waited_for(module: Path) -> None:
    importlib.import_module(NAME)
    called: list[int] = []
    after_import(NAME, lambda: called.append(1))
    assert called == [1]


def test_the_module_is_what_it_would_be(module: Path) -> None:
    after_import(NAME, lambda: None)
    first = importlib.import_module(NAME)
    kinds = [type(first.__loader__), type(first.__spec__.loader), first.__file__, inspect.getsource(first.function)]  # type: ignore[union-attr]
    del sys.modules[NAME]
    second = importlib.import_module(NAME)
    assert kinds == [
        type(second.__loader__),
        type(second.__spec__.loader),  # type: ignore[union-attr]
        second.__file__,
        inspect.getsource(second.function),
    ]


def test_looking_for_a_module_is_not_importing_it(module: Path) -> None:
    called: list[int] = []
    after_import(NAME, lambda: called.append(1))
    spec = importlib.util.find_spec(NAME)
    assert spec is not None and spec.origin == str(module) and spec.loader is not None and called == []
    assert spec.loader.get_source(NAME).startswith("VALUE")  # type: ignore[attr-defined]
    importlib.import_module(NAME)
    assert called == [1]


def test_a_failed_import_is_waited_for_again(module: Path) -> None:
    called: list[int] = []
    after_import(NAME, lambda: called.append(1))
    module.write_text("raise ImportError('later')\n", encoding="utf-8")
    with pytest.raises(ImportError, match="later"):
        importlib.import_module(NAME)
    assert called == []
    module.write_text("VALUE = 22\n", encoding="utf-8")
    importlib.invalidate_caches()
    importlib.import_module(NAME)
    assert called == [1]


def test_a_module_that_does_not_exist_is_told_as_ever() -> None:
    finders = list(sys.meta_path)
    after_import("hess_plugin_no_such_module", lambda: None)
    with pytest.raises(ModuleNotFoundError, match="No module named 'hess_plugin_no_such_module'"):
        importlib.import_module("hess_plugin_no_such_module")
    sys.meta_path[:] = finders
