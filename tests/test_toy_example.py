"""The example package: installed with pip into a clean environment, found, used, broken, disabled, uninstalled."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples/hess-plugin-toy"
Run = Callable[..., subprocess.CompletedProcess[str]]

CHECK = """
import torch
torch.set_num_threads(1)
from hess_plugin.demo.rooms import make_scene
from hess_plugin.testing import check_adapter, require
from hess_plugin_toy.model import Toy
torch.manual_seed(0)
checks = check_adapter(Toy(spelled=True).eval(), make_scene(3, 3, image_size=72), adapter="toy", block=8)
require(checks)
print(sum(check.problem is None and check.unknown is None for check in checks), "hold")
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment that sees the packages of this one; its Python."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("no pip in this environment to install the example with")
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    # addsitedir and not a plain path: it also follows the .pth file by which hess-plugin itself may be installed here.
    lines = [f"import site; site.addsitedir({path!r})" for path in {sysconfig.get_path("purelib"),
                                                                     sysconfig.get_path("platlib")}]  # fmt: skip
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    (Path(site) / "packages_of_the_tests.pth").write_text("\n".join(lines) + "\n")
    return python


@pytest.fixture(scope="module")
def run(environment: Path) -> Run:
    """Run Python of the environment, away from the checkout."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HESS_", "PYTHON", "PIP_"))}
    variables |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "OMP_NUM_THREADS": "1"}

    def call(*arguments: str, ok: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
        command = [str(environment), *arguments]
        done = subprocess.run(
            command, cwd="/", env={**variables, **more}, capture_output=True, text=True, timeout=120
        )  # fmt: skip
        assert not ok or done.returncode == 0, f"{arguments}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done

    return call


@pytest.fixture(scope="module")
def installed(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """With the example installed, from a copy: building leaves folders behind."""
    copy = tmp_path_factory.mktemp("source") / "hess-plugin-toy"
    shutil.copytree(EXAMPLE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", str(copy))
    return run


def patch_command(run: Run, *arguments: str, ok: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "hess_plugin.cli", *arguments, ok=ok, **variables)


@pytest.mark.slow
def test_the_example_package_from_installation_to_removal(installed: Run) -> None:
    """One test, because each step needs the one before."""
    listed = {plugin["name"]: plugin for plugin in json.loads(patch_command(installed, "plugins").stdout)}
    toy = listed["toy"]
    assert (toy["package"], toy["module"], toy["status"]) == ("hess-plugin-toy 0.1", "hess_plugin_toy.adapter", "ok")
    assert len(toy["hooks"]) == 7 and "hess_replace_attention" in toy["hooks"]

    done = patch_command(installed, "sites", "--model", "toy", "--weights", "random")
    assert "adapter toy claims Toy: 3 sites, image sides multiples of 12" in done.stdout
    assert "scene_blocks.2.attention" in done.stdout

    (snippet,) = re.findall(r"```python\n(.*?)```", (EXAMPLE / "README.md").read_text(), flags=re.DOTALL)
    assert "sparsity" in installed("-c", snippet).stdout
    assert installed("-c", CHECK).stdout == "21 hold\n"

    _break(installed)
    done = patch_command(installed, "sites", "--model", "demo")
    assert "adapter vggt claims TinyVGGT: 4 sites" in done.stdout
    assert re.search(
        r"^Warning: adapter 'toy' of package hess-plugin-toy 0\.1 was left out: it cannot be imported \(SyntaxError: .*"
        r"adapter\.py line 1\)\)\. Repair or uninstall hess-plugin-toy, or .* HESS_DISABLE_PLUGINS=hess-plugin-toy\.$",
        done.stderr.strip(),
    )
    done = patch_command(installed, "sites", "--model", "toy", "--weights", "random", ok=False)
    assert done.returncode == 1 and "left out: toy (broken), see hess-patch plugins" in done.stderr
    assert patch_command(installed, "sites", "--model", "demo", HESS_DISABLE_PLUGINS="toy").stderr == ""

    installed("-m", "pip", "uninstall", "--quiet", "--yes", "hess-plugin-toy")
    done = patch_command(installed, "plugins")
    assert done.stderr == "" and "toy" not in {plugin["name"] for plugin in json.loads(done.stdout)}


def _break(run: Run) -> None:
    """Damage the installed adapter as a bad edit would."""
    code = (
        "import importlib.util, pathlib\n"
        "place = importlib.util.find_spec('hess_plugin_toy').submodule_search_locations[0]\n"
        "pathlib.Path(place, 'adapter.py').write_text('def hess_claim_model(:')"
    )
    run("-c", code)


def test_the_commands_of_its_readme_exist() -> None:
    import shlex

    from hess_plugin.cli import main

    (block,) = re.findall(r"```bash\n(.*?)```", (EXAMPLE / "README.md").read_text(), flags=re.DOTALL)
    pip, *commands = block.strip().splitlines()
    assert pip == "pip install ./examples/hess-plugin-toy" and len(commands) == 3
    for line in commands:
        program, name, *arguments = shlex.split(line)
        assert program == "hess-patch"
        main.commands[name].make_context(name, arguments, resilient_parsing=False).close()


def test_the_model_of_the_example_knows_nothing_of_the_plugin() -> None:
    source = (EXAMPLE / "src/hess_plugin_toy/model.py").read_text().split('"""', 2)[2]
    assert "hess" not in source
