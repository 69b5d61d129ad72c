"""Adapters in files of their own, without packaging: named by ``--plugin`` or by the variable ``HESS_PLUGINS``.

Explicitly named, so whatever is wrong with one is an error, not a warning. Nothing of `sys.path` is touched: a file
is imported by itself, under a private name, and has to stand alone.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

from hess_plugin.exceptions import AdapterError

from .registry import Origin, Registry, cause_of, register

VARIABLE = "HESS_PLUGINS"


@dataclass(frozen=True)
class _Loaded:
    source: bytes
    module: ModuleType


_loaded: dict[Path, _Loaded] = {}
_lock = threading.RLock()


def named_files() -> list[Path]:
    """List the files that ``HESS_PLUGINS`` names, in order, each once."""
    given = [part for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part.strip()]
    return list(dict.fromkeys(Path(part).expanduser().resolve() for part in given))


def name_files(paths: Sequence[Path]) -> None:
    """Add files to ``HESS_PLUGINS``, where this process and those it starts find them.

    Raises:
        AdapterError: a path is not a Python file, or cannot be written in such a variable.
    """
    known = [check_file(path) for path in (*named_files(), *paths)]
    if known:
        os.environ[VARIABLE] = os.pathsep.join(str(path) for path in dict.fromkeys(known))


def check_file(path: Path) -> Path:
    """Check that a path is a Python file, and make it absolute.

    Raises:
        AdapterError: it is not.
    """
    if path.suffix != ".py" or not path.is_file():
        what = "does not exist" if not path.exists() else "is not a Python file"
        raise AdapterError(f"plugin file {path} {what}; give the path of a .py file with hooks.")
    if os.pathsep in str(path.resolve()):
        raise AdapterError(f"plugin file {path} has a {os.pathsep!r} in its path, which {VARIABLE} splits at; move it.")
    return path.resolve()


def register_files(manager: Registry) -> None:
    """Register every named file under its own name without ``.py``.

    Raises:
        AdapterError: naming the file, and the line where there is one, of whatever does not work.
    """
    for path in named_files():
        module = load_file(check_file(path))
        register(manager, module, path.stem, Origin(file=str(path)))


def load_file(path: Path) -> ModuleType:
    """Import one file by itself; what was imported before is returned as long as the file says the same.

    Raises:
        AdapterError: the file cannot be read or raises something while it is imported.
    """
    try:
        source = path.read_bytes()
    except OSError as error:
        raise AdapterError(f"plugin file {path} cannot be read ({error.strerror}); check your rights to it.") from error
    with _lock:
        known = _loaded.get(path)
        if known is None or known.source != source:
            known = _loaded[path] = _Loaded(source, _execute(path, source))
        return known.module


def _execute(path: Path, source: bytes) -> ModuleType:
    # The digest keeps files of the same name in two folders apart.
    name = f"_hess_plugin_file_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}_{path.stem}"
    spec = spec_from_loader(name, loader=None, origin=str(path))
    assert spec is not None
    module = module_from_spec(spec)
    module.__file__ = str(path)
    before = sys.modules.get(name)
    sys.modules[name] = module  # dataclasses look their module up while it is being imported
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        raise AdapterError(
            f"plugin file {path} cannot be imported: {cause_of(error, str(path))}; {_advice(error)}"
        ) from error
    return module


def _advice(error: BaseException) -> str:
    if isinstance(error, ImportError):
        return "install what it imports; a plugin file stands alone, so import no file beside it."
    if isinstance(error, SystemExit):
        return "a plugin file only defines hooks, so put what it runs under `if __name__ == '__main__':`."
    return "repair the file."
