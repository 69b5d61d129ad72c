from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hess_plugin.exceptions import SceneError
from hess_plugin.scenes import Scene, read_scenes, write_folder
from hess_plugin.scenes.formats import folder as folder_format

MakeScene = Callable[..., Scene]


@pytest.fixture
def folder(make_scene: MakeScene, tmp_path: Path) -> Path:
    for seed in range(5):
        write_folder(make_scene(views=4, seed=seed), tmp_path / f"scene-{seed}")
    return tmp_path


def test_scenes_are_read_only_when_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    original = folder_format.read_image

    def read(path: Path) -> torch.Tensor:
        loaded.append(path.parts[-3])
        return original(path)

    monkeypatch.setattr(folder_format, "read_image", read)
    scenes = read_scenes(f"folder:{folder}")
    assert len(scenes) == 5 and scenes.names == [f"scene-{i}" for i in range(5)]
    assert scenes[1:3].names == ["scene-1", "scene-2"] and not loaded
    assert scenes[-1].name == "scene-4" and loaded == ["scene-4"] * 4
    assert [scene.name for scene in scenes] == scenes.names
    with pytest.raises(IndexError):
        scenes[5]


def test_scenes_and_views_are_chosen_by_seed(folder: Path) -> None:
    few = read_scenes(f"folder:{folder}", scenes=2, views=3, seed=7)
    again = read_scenes(f"folder:{folder}", scenes=2, views=3, seed=7)
    assert few.names == again.names == sorted(few.names) and len(few) == 2
    assert torch.equal(few[0].c2w, again[0].c2w) and few[0].views == 3
    assert len({tuple(read_scenes(f"folder:{folder}", scenes=2, seed=s).names) for s in range(8)}) > 1


@pytest.mark.parametrize(
    "spec, sentence",
    [
        ("co4d:/data", "one of: "),
        ("/data/scenes", "one of: "),
        ("", "one of: "),
        ("folder", "write folder:FOLDER"),
        ("folder:", "write folder:FOLDER"),
        ("folder:/nowhere/at/all", "does not exist"),
    ],
)
def test_a_wrong_spec_says_what_is_known(spec: str, sentence: str) -> None:
    with pytest.raises(SceneError, match=sentence):
        read_scenes(spec)


def test_asking_for_nothing_is_told_before_anything_is_read(folder: Path) -> None:
    with pytest.raises(SceneError, match="at least 1"):
        read_scenes(f"folder:{folder}", views=0)
    with pytest.raises(SceneError, match="at least 1"):
        read_scenes(f"folder:{folder}", scenes=0)
