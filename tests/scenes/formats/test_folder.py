from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hess_plugin.exceptions import HessError, MissingDependency, SceneError
from hess_plugin.scenes import Scene, find_folders, read_folder, write_folder

MakeScene = Callable[..., Scene]


def test_what_is_written_is_read_back(make_scene: MakeScene, tmp_path: Path) -> None:
    scene = make_scene(points=True)
    back = read_folder(write_folder(scene, tmp_path / "made"))
    assert back.name == scene.name
    torch.testing.assert_close(back.images, scene.images, atol=0.51 / 255, rtol=0)
    torch.testing.assert_close(back.c2w, scene.c2w, atol=0, rtol=0)
    torch.testing.assert_close(back.intrinsics, scene.intrinsics, atol=0, rtol=0)
    torch.testing.assert_close(back.points, scene.points)
    assert back.depth is not None and scene.depth is not None
    torch.testing.assert_close(back.depth, scene.depth, atol=3e-5, rtol=0)
    assert torch.equal(back.depth > 0, scene.depth > 0)


def test_tiny_known_depth_does_not_become_unknown(make_scene: MakeScene, tmp_path: Path) -> None:
    scene = make_scene()
    assert scene.depth is not None
    scene.depth[0, 0, 0], scene.depth[0, 0, 1] = 1e-6, 10.0
    back = read_folder(write_folder(scene, tmp_path / "made"))
    assert back.depth is not None and back.depth[0, 0, 0] > 0


def test_a_pose_only_scene_needs_no_depth_and_no_cloud(make_scene: MakeScene, tmp_path: Path) -> None:
    folder = write_folder(make_scene(depth=False), tmp_path / "made")
    assert sorted(p.name for p in folder.iterdir()) == ["cameras.json", "images"]
    back = read_folder(folder)
    assert back.depth is None and back.points is None


