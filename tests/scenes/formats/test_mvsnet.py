from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hess_plugin.exceptions import SceneError
from hess_plugin.geometry import invert_rigid
from hess_plugin.scenes import Scene, read_scenes
from hess_plugin.scenes.formats.dtu import TEST_SCANS
from hess_plugin.scenes.formats.mvsnet_files import read_camera, read_map, read_pairs

HEIGHT, WIDTH = 120, 160
K = torch.tensor([[150.0, 0.0, 82.0], [0.0, 152.0, 58.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
# DTU's own numbers, of the 160x128 map; the training images are 640x512.
QUARTER = torch.tensor([[361.54125, 0.0, 82.900625], [0.0, 360.3975, 66.383875], [0.0, 0.0, 1.0]], dtype=torch.float64)


def write_pfm(path: Path, values: np.ndarray, order: str = "<") -> None:
    scale = {"<": "-1.0", ">": "1.0"}[order]
    data = np.flipud(values).astype(f"{order}f4").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(f"Pf\n{values.shape[1]} {values.shape[0]}\n{scale}\n".encode() + data)


def write_camera(path: Path, c2w: torch.Tensor, k: torch.Tensor, depth: str = "425.0 2.5") -> None:
    def rows(matrix: torch.Tensor) -> str:
        return "\n".join(" ".join(repr(value) for value in row) for row in matrix.tolist())

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"extrinsic\n{rows(invert_rigid(c2w))}\n\nintrinsic\n{rows(k)}\n\n{depth}\n")


def write_pairs(path: Path) -> None:
    path.write_text("3\n0\n2 1 5.0 2 9.5 \n1\n2 0 5.0 2 3.0\n2\n0\n")


def write_test_form(root: Path, studio: Any) -> None:
    (root / "images").mkdir(parents=True)
    for i, c2w in enumerate(studio.c2w):
        image, depth = studio.pinhole(c2w, K, HEIGHT, WIDTH)
        Image.fromarray(image).save(root / "images" / f"{i:08d}.png")
        depth[:10] = 0
        write_pfm(root / "depth_gt" / f"{i:08d}.pfm", depth, "<>"[i % 2])
        write_camera(root / "cams" / f"{i:08d}_cam.txt", c2w, K, "0.7 0.015 192 3.6")
    write_pairs(root / "pair.txt")


def write_training_form(root: Path, studio: Any, quarter_maps: bool = False) -> None:
    """Images of light 3 as the room is lit, of light 0 black; depth of 1600x1200 or 160x128."""
    full = 4 * QUARTER
    full[2, 2] = 1
    images = root / "Rectified/scan7_train"
    images.mkdir(parents=True)
    maps = root / ("Depths/scan7_train" if quarter_maps else "Depths_raw/scan7")
    for i, c2w in enumerate(studio.c2w):
        Image.fromarray(studio.pinhole(c2w, full, 512, 640)[0]).save(images / f"rect_{i + 1:03d}_3_r5000.png")
        Image.new("RGB", (640, 512)).save(images / f"rect_{i + 1:03d}_0_r5000.png")
        if quarter_maps:
            depth = studio.pinhole(c2w, QUARTER, 128, 160)[1]
        else:
            raw = torch.tensor([[2.0, 0.0, 160.0], [0.0, 2.0, 88.0], [0.0, 0.0, 1.0]], dtype=torch.float64) @ full
            depth = studio.pinhole(c2w, raw, 1200, 1600)[1]
        seen = np.full(depth.shape, 255, np.uint8)
        seen[:, : depth.shape[1] // 3] = 10
        write_pfm(maps / f"depth_map_{i:04d}.pfm", depth)
        Image.fromarray(seen).save(maps / f"depth_visual_{i:04d}.png")
        write_camera(root / "Cameras/train" / f"{i:08d}_cam.txt", c2w, QUARTER)
    write_pairs(root / "Cameras/pair.txt")


def read(spec: str) -> Scene:
    [scene] = read_scenes(spec)
    assert isinstance(scene, Scene)
    return scene


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, studio: Any) -> Path:
    folder = tmp_path_factory.mktemp("mvsnet") / "scan4"
    write_test_form(folder, studio)
    return folder


@pytest.fixture
def folder(recorded: Path, tmp_path: Path) -> Path:
    shutil.copytree(recorded, tmp_path / "scan4")
    return tmp_path / "scan4"


def test_what_is_read_is_what_its_cameras_see(recorded: Path, studio: Any) -> None:
    scene = read(f"dtu:{recorded}")
    assert scene.name == "scan4" and scene.depth is not None and scene.points is None
    torch.testing.assert_close(scene.c2w, studio.c2w)
    torch.testing.assert_close(scene.intrinsics, K.expand(3, 3, 3))
    assert studio.misfit(scene) == (pytest.approx(0, abs=0.1), pytest.approx(0, abs=1e-3))
    assert min(studio.misfit(scene, shift=shift)[0] for shift in (-0.5, 0.5)) > 3.5
    assert float(scene.depth[:, :10].max()) == 0 < float(scene.depth[:, 10:].min())


@pytest.mark.slow
def test_the_training_form_is_brought_to_its_images(tmp_path: Path, studio: Any) -> None:
    write_training_form(tmp_path, studio)
    scene = read(f"dtu:{tmp_path}")
    assert scene.name == "scan7" and scene.depth is not None
    torch.testing.assert_close(scene.c2w, studio.c2w)
    expected = 4 * QUARTER
    expected[2, 2] = 1
    torch.testing.assert_close(scene.intrinsics, expected.expand(3, 3, 3))
    # Every other pixel of the large map is exactly a pixel of the image.
    assert studio.misfit(scene) == (pytest.approx(0, abs=0.1), pytest.approx(0, abs=1e-3))
    assert float(scene.depth[:, :, :180].max()) == 0 < float(scene.depth[:, :, 200:].min())
    assert float(read(f"dtu:{tmp_path},light=0").images.max()) == 0
    with pytest.raises(SceneError, match=r"no image rect_\*_5_r5000.png of light 5"):
        read(f"dtu:{tmp_path},light=5")


def test_maps_of_a_quarter_the_size_are_brought_to_the_images(tmp_path: Path, studio: Any) -> None:
    write_training_form(tmp_path, studio, quarter_maps=True)
    scene = read(f"dtu:{tmp_path}")
    assert scene.depth is not None and studio.misfit(scene)[1] < 0.5
    assert torch.equal(scene.depth[:, ::4, ::4][:, :, 60:], scene.depth[:, 1::4, 1::4][:, :, 60:])
    assert float(scene.depth[:, :, :200].max()) == 0 < float(scene.depth[:, :, 220:].min())
    shutil.rmtree(tmp_path / "Depths")
    (tmp_path / "Cameras/train").rename(tmp_path / "Cameras/other")
    for file in (tmp_path / "Cameras/other").iterdir():
        shutil.copy(file, tmp_path / "Cameras")
    assert read(f"dtu:{tmp_path}").depth is None


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 2, 4]))
def test_a_small_map_gives_every_pixel_its_nearest_value(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, scale: int
) -> None:
    path = tmp_path_factory.mktemp("map") / "depth.pfm"
    values = np.arange(1, rows * columns + 1, dtype=np.float32).reshape(rows, columns)
    write_pfm(path, values)
    depth = read_map(path, None, scale * rows, scale * columns)
    for v in range(scale * rows):
        for u in range(scale * columns):
            away = [(abs(scale * i - v), -i) for i in range(rows)], [(abs(scale * j - u), -j) for j in range(columns)]
            assert depth[v, u] == values[min(away[0])[1] * -1, min(away[1])[1] * -1]


