"""The code in the documentation runs."""

from __future__ import annotations

import re
import shlex
import types
from pathlib import Path

import click
import pytest
import torch
from torch import Tensor, nn

import hess_plugin
from hess_plugin.cli import main
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.plugins import get_plugin_manager, hook_names, register
from hess_plugin.scenes.scene import Scene
from hess_plugin.testing import check_adapter, require

ROOT = Path(__file__).resolve().parents[1]


def blocks(path: str, language: str) -> list[str]:
    """The fenced code blocks of one language in a Markdown file."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / path).read_text(encoding="utf-8"), flags=re.DOTALL)


class MyAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MyNet(nn.Module):
    """The model of the guide: blocks that alternate between one frame and all frames, one special token a frame."""

    patch, special = 10, 1

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, self.patch, self.patch)
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.mynet_blocks = nn.ModuleList(MyAttention(32, 4) for _ in range(4))
        self.pose, self.point_head, self.depth_head = (nn.Linear(32, 3) for _ in range(3))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        batch, views, _, height, width = images.shape
        patches = self.embed(images.flatten(0, 1)).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(patches), -1, -1), patches], 1)
        for i, block in enumerate(self.mynet_blocks):
            x = x.reshape(batch, -1, 32) if i % 2 else x.reshape(batch * views, -1, 32)
            x = block(x)
        x = x.reshape(batch, views, -1, 32)
        c2w = torch.eye(4).repeat(batch, views, 1, 1)
        c2w = torch.cat(
            [c2w[..., :3], torch.cat([self.pose(x[:, :, 0]), torch.ones(batch, views, 1)], -1)[..., None]], -1
        )
        grid = (height // self.patch, width // self.patch)
        return {"c2w": c2w, "points": self.point_head(x[:, :, 1:]).unflatten(2, grid)}


@pytest.mark.parametrize("described", [False, True])
def test_the_guide_writes_an_adapter_that_keeps_the_contract(room: Scene, described: bool) -> None:
    adapter, (entry,) = blocks("adapters/README.md", "python")[0], blocks("adapters/README.md", "toml")
    family, check = blocks("adapters/README.md", "python")[1:]
    assert len(adapter.strip().splitlines()) <= 35 and "hess_plugin" in entry
    module = types.ModuleType("hess_plugin_mynet")
    for code in (adapter, family) if described else (adapter,):
        exec(compile(code, "adapters/README.md", "exec"), module.__dict__)
    manager = get_plugin_manager(entry_points=False)
    register(manager, module, "mynet")
    torch.manual_seed(0)
    model = MyNet().eval()
    checks = check_adapter(model, room, manager=manager, block=8)
    require(checks)
    assert len(checks) >= 12
    assert "check_adapter" in check and "require(checks)" in check


def test_the_guide_names_only_hooks_that_exist() -> None:
    named = set(re.findall(r"hess_[a-z]+_[a-z_]+", (ROOT / "adapters/README.md").read_text(encoding="utf-8")))
    assert named - {"hess_plugin_mynet"} <= {*hook_names(), "hess_plugin"}


def test_every_hook_has_a_contract() -> None:
    from hess_plugin import hookspecs

    for name in hook_names():
        assert len((getattr(hookspecs, name).__doc__ or "").split()) > 15, f"{name} needs a docstring"


def test_the_readme_example_runs(
    tiny_model: TinyVGGT, room: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = blocks("README.md", "python")
    hess_plugin.calibrate(tiny_model, [room], eps=10.0, output=tmp_path / "vggt.hess")
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        before = tiny_model(room.images)["world_points"]
        exec(compile(example, "README.md", "exec"), {"model": tiny_model, "images": room.images})
        assert torch.equal(before, tiny_model(room.images)["world_points"])


def test_readme_commands_parse() -> None:
    lines = [line for block in blocks("README.md", "bash") for line in block.splitlines()]
    commands = [line.split("#")[0] for line in lines if line.startswith("hess-patch")]
    assert len(commands) >= 3
    for line in commands:
        name, *arguments = shlex.split(line)[1:]
        command = main.commands[name]
        known = {option for parameter in command.params for option in parameter.opts}
        used = {argument for argument in arguments if argument.startswith("-")}
        assert used <= known, f"{line}: no such option"
        assert isinstance(command, click.Command) and command.help


def test_the_scene_of_the_readme_is_read(tmp_path: Path) -> None:
    """The example of the format, with the images it names."""
    from PIL import Image

    from hess_plugin.scenes import read_folder

    (example,) = blocks("README.md", "json")
    for name in ("images", "depth"):
        (tmp_path / name).mkdir()
    (tmp_path / "cameras.json").write_text(example)
    Image.new("RGB", (518, 392)).save(tmp_path / "images" / "0.jpg")
    Image.new("I;16", (518, 392), 2000).save(tmp_path / "depth" / "0.png")
    scene = read_folder(tmp_path)
    assert scene.name == "kitchen" and scene.views == 1 and scene.depth is not None
    assert float(scene.depth.max()) == pytest.approx(2.0)