def test_writing_is_all_or_nothing(make_scene: MakeScene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("hess_plugin.scenes.writing.write_depth", full)
    with pytest.raises(OSError, match="disk full"):
        write_folder(make_scene(), tmp_path / "made")
    assert not list(tmp_path.iterdir())
    (tmp_path / "made").mkdir()
    with pytest.raises(SceneError, match="exists already"):
        write_folder(make_scene(), tmp_path / "made")


def test_a_frame_without_depth_has_none_known(make_scene: MakeScene, tmp_path: Path) -> None:
    folder = write_folder(make_scene(), tmp_path / "made")
    edit(folder, lambda record: record["frames"][1].update(depth=None))
    back = read_folder(folder)
    assert back.depth is not None
    assert back.depth[1].max() == 0 and back.depth[0].max() > 0


def test_views_are_chosen_by_seed_in_recorded_order(make_scene: MakeScene, tmp_path: Path) -> None:
    folder = write_folder(make_scene(views=8), tmp_path / "made")
    whole = read_folder(folder)
    seen = set()
    for seed in range(6):
        part = read_folder(folder, max_views=3, seed=seed)
        again = read_folder(folder, max_views=3, seed=seed)
        torch.testing.assert_close(part.c2w, again.c2w, atol=0, rtol=0)
        where = [int((whole.c2w == pose).all(-1).all(-1).nonzero()[0]) for pose in part.c2w]
        assert where == sorted(where) and len(set(where)) == 3
        seen.add(tuple(where))
    assert len(seen) > 1
    assert read_folder(folder, max_views=99).views == 8
    with pytest.raises(SceneError, match="at least 1 was wanted"):
        read_folder(folder, max_views=0)


def test_folders_are_found_at_the_root_or_below(make_scene: MakeScene, tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_folder(make_scene(), tmp_path / "scenes" / name)
    (tmp_path / "scenes" / "notes").mkdir()
    assert [p.name for p in find_folders(tmp_path / "scenes")] == ["a", "b"]
    assert find_folders(tmp_path / "scenes" / "a") == [tmp_path / "scenes" / "a"]
    with pytest.raises(SceneError, match="holds no scene"):
        find_folders(tmp_path)
    with pytest.raises(SceneError, match="does not exist"):
        find_folders(tmp_path / "nowhere")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "cameras.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


def frame(field: str, value: object) -> Callable[[Path], object]:
    return lambda folder: edit(folder, lambda record: record["frames"][1].update({field: value}))


def pose(row: int, column: int, value: object) -> Callable[[Path], object]:
    def change(record: dict[str, Any]) -> None:
        record["frames"][1]["c2w"][row][column] = value

    return lambda folder: edit(folder, change)


def cut(name: str, keep: float) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return change


def picture(name: str, pixels: np.ndarray[Any, Any]) -> Callable[[Path], object]:
    return lambda folder: Image.fromarray(pixels).save(folder / name)


BYTES = np.zeros((12, 16), dtype=np.uint8)
SHORTS = np.zeros((12, 16), dtype=np.uint16)
IMAGE, DEPTH = "images/000001.png", "depth/000001.png"

BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "image missing": (lambda f: (f / IMAGE).unlink(), "000001.png does not exist"),
    "image truncated": (cut(IMAGE, 0.5), "000001.png cannot be decoded"),
    "image is text": (lambda f: (f / IMAGE).write_text("hello"), "000001.png cannot be decoded"),
    "image of another size": (picture(IMAGE, np.zeros((10, 16, 3), np.uint8)), "000001.png is 10x16"),
    "image of 16 bits": (picture(IMAGE, np.zeros((12, 16), dtype=np.uint16)), "mode I;16, 8-bit RGB was wanted"),
    "size in json": (frame("width", 17), "cameras.json says 12x17"),
    "image name missing": (frame("image", None), "image of a frame is None"),
    "depth missing": (lambda f: (f / DEPTH).unlink(), "000001.png does not exist"),
    "depth of 8 bits": (picture(DEPTH, BYTES), "mode L, 16-bit grey was wanted"),
    "depth in colour": (picture(DEPTH, np.zeros((12, 16, 3), np.uint8)), "mode RGB, 16-bit grey"),
    "depth of another size": (
        picture(DEPTH, SHORTS[:, 1:].copy()),
        "is 12x15, its image is 12x16",
    ),
    "depth truncated": (cut(DEPTH, 0.6), "000001.png cannot be decoded"),
    "depth scale missing": (lambda f: edit(f, lambda r: r.update(depth_scale=None)), "depth_scale is None"),
    "depth scale negative": (lambda f: edit(f, lambda r: r.update(depth_scale=-1)), "depth_scale is -1"),
    "pose NaN": (pose(0, 3, float("nan")), "c2w of images/000001.png has values that are not finite"),
    "pose infinite": (pose(2, 3, float("inf")), "c2w of images/000001.png has values that are not finite"),
    "pose not a rotation": (pose(0, 0, 3.0), "c2w of view 1 has no rotation matrix"),
    "pose of words": (pose(0, 0, "x"), "c2w of images/000001.png is not a 4x4 matrix"),
    "pose of three rows": (frame("c2w", [[1, 0, 0, 0]] * 3), r"c2w of images/000001.png has shape \[3, 4\]"),
    "pose missing": (frame("c2w", None), "c2w of images/000001.png is not a 4x4 matrix"),
    "K ragged": (frame("K", [[1, 0, 0], [0, 1], [0, 0, 1]]), "K of images/000001.png is not a 3x3"),
    "K without focal": (frame("K", [[0, 0, 8], [0, 9, 6], [0, 0, 1]]), "intrinsics of view 1"),
    "json missing": (lambda f: (f / "cameras.json").unlink(), "cameras.json does not exist"),
    "json truncated": (cut("cameras.json", 0.7), "cameras.json is not JSON"),
    "json is a list": (lambda f: (f / "cameras.json").write_text("[]"), "format is 'list'"),
    "json of another format": (lambda f: edit(f, lambda r: r.update(format="scene-v9")), "'scene-v9'"),
    "no frames": (lambda f: edit(f, lambda r: r.update(frames=[])), "frames is not a list"),
    "frames of numbers": (lambda f: edit(f, lambda r: r.update(frames=[1])), "frames is not a list"),
    "cloud truncated": (cut("points.ply", 0.8), "points.ply holds"),
    "cloud is text": (lambda f: (f / "points.ply").write_text("hello"), "points.ply is not a ply"),
    "cloud header cut": (cut("points.ply", 0.05), "points.ply is not a ply"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named(make_scene: MakeScene, tmp_path: Path, case: str) -> None:
    folder = write_folder(make_scene(points=True), tmp_path / "made")
    damage, sentence = BROKEN[case]
    damage(folder)
    with pytest.raises(SceneError, match=sentence) as raised:
        read_folder(folder)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("module, sentence", [("open3d", "pip install open3d"), ("PIL", "pip install pillow")])
def test_a_missing_package_is_named(
    make_scene: MakeScene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, sentence: str
) -> None:
    folder = write_folder(make_scene(points=True), tmp_path / "made")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependency, match=sentence):
        read_folder(folder)
    assert issubclass(MissingDependency, HessError)