def test_a_view_is_read_with_those_it_is_matched_with(recorded: Path, studio: Any) -> None:
    best = read(f"dtu:{recorded},reference=0")
    torch.testing.assert_close(best.c2w, studio.c2w[[0, 2, 1]])
    torch.testing.assert_close(read(f"dtu:{recorded},reference=0,sources=1").c2w, studio.c2w[[0, 2]])
    torch.testing.assert_close(read(f"dtu:{recorded},reference=2").c2w, studio.c2w[[2]])
    with pytest.raises(SceneError, match=r"pair\.txt has no view 3"):
        read(f"dtu:{recorded},reference=3")


def test_scans_are_chosen_by_number(recorded: Path, tmp_path: Path) -> None:
    for name in ("scan10", "scan9", "scan114", "Family"):
        shutil.copytree(recorded, tmp_path / name)
    assert read_scenes(f"dtu:{tmp_path}").names == ["scan9", "scan10", "scan114", "Family"]
    assert read_scenes(f"dtu:{tmp_path},scans=114+9").names == ["scan9", "scan114"]
    with pytest.raises(SceneError, match="has no scan1;"):
        read_scenes(f"dtu:{tmp_path},scans=test")
    for number in TEST_SCANS:
        (tmp_path / f"scan{number}" / "images").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"scan{number}" / "cams").mkdir(exist_ok=True)
    (tmp_path / "scan5/images").mkdir(parents=True)
    (tmp_path / "scan5/cams").mkdir()
    assert read_scenes(f"dtu:{tmp_path},scans=test").names == [f"scan{number}" for number in TEST_SCANS]
    assert len(TEST_SCANS) == 22


