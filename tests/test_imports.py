"""Importing costs nothing, and imports run one way: cli -> hess_plugin -> hess_plugin_cuda."""

from __future__ import annotations

import ast
import functools
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import hess_plugin

ROOT = Path(__file__).resolve().parents[1]
CORE = sorted((ROOT / "hess_plugin").rglob("*.py"))
KERNELS = sorted((ROOT / "hess_plugin_cuda").rglob("*.py"))
ADAPTERS = sorted((ROOT / "adapters").rglob("*.py"))
TRITON = {"triton"}  # torch imports it by itself, where it is there, with its tensors without values
HEAVY = TRITON | {"open3d", "faiss", "matplotlib", "scipy", "huggingface_hub", "pycolmap"}
UPSTREAM = {"vggt", "vggt_omega", "pi3", "mapanything", "depth_anything_3", "dust3r", "mast3r"}


class Import(NamedTuple):
    """One imported name: `from a.b import c` is module `a.b`, name `c`; `import a.b` has no name."""

    module: str
    name: str | None
    at_import: bool  # runs when the file is imported: not inside a function, not under TYPE_CHECKING
    line: int

    @property
    def root(self) -> str:
        return self.module.split(".")[0]

    def is_from(self, package: str) -> bool:
        full = f"{self.module}.{self.name}" if self.name else self.module
        return f"{full}.".startswith(f"{package}.")


def module_name(path: Path) -> str:
    """Say what a file of the checkout is called once installed."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in {"adapters", "cli"}:
        parts.insert(0, "hess_plugin")
    return ".".join(parts)


def imports(path: Path) -> list[Import]:
    """List every import of a file, relative ones resolved."""
    package = module_name(path).split(".")[:-1]
    return list(_walk(ast.parse(path.read_text(encoding="utf-8")), package, True))


def _walk(node: ast.AST, package: list[str], at_import: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, None, at_import, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = package[: len(package) + 1 - child.level] if child.level else []
            module = ".".join([*base, *([child.module] if child.module else [])])
            yield from (Import(module, alias.name, at_import, child.lineno) for alias in child.names)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _walk(ast.Module(child.body, []), package, False)
            yield from _walk(ast.Module(child.orelse, []), package, at_import)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(child, package, at_import and not inside)


def broken(paths: list[Path], is_wrong: Callable[[Import], bool]) -> list[str]:
    """Name the imports that break a rule."""
    found = [(path.relative_to(ROOT), i) for path in paths for i in imports(path) if is_wrong(i)]
    return [f"{path}:{i.line}: {i.module} {i.name or ''}" for path, i in found]


def run(code: str, *options: str) -> str:
    """Run code in a fresh interpreter, away from the checkout."""
    if importlib.util.find_spec("hess_plugin.cli") is None:
        pytest.fail('hess-plugin is not installed here; run: pip install -c constraints.txt -e ".[cpu,test]"')
    done = subprocess.run([sys.executable, *options, "-c", code], cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


COSTLY = HEAVY | {"torch", "numpy", "hess_plugin_cuda"}
LOADED = f"print(*sorted({COSTLY!r} & set(sys.modules)))"


# A fork for each module, after torch: one interpreter for each would take a minute.
EACH_ALONE = """
import importlib, os, sys, torch, warnings
for name in {modules!r}:
    sys.stdout.flush()
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    try:
        before = set(sys.modules)
        warnings.simplefilter("error")
        importlib.import_module(name)
        if heavy := {heavy!r} & (set(sys.modules) - before):
            print(name, "imports", *sorted(heavy), flush=True)
    except BaseException as error:
        print(name, "raises", repr(error), flush=True)
    finally:
        os._exit(0)
"""


def test_importing_the_package_imports_nothing_heavy_and_warns_of_nothing() -> None:
    assert run(f"import sys, hess_plugin; {LOADED}", "-W", "error").split() == []


def test_help_does_not_import_torch() -> None:
    code = "import sys\nfrom hess_plugin.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    assert run(code + LOADED).splitlines()[-1].split() == []


def test_every_module_imports_by_itself_without_heavy_packages_or_warnings() -> None:
    light = [path for path in [*CORE, *KERNELS, *ADAPTERS, ROOT / "cli.py"] if path not in in_triton()]
    modules = [module_name(path).removesuffix(".__init__") for path in light]
    modules = [name for name in modules if not name.endswith("__main__")]
    assert run(EACH_ALONE.format(modules=modules, heavy=HEAVY - TRITON)) == ""  # else: which and why


def test_public_names_exist() -> None:
    assert [name for name in hess_plugin.__all__ if not hasattr(hess_plugin, name)] == []


def test_kernels_know_nothing_of_the_package() -> None:
    assert broken(KERNELS, lambda i: i.root in {"hess_plugin", "adapters", "cli"}) == []


def test_core_imports_neither_adapters_nor_commands() -> None:
    names = ("hess_plugin.adapters", "hess_plugin.cli", "adapters", "cli")
    assert broken(CORE, lambda i: any(i.is_from(name) for name in names)) == []


def test_core_imports_no_upstream_model() -> None:
    assert broken(CORE, lambda i: i.root in UPSTREAM) == []


def test_adapters_use_the_public_face_only() -> None:
    def is_wrong(i: Import) -> bool:
        if i.is_from("hess_plugin.adapters"):
            return False  # a helper shared by two adapters
        if i.root == "hess_plugin":
            return i.module != "hess_plugin" or (i.name is not None and i.name not in hess_plugin.__all__)
        allowed = i.root in sys.stdlib_module_names or i.root == "torch"
        return i.at_import and not allowed  # an upstream project is imported inside hess_load_model only

    assert broken(ADAPTERS, is_wrong) == []


@functools.cache
def in_triton() -> tuple[Path, ...]:
    """Files that import Triton when they are imported, by themselves or through one another."""
    found: list[Path] = []
    names = set(TRITON)
    while True:
        more = [
            path
            for path in [*CORE, *KERNELS]
            if path not in found and any(i.at_import and any(i.is_from(name) for name in names) for i in imports(path))
        ]
        if not more:
            return tuple(found)
        found += more
        names |= {module_name(path).removesuffix(".__init__") for path in more}


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    everything = [*CORE, *KERNELS, *ADAPTERS, ROOT / "cli.py"]
    assert broken(everything, lambda i: i.at_import and i.root in HEAVY - TRITON) == []


def test_triton_is_imported_by_its_kernels_and_what_launches_them() -> None:
    allowed = {ROOT / "hess_plugin_cuda/triton", ROOT / "hess_plugin_cuda/triton_selection"}
    outside = [path.name for path in in_triton() if path.parent not in allowed]
    assert in_triton() and outside == ["bisected_rows.py"]
