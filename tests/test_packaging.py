"""What the distribution holds, and that an installation of either kind imports the way it should.

Sdist, wheel and editable wheel are made from a copy of the sources by calling the build backend, which needs
neither a network nor pip. Each is unpacked into a folder that a bare interpreter (`-I -S`, started in `/`)
adds as a site directory, so that neither the checkout nor an installed hess-plugin can stand in for it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED_FOLDERS = {
    "hess_plugin": "hess_plugin",
    "hess_plugin_cuda": "hess_plugin_cuda",
    "adapters": "hess_plugin/adapters",
}
NOT_SHIPPED = ("tests", "benchmarks", "examples")
DEPENDENCIES = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
Isolated = Callable[[str], str]

PROBE = """
import importlib.metadata, importlib.util, json, sys
import hess_plugin, hess_plugin_cuda, hess_plugin.adapters, hess_plugin.adapters.vggt, hess_plugin.cli
leaks = {name: importlib.util.find_spec(name) for name in ("adapters", "cli", "setup", "tests", "benchmarks")}
modules = [hess_plugin, hess_plugin_cuda, hess_plugin.adapters, hess_plugin.adapters.vggt, hess_plugin.cli]
[script] = importlib.metadata.entry_points(group="console_scripts", name="hess-patch")
print(json.dumps({
    "files": {module.__name__: module.__file__ for module in modules},
    "leaks": {name: str(spec.origin) for name, spec in leaks.items() if spec},
    "script": script.value,
    "version": hess_plugin.__version__,
}))
"""
HELP = "import sys\nfrom hess_plugin.cli import main\nsys.argv = ['hess-patch', '--help']\nmain()"


def checkout_files() -> dict[str, Path]:
    """Name in the wheel -> file of the checkout, for all that has to be shipped."""
    wanted = {"hess_plugin/cli.py": ROOT / "cli.py"}
    for folder, target in SHIPPED_FOLDERS.items():
        kept = [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("py.typed")]
        wanted |= {f"{target}/{path.relative_to(ROOT / folder).as_posix()}": path for path in kept}
    data = [
        *(ROOT / "hess_plugin/demo/weights").glob("*"),
        ROOT / "hess_plugin/evaluation/report.html",
        *(path for name in ("csrc", "fatbin") for path in (ROOT / "hess_plugin_cuda" / name).rglob("*")),
    ]
    wanted |= {path.relative_to(ROOT).as_posix(): path for path in data if path.is_file()}
    if (ROOT / "adapters/README.md").exists():
        wanted["hess_plugin/adapters/README.md"] = ROOT / "adapters/README.md"
    return {name: path for name, path in wanted.items() if "__pycache__" not in name}


def build(hook: str, source: Path, into: Path) -> Path:
    """Run one hook of the build backend in a source folder."""
    into.mkdir(parents=True, exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(into)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{hook} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return into / done.stdout.split()[-1]


def unzip(wheel: Path, into: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(into)


def isolated(site: Path) -> Isolated:
    """Make a function that runs code from `/` with one installation and our dependencies, nothing else."""
    start = f"import site, sys; sys.path[:0] = [{str(site)!r}]; sys.path += {DEPENDENCIES!r}"
    start += f"; site.addsitedir({str(site)!r})  # also reads .pth files, which is how an editable one works"

    def run(code: str) -> str:
        command = [sys.executable, "-I", "-S", "-c", f"{start}\n{code}"]
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the sources, so that no build folder is left in the checkout and none found there is used."""
    number = re.match(r"\d+", importlib.metadata.version("setuptools"))
    if number is None or int(number[0]) < 77:
        pytest.skip("building needs setuptools >= 77.0.3 in this environment (extra `test`)")
    copy = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, copy)
    for folder in (*SHIPPED_FOLDERS, *NOT_SHIPPED):
        if (ROOT / folder).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    return copy


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    unpacked = tmp_path_factory.mktemp("sdist")
    archive = build("build_sdist", source, unpacked)
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):  # Python 3.11.2, Debian 12's, does not have filters yet
            tar.extraction_filter = tarfile.data_filter
        tar.extractall(unpacked)
    return unpacked / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the wheel from the sdist, as `python -m build` does, so that a file missing there shows here."""
    return build("build_wheel", sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("site")
    unzip(wheel, site)
    return site


@pytest.fixture(scope="module")
def editable(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if any((Path(path) / "hess_plugin").is_dir() for path in DEPENDENCIES):
        pytest.skip("hess-plugin is installed here as a wheel, which would hide the editable installation")
    site = tmp_path_factory.mktemp("editable")
    unzip(build("build_editable", source, tmp_path_factory.mktemp("wheel")), site)
    return site


def test_wheel_holds_every_source_file_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == set(checkout_files())


def test_wheel_files_are_those_of_the_checkout(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        changed = [name for name, path in checkout_files().items() if archive.read(name) != path.read_bytes()]
    assert changed == []


def test_wheel_is_pure_and_has_two_top_level_names(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        [info] = [name for name in archive.namelist() if name.endswith("top_level.txt")]
        assert archive.read(info).decode().split() == ["hess_plugin", "hess_plugin_cuda"]
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_entry_points_are_one_script_and_no_plugin(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert archive.read(name).decode().split() == [
            "[console_scripts]",
            "hess-patch",
            "=",
            "hess_plugin.cli:main",
        ]


def test_sdist_can_be_built_and_tested(sdist: Path) -> None:
    wanted = ["cli.py", "setup.py", "pyproject.toml", "constraints.txt", "LICENSE", "tests/test_packaging.py"]
    wanted += ["examples/hess-plugin-toy/pyproject.toml", "examples/hess-plugin-toy/src/hess_plugin_toy/adapter.py"]
    wanted += [path.relative_to(ROOT).as_posix() for path in (ROOT / "adapters").glob("*.py")]
    assert [name for name in wanted if not (sdist / name).is_file()] == []


def test_wheel_installation(installed: Path) -> None:
    found = json.loads(isolated(installed)(PROBE))
    assert [name for name, file in found["files"].items() if not Path(file).is_relative_to(installed)] == []
    assert found["leaks"] == {}
    assert found["script"] == "hess_plugin.cli:main"
    [info] = installed.glob("*.dist-info")
    assert info.name == f"hess_plugin-{found['version']}.dist-info"


def test_editable_installation_maps_to_the_checkout(editable: Path, source: Path) -> None:
    found = json.loads(isolated(editable)(PROBE))
    assert {name: Path(file).relative_to(source).as_posix() for name, file in found["files"].items()} == {
        "hess_plugin": "hess_plugin/__init__.py",
        "hess_plugin_cuda": "hess_plugin_cuda/__init__.py",
        "hess_plugin.adapters": "adapters/__init__.py",
        "hess_plugin.adapters.vggt": "adapters/vggt.py",
        "hess_plugin.cli": "cli.py",
    }
    assert found["leaks"] == {}


def test_editable_installation_sees_edits_and_new_files(editable: Path, source: Path) -> None:
    (source / "adapters/added_later.py").write_text("HERE = True\n")
    try:
        assert isolated(editable)("import hess_plugin.adapters.added_later as new; print(new.HERE)") == "True\n"
    finally:
        (source / "adapters/added_later.py").unlink()


@pytest.mark.parametrize("kind", ["installed", "editable"])
def test_command_runs_from_anywhere(kind: str, request: pytest.FixtureRequest) -> None:
    assert "hess-patch" in isolated(request.getfixturevalue(kind))(HELP)


def test_adapters_refuse_to_be_a_top_level_package(source: Path) -> None:
    code = "import adapters"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "ImportError" in done.stderr and "hess_plugin.adapters" in done.stderr