@pytest.mark.parametrize(
    "scale, size", [(1, (120, 160)), (2, (240, 320)), (4, (480, 640))], ids=["whole", "half", "quarter"]
)
def test_intrinsics_are_brought_to_the_image(tmp_path: Path, scale: int, size: tuple[int, int]) -> None:
    write_camera(tmp_path / "cam.txt", torch.eye(4, dtype=torch.float64), K)
    expected = K.clone()
    expected[:2] *= scale
    torch.testing.assert_close(read_camera(tmp_path / "cam.txt", *size, None)[1], expected)
    torch.testing.assert_close(read_camera(tmp_path / "cam.txt", 999, 999, scale)[1], expected)
    with pytest.raises(SceneError, match="not near the centre of an image of 1200x1600"):
        read_camera(tmp_path / "cam.txt", 1200, 1600, None)


@given(st.integers(2, 2000), st.integers(2, 2000), st.floats(1, 2000), st.floats(1, 2000))
def test_at_most_one_scale_fits(height: int, width: int, cx: float, cy: float) -> None:
    fits = [s for s in (1, 2, 4) if abs(s * cx - width / 2) <= width / 8 and abs(s * cy - height / 2) <= height / 8]
    assert len(fits) <= 1


def test_the_real_camera_file_is_that_of_the_training_images(samples: Path) -> None:
    file = samples / "mvsnet" / "dtu_real_view0_train_cam.txt"
    if not file.is_file():
        pytest.skip(f"no {file.name} in {samples}")
    c2w, k = read_camera(file, 512, 640, None)
    expected = [[1446.165, 0, 331.6025], [0, 1441.59, 265.5355], [0, 0, 1]]
    torch.testing.assert_close(k, torch.tensor(expected, dtype=torch.float64))
    assert float(torch.linalg.det(c2w[:3, :3])) == pytest.approx(1, abs=1e-12)
    assert invert_rigid(c2w)[0, 3].item() == pytest.approx(-191.02)


def test_the_sample_is_the_same_scene_as_in_another_format(samples: Path, real_scenes: Path) -> None:
    if not (samples / "mvsnet").is_dir() or not (real_scenes / "redkitchen-d").is_dir():
        pytest.skip(f"no mvsnet in {samples} or no redkitchen-d in {real_scenes}")
    ours, theirs = read(f"dtu:{samples / 'mvsnet'}"), read(f"folder:{real_scenes / 'redkitchen-d'}")
    torch.testing.assert_close(ours.c2w, theirs.c2w, atol=1e-7, rtol=0)
    torch.testing.assert_close(ours.intrinsics, theirs.intrinsics)
    assert torch.equal(ours.images, theirs.images) and ours.depth is not None
    torch.testing.assert_close(ours.depth, theirs.depth, atol=1e-5, rtol=0)
    frames = json.loads((real_scenes / "redkitchen-d/cameras.json").read_text())["frames"]
    [few] = read_scenes(f"dtu:{samples / 'mvsnet'},reference=0,sources=4")
    expected = [frames[i]["c2w"] for i in (0, 1, 2, 3, 5)]
    torch.testing.assert_close(few.c2w, torch.tensor(expected, dtype=torch.float64), atol=1e-7, rtol=0)


def edit(name: str, old: str, new: str) -> Callable[[Path], object]:
    def change(scene: Path) -> None:
        text = (scene / name).read_text()
        assert old in text
        (scene / name).write_text(text.replace(old, new, 1))

    return change


