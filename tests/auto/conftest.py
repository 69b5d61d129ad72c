"""Programs in processes of their own, with and without `hess-patch run`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from hess_plugin.calibration.calibrator import calibrate
from hess_plugin.demo.model import load_demo_model
from hess_plugin.demo.scenes import RoomScenes


class Ended(NamedTuple):
    """How a program ended: exit code, standard output, its own standard error, and the lines of hess-patch in it."""

    code: int
    output: str
    error: str
    said: list[str]


def ended(code: int, output: str, error: str) -> Ended:
    lines = error.splitlines()
    said = [line for line in lines if line.startswith("hess-patch: ")]
    return Ended(code, output, "\n".join(line for line in lines if line not in said), said)


def _like_a_terminal() -> None:
    """What runs in the background, tests perhaps, ignores the interrupt, and so would its programs."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Programs:
    """Starts programs in a folder, as a user would in a terminal."""

    hess_patch = (sys.executable, "-c", "from hess_plugin.cli import main; main(prog_name='hess-patch')")
    small = ("--block-q", 8, "--block-k", 8)
    """Blocks for a model of 36 patches a view."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("HESS_AUTO_PATCH")}
        self.environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def start(self, *command: object, variables: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a program without hess-patch."""
        words = [str(word) for word in command]
        return subprocess.Popen(
            words,
            cwd=self.folder,
            env={**self.environment, **(variables or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_like_a_terminal,
        )

    def plain(self, *command: object, given: str = "", variables: Mapping[str, str] | None = None) -> Ended:
        """Run a program without hess-patch."""
        process = self.start(*command, variables=variables)
        output, error = process.communicate(given, timeout=600)
        return ended(process.returncode, output, error)

    def patched(
        self,
        *command: object,
        options: Sequence[object] = (),
        given: str = "",
        variables: Mapping[str, str] | None = None,
    ) -> Ended:
        """Run a program with `hess-patch run`."""
        return self.plain(*self.hess_patch, "run", *options, "--", *command, given=given, variables=variables)


@pytest.fixture(scope="session")
def demo_profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of the demo model from two rooms."""
    path = tmp_path_factory.mktemp("profile") / "demo.hess"
    calibrate(load_demo_model(), RoomScenes("calibration", 2, 4)).save(path)
    return path


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return Programs(tmp_path)


NET = '''"""A model of a project that has never heard of hess_plugin: the demo's architecture under another name."""
import torch
from hess_plugin.demo.model import TinyVGGT


class SceneNet(TinyVGGT):
    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.eval()


def images(views: int = 8) -> torch.Tensor:
    return torch.rand(1, views, 3, 60, 60, generator=torch.Generator().manual_seed(1))
'''


@pytest.fixture
def project(programs: Programs) -> Programs:
    """A small project: a package `scenenet` with a model, `main.py`, and `python -m scenenet`."""
    programs.write("scenenet/__init__.py", "")
    programs.write("scenenet/net.py", NET)
    program = """
import os, sys
import torch
from scenenet.net import SceneNet, images

print(sys.argv, __name__, os.getcwd(), sys.path[0], sys.flags.optimize, sorted(n for n in vars() if n[:2] != "__"))
model = SceneNet()
with torch.no_grad():
    output = model(images())
print(sorted(output), output["world_points"].double().sum().item(), sys.stdin.read())
print("on stderr", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""
    programs.write("main.py", program)
    programs.write("scenenet/__main__.py", program)
    return programs
