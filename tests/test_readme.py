"""Every command and snippet of the README runs, in the README's order and in one folder.

What a reader has and this machine has not is replaced: the model and its weights by the demo model, data sets by the
demo's rooms, numbers of scenes by small ones. The table of replacements is all that differs.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hess_plugin
from hess_plugin.demo.model import TinyVGGT, load_demo_model
from hess_plugin.interception import is_patched

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
REPLACED = {
    r"--model vggt --weights facebook/VGGT-1B --repo ~/vggt": "--model demo",
    r"--model pi3 --weights random --repo ~/Pi3": "--model demo",
    r"--model vggt \.\.\.": "--model demo --data rooms:calibration,count=2 --views 4",
    r"co3d:/data/co3d": "rooms:calibration,count=4",
    r"co3d:/data/held-out|folder:held-out": "rooms:test,count=2",
    r"--scenes 40 --views 20": "--scenes 4 --views 4",
    r"demo --preset accurate": "demo --preset accurate --calibration-scenes 2 --test-scenes 2 --views 4",
    r"--end-to-end": "--end-to-end --max-views 4 --repeats 3",
    r"--paper": "--rule 0.5,0.97 --views 4",
    r"--nproc-per-node \d": "--nproc-per-node 2 --master-port 29543",
}
PROGRAM = """
import torch
from hess_plugin.demo.model import load_demo_model
model = load_demo_model()
with torch.no_grad():
    model(torch.rand(1, 8, 3, 60, 60))
"""


def fenced(language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def commands() -> list[str]:
    """The README's commands, but for those that make an environment: CI runs these themselves."""
    lines = [line.strip() for block in fenced("bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("python3 -m venv")]


def replaced(line: str) -> str:
    for pattern, instead in REPLACED.items():
        line = re.sub(pattern, instead, line)
    return line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader would be, with programs of the names that the README gives."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("demo_colmap.py", "eval.py"):
        (folder / name).write_text(PROGRAM)
    return folder


def test_nothing_is_replaced_in_vain() -> None:
    for pattern in REPLACED:
        assert any(re.search(pattern, line) for line in commands()), pattern


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(commands())))
def test_commands_run(folder: Path, number: int) -> None:
    """In order: the profile that one writes is what the next one reads."""
    line = replaced(commands()[number])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, f"{line}\n{ran.stdout[-1500:]}\n{ran.stderr[-1500:]}"
    assert "Traceback" not in ran.stderr


def test_every_option_exists_and_every_command_is_known() -> None:
    from hess_plugin.cli import main

    seen = set()
    for line in commands():
        words = shlex.split(line.split(" #")[0].replace('eval "$(', "").replace(')"', ""))
        if "hess-patch" not in words:
            continue
        name, *arguments = words[words.index("hess-patch") + 1 :]
        seen.add(name)
        own = arguments[: arguments.index("--")] if "--" in arguments else arguments
        known = {option for parameter in main.commands[name].params for option in parameter.opts}
        assert {argument for argument in own if argument.startswith("-")} <= known, line
    assert {"calibrate", "run", "verify", "sweep", "check", "sites"} <= seen


def test_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In order as well; `model` and `images` are the reader's own."""
    snippets = fenced("python")
    model, images = load_demo_model(), torch.rand(1, 16, 3, 60, 60)
    from hess_plugin.demo.scenes import RoomScenes

    hess_plugin.calibrate(model, RoomScenes("calibration", 1, 4), output=tmp_path / "vggt.hess")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HESS_AUTO_PATCH", raising=False)
    with torch.no_grad():
        before = model(images)["world_points"]
        names: dict[str, object] = {"model": model, "images": images, "hess_plugin": hess_plugin}
        for snippet in snippets:
            code = snippet.replace("hess_plugin.auto_patch(", "auto = hess_plugin.auto_patch(summary=False, ")
            exec(compile(code, "README.md", "exec"), names)
        assert torch.equal(before, model(images)["world_points"])
    auto = names["auto"]
    assert isinstance(auto, hess_plugin.auto.patcher.AutoPatch)
    try:
        assert is_patched(TinyVGGT())
    finally:
        auto.remove()
