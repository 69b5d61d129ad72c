"""The code in the documentation runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hess_plugin.plugins import hook_names

ROOT = Path(__file__).resolve().parents[1]


def blocks(path: str, language: str) -> list[str]:
    """The fenced code blocks of one language in a Markdown file."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / path).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_every_hook_has_a_contract() -> None:
    from hess_plugin import hookspecs

    for name in hook_names():
        assert len((getattr(hookspecs, name).__doc__ or "").split()) > 15, f"{name} needs a docstring"


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