CAMERA, DEPTH, IMAGE = "cams/00000001_cam.txt", "depth_gt/00000001.pfm", "images/00000001.png"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "camera missing": (lambda f: (f / CAMERA).unlink(), "00000001_cam.txt does not exist"),
    "camera empty": (lambda f: (f / CAMERA).write_text(""), "00000001_cam.txt does not have an extrinsic"),
    "camera without intrinsic": (edit(CAMERA, "intrinsic", ""), "00000001_cam.txt does not have an extrinsic"),
    "camera of words": (edit(CAMERA, "150.0", "wide"), "intrinsic is not 9 numbers"),
    "camera cut": (edit(CAMERA, "0.0 0.0 1.0\n\n0.7 0.015 192 3.6", ""), "intrinsic has 6 numbers"),
    "camera not finite": (edit(CAMERA, "150.0", "nan"), "intrinsic has values that are not finite"),
    "camera with more depths": (edit(CAMERA, "3.6", "3.6 1 2"), "00000001_cam.txt has 6 numbers on its depth"),
    "pose not rigid": (edit(CAMERA, "0.0 0.0 0.0 1.0", "0.0 0.0 1.0 0.0"), "extrinsic is not a rigid transform"),
    "principal point outside": (edit(CAMERA, "82.0", "820.0"), r"principal point \(820, 58\) is not near"),
    "image missing": (lambda f: (f / IMAGE).unlink(), "pair.txt names view 1, which has no image"),
    "image truncated": (lambda f: (f / IMAGE).write_bytes((f / IMAGE).read_bytes()[:999]), "png cannot be decoded"),
    "image is text": (lambda f: (f / IMAGE).write_text("hello"), "00000001.png cannot be decoded"),
    "image of another name": (lambda f: (f / IMAGE).rename(f / "images/b.png"), "b.png is not named by the number"),
    "depth truncated": (lambda f: (f / DEPTH).write_bytes((f / DEPTH).read_bytes()[:999]), "pfm cannot be decoded"),
    "depth is text": (lambda f: (f / DEPTH).write_text("hello"), "00000001.pfm cannot be decoded"),
    "depth in colour": (lambda f: (f / DEPTH).write_bytes(b"PF\n2 2\n-1\n" + bytes(48)), "pfm cannot be decoded"),
    "depth is a picture": (lambda f: shutil.copy(f / IMAGE, f / DEPTH), "mode RGB, 32-bit float grey was wanted"),
    "depth of another size": (
        lambda f: write_pfm(f / DEPTH, np.ones((100, 160))),
        "00000001.pfm is 100x160, its image is 120x160",
    ),
    "pairs missing": (lambda f: (f / "pair.txt").unlink(), "pair.txt does not exist"),
    "pairs empty": (lambda f: (f / "pair.txt").write_text(""), "pair.txt is damaged"),
    "pairs cut": (edit("pair.txt", "2\n0\n", ""), "pair.txt is damaged"),
    "pairs short": (edit("pair.txt", " 2 9.5", ""), "pair.txt is damaged"),
    "pairs of words": (edit("pair.txt", "9.5", "best"), "pair.txt is damaged"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named(folder: Path, case: str) -> None:
    damage, sentence = BROKEN[case]
    damage(folder)
    with pytest.raises(SceneError, match=sentence) as raised:
        read(f"dtu:{folder},reference=0")
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


def test_values_that_are_no_depth_are_not_known(tmp_path: Path) -> None:
    write_pfm(tmp_path / "d.pfm", np.array([[np.nan, np.inf, -1.0, 0.0, 2.5]]))
    assert read_map(tmp_path / "d.pfm", None, 1, 5).tolist() == [[0.0, 0.0, 0.0, 0.0, 2.5]]
    Image.fromarray(np.full((1, 4), 255, np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(SceneError, match=r"m\.png is 1x4, its depth is 1x5"):
        read_map(tmp_path / "d.pfm", tmp_path / "m.png", 1, 5)


def test_pairs_come_best_first(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pair.txt")
    assert read_pairs(tmp_path / "pair.txt") == {0: [2, 1], 1: [0, 2], 2: []}


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("light=7", "option light is '7', a whole number was wanted: 0 to 6"),
        ("scans=1+x", "option scans is 'x'"),
        ("reference=-1", "option reference is '-1'"),
        ("reference=0,sources=0", "option sources is '0'"),
        ("sources=4", "option sources has no reference"),
        ("scale=3", "option scale is '3', a whole number was wanted: 1, 2, 4"),
        ("scans=5", "has no scan5"),
    ],
)
def test_a_wrong_option_is_named(recorded: Path, options: str, sentence: str) -> None:
    with pytest.raises(SceneError, match=sentence):
        read_scenes(f"dtu:{recorded},{options}")


def test_a_folder_without_scans_is_named(tmp_path: Path) -> None:
    with pytest.raises(SceneError, match="holds no scene: neither it nor a folder in it has images/ and cams/"):
        read_scenes(f"dtu:{tmp_path}")
    (tmp_path / "Rectified/notes").mkdir(parents=True)
    with pytest.raises(SceneError, match="holds no scan<N>_train"):
        read_scenes(f"dtu:{tmp_path}")


def test_nothing_is_opened_before_it_is_asked_for(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_text("nothing")
    assert read_scenes(f"dtu:{folder}").names == ["scan4"]
