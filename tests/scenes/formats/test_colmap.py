from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import pytest
import torch
from PIL import Image

from hess_plugin.exceptions import SceneError
from hess_plugin.geometry import invert_rigid, project
from hess_plugin.scenes import Framing, Scene, read_scenes
from hess_plugin.scenes.formats.colmap_model import registered_images
from hess_plugin.scenes.formats.distortion import Lens

LENSES = {
    "OPENCV": (150.0, 152.0, 82.0, 59.0, -0.15, 0.04, 0.002, -0.003),
    "SIMPLE_RADIAL": (150.0, 80.0, 60.0, -0.1),
    "THIN_PRISM_FISHEYE": (150.0, 151.0, 81.0, 60.5, -0.02, 0.01, 0.001, 0.001, 0.002, -0.001, 0.003, -0.003),
    "PINHOLE": (150.0, 152.0, 82.0, 59.0),
}
HEIGHT, WIDTH, POINTS = 120, 160, 60


def write_scene(root: Path, studio: Any, model: str = "OPENCV") -> np.ndarray:
    """Images of a room through a lens, and its model in sparse/0; returns the points."""
    lens = Lens(model, WIDTH, HEIGHT, LENSES[model])
    (root / "images" / "left").mkdir(parents=True)
    depth = np.zeros(())
    for i, c2w in enumerate(studio.c2w):
        image, depth = studio.through(c2w, lens)
        Image.fromarray(image).save(root / "images" / "left" / f"{i}.png")
    points = studio.world(studio.c2w[-1], lens, depth)[::311][:POINTS]
    studio.write_model(root / "sparse" / "0", lens, [f"left/{i}.png" for i in range(3)], points)
    return np.asarray(points)


def to_binary(folder: Path) -> None:
    model = pycolmap.Reconstruction(str(folder))
    for file in folder.iterdir():
        file.unlink()
    model.write_binary(str(folder))


def read(spec: str) -> Scene:
    [scene] = read_scenes(spec)
    assert isinstance(scene, Scene)
    return scene


@pytest.mark.parametrize("binary", [False, True], ids=["text", "binary"])
@pytest.mark.parametrize("model", LENSES)
def test_what_is_read_is_what_its_cameras_see(tmp_path: Path, studio: Any, model: str, binary: bool) -> None:
    points = write_scene(tmp_path / "room", studio, model)
    if binary:
        to_binary(tmp_path / "room" / "sparse" / "0")
    scene = read(f"colmap:{tmp_path / 'room'}")
    assert scene.name == "room" and scene.depth is None and scene.points is not None
    torch.testing.assert_close(scene.c2w, studio.c2w)
    torch.testing.assert_close(scene.points, torch.from_numpy(points).float())
    assert studio.misfit(scene)[0] < 2.0  # grey values, which bilinear resampling costs at the edges of the texture
    assert min(studio.misfit(scene, shift=shift)[0] for shift in (-0.5, 0.5)) > 3.5  # half a pixel off would be told


def test_the_cloud_lies_where_the_images_show_it(tmp_path: Path, studio: Any) -> None:
    write_scene(tmp_path / "room", studio)
    scene = read(f"colmap:{tmp_path / 'room'}")
    assert scene.points is not None
    pixels, z = project(scene.points[None].double(), scene.intrinsics[-1:], scene.c2w[-1:])
    _, depth = studio.pinhole(scene.c2w[-1], scene.intrinsics[-1], scene.height, scene.width)
    u, v = pixels[0].round().long().unbind(-1)
    inside = (u >= 0) & (u < scene.width) & (v >= 0) & (v < scene.height)
    seen = torch.from_numpy(depth)[v[inside], u[inside]]
    assert int(inside.sum()) > POINTS // 2 and float(((z[0][inside] - seen) / seen).abs().median()) < 0.01


def test_points_are_chosen_by_the_number_of_images_that_see_them(tmp_path: Path, studio: Any) -> None:
    points = write_scene(tmp_path / "room", studio)
    scene = read(f"colmap:{tmp_path / 'room'},track=3")
    assert scene.points is not None
    torch.testing.assert_close(scene.points, torch.from_numpy(points[: POINTS // 2]).float())
    with pytest.raises(SceneError, match="no point seen in 4 images"):
        read(f"colmap:{tmp_path / 'room'},track=4")


def test_a_model_without_points_is_a_scene_of_poses(tmp_path: Path, studio: Any) -> None:
    write_scene(tmp_path / "room", studio)
    lens = Lens("PINHOLE", WIDTH, HEIGHT, LENSES["PINHOLE"])
    studio.write_model(tmp_path / "bare", lens, [f"left/{i}.png" for i in range(3)], np.zeros((0, 3)))
    assert read(f"colmap:{tmp_path / 'room'},model={tmp_path / 'bare'}").points is None
    to_binary(tmp_path / "bare")
    assert read(f"colmap:{tmp_path / 'room'},model={tmp_path / 'bare'}").points is None


def test_several_models_are_several_scenes(tmp_path: Path, studio: Any) -> None:
    write_scene(tmp_path / "room", studio)
    for number in ("10", "2"):
        shutil.copytree(tmp_path / "room/sparse/0", tmp_path / "room/sparse" / number)
    (tmp_path / "room/sparse/notes").mkdir()
    assert read_scenes(f"colmap:{tmp_path / 'room'}").names == ["room/0", "room/2", "room/10"]
    assert read_scenes(f"colmap:{tmp_path}").names == ["room/0", "room/2", "room/10"]
    assert read_scenes(f"colmap:{tmp_path},model=sparse/10").names == ["room"]


def test_only_registered_images_are_views(tmp_path: Path, studio: Any) -> None:
    write_scene(tmp_path / "room", studio)
    folder = tmp_path / "room/sparse/0"
    model = pycolmap.Reconstruction(str(folder))
    model.deregister_frame(model.images[9].frame_id)
    model.write_text(str(folder))
    scene = read(f"colmap:{tmp_path / 'room'}")
    torch.testing.assert_close(scene.c2w, studio.c2w[[0, 2]])


def test_nothing_is_opened_before_it_is_asked_for(tmp_path: Path, studio: Any) -> None:
    write_scene(tmp_path / "room", studio)
    for image in (tmp_path / "room/images/left").iterdir():
        image.write_text("not an image")
    (tmp_path / "room/sparse/0/images.txt").write_text("not a model")
    assert read_scenes(f"colmap:{tmp_path / 'room'}").names == ["room"]


def test_rigs_of_several_cameras_stand_where_they_stood(tmp_path: Path) -> None:
    options = pycolmap.SyntheticDatasetOptions()
    options.num_rigs, options.num_cameras_per_rig, options.num_frames_per_rig, options.num_points3D = 2, 3, 4, 50
    model = pycolmap.synthesize_dataset(options)
    model.write_binary(str(tmp_path))
    found = registered_images(tmp_path)
    assert len(found) == model.num_reg_images() == 24
    by_name = {image.name: image for image in model.images.values()}
    assert not all(by_name[posed.name].is_ref_in_frame() for posed in found)
    for posed in found:
        w2c = torch.from_numpy(by_name[posed.name].cam_from_world().matrix())
        torch.testing.assert_close(invert_rigid(posed.c2w)[:3], w2c)


def edit(name: str, old: str, new: str) -> Callable[[Path], object]:
    def change(scene: Path) -> None:
        text = (scene / name).read_text()
        assert old in text
        (scene / name).write_text(text.replace(old, new, 1))

    return change


def cut(name: str, keep: float) -> Callable[[Path], object]:
    def change(scene: Path) -> None:
        data = (scene / name).read_bytes()
        (scene / name).write_bytes(data[: int(len(data) * keep)])

    return change


def cut_line(name: str) -> Callable[[Path], object]:
    def change(scene: Path) -> None:
        lines = (scene / name).read_text().splitlines(keepends=True)
        (scene / name).write_text("".join(lines[:-1]))

    return change


MODEL = "sparse/0"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no images": (lambda f: shutil.rmtree(f / "images"), "has no folder images"),
    "image missing": (lambda f: (f / "images/left/1.png").unlink(), "left/1.png does not exist"),
    "image truncated": (cut("images/left/1.png", 0.5), "left/1.png cannot be decoded"),
    "image of another size": (
        lambda f: Image.new("RGB", (HEIGHT, WIDTH)).save(f / "images/left/1.png"),
        "left/1.png is 160x120 .* its COLMAP camera says 120x160",
    ),
    "no model": (lambda f: shutil.rmtree(f / "sparse"), "has a COLMAP model in sparse"),
    "no cameras": (lambda f: (f / MODEL / "cameras.txt").unlink(), "has a COLMAP model in sparse"),
    "no points": (lambda f: (f / MODEL / "points3D.txt").unlink(), "has no points3D.txt"),
    "camera model unknown": (edit(f"{MODEL}/cameras.txt", "OPENCV", "OPENCVX"), "cannot be read"),
    "camera without parameters": (edit(f"{MODEL}/cameras.txt", " -0.15 0.04", ""), "cannot be read"),
    "images of words": (lambda f: (f / MODEL / "images.txt").write_text("hello\nyou\n"), "cannot be read"),
    "images cut": (cut(f"{MODEL}/images.txt", 0.5), "cannot be read"),
    "points cut": (cut(f"{MODEL}/points3D.txt", 0.5), "cannot be read"),
    "points cut at a line": (cut_line(f"{MODEL}/points3D.txt"), "points3D.txt holds 59 of 60 entries"),
    "frames without rigs": (lambda f: (f / MODEL / "frames.txt").write_text(""), "has frames.txt and no rigs.txt"),
    "image name in another code": (
        lambda f: (f / MODEL / "images.txt").write_bytes(
            (f / MODEL / "images.txt").read_bytes().replace(b"left/1", b"\xff1")
        ),
        "has an image name that is not UTF-8",
    ),
    "no registered image": (
        lambda f: [(f / MODEL / name).write_text("") for name in ("images.txt", "points3D.txt")],
        "has no registered image",
    ),
}
BINARY: dict[str, tuple[Callable[[Path], object], str]] = {
    "cameras cut": (cut(f"{MODEL}/cameras.bin", 0.7), "cameras.bin has .* bytes, its entries take"),
    "cameras empty": (cut(f"{MODEL}/cameras.bin", 0), "cameras.bin ends in the middle"),
    "camera model unknown": (
        lambda f: (f / MODEL / "cameras.bin").write_bytes(b"\1" + bytes(7) + b"\1\0\0\0\x77\0\0\0" + bytes(80)),
        "cameras.bin ends in the middle",
    ),
    "images cut": (cut(f"{MODEL}/images.bin", 0.6), "images.bin ends in the middle|images.bin has"),
    "points cut": (cut(f"{MODEL}/points3D.bin", 0.5), "points3D.bin ends in the middle|points3D.bin has"),
    "points cut at the end": (cut(f"{MODEL}/points3D.bin", 0.999), "points3D.bin has"),
    "points are text": (lambda f: (f / MODEL / "points3D.bin").write_text("hello, all of you"), "points3D.bin ends"),
    "rigs gone": (lambda f: (f / MODEL / "rigs.bin").unlink(), "has frames.bin and no rigs.bin"),
    "rigs cut": (cut(f"{MODEL}/rigs.bin", 0.8), "rigs.bin has"),
    "frames cut": (cut(f"{MODEL}/frames.bin", 0.5), "frames.bin ends in the middle"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named(tmp_path: Path, studio: Any, case: str) -> None:
    write_scene(tmp_path / "room", studio)
    check_broken(tmp_path / "room", *BROKEN[case])


@pytest.mark.parametrize("case", BINARY)
def test_a_broken_binary_file_is_named(tmp_path: Path, studio: Any, case: str) -> None:
    write_scene(tmp_path / "room", studio)
    to_binary(tmp_path / "room" / MODEL)
    check_broken(tmp_path / "room", *BINARY[case])


def check_broken(folder: Path, damage: Callable[[Path], object], sentence: str) -> None:
    damage(folder)
    with pytest.raises(SceneError, match=sentence) as raised:
        read(f"colmap:{folder}")
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("track", ["0", "-1", "x", ""])
def test_a_wrong_option_is_named(tmp_path: Path, studio: Any, track: str) -> None:
    with pytest.raises(SceneError, match="option track"):
        read_scenes(f"colmap:{tmp_path},track={track}")


@pytest.mark.parametrize("model", ["sparse_txt", "sparse_bin"])
def test_a_real_model_agrees_with_the_same_scene_in_another_format(
    samples: Path, real_scenes: Path, model: str
) -> None:
    """Twelve photographs that COLMAP reconstructed; the poses are also those of a scene folder."""
    reference = real_scenes / "redkitchen-d"
    if not (samples / "colmap").is_dir() or not reference.is_dir():
        pytest.skip(f"no colmap in {samples} or no redkitchen-d in {real_scenes}")
    scene = read(f"colmap:{samples / 'colmap'},model={model}")
    frames = json.loads((reference / "cameras.json").read_text())["frames"]
    torch.testing.assert_close(
        scene.c2w, torch.tensor([f["c2w"] for f in frames], dtype=torch.float64), atol=1e-8, rtol=0
    )
    assert scene.points is not None and scene.points.shape == (2627, 3)
    small = read_scenes(f"colmap:{samples / 'colmap'},model={model}", framing=Framing(14, 224))[0]
    assert (small.height, small.width) == (168, 224)
    # The reconstruction's own observations, moved to the pinhole camera, lie where the points are projected to.
    recorded = pycolmap.Reconstruction(str(samples / "colmap" / model))
    image = min(recorded.images.values(), key=lambda image: image.name)
    camera, k = recorded.cameras[image.camera_id], scene.intrinsics[0]
    seen = [point for point in image.points2D if point.has_point3D()]
    rays = np.concatenate([camera.cam_from_img(np.array([point.xy for point in seen])), np.ones((len(seen), 1))], -1)
    wanted = torch.from_numpy(rays) @ k.T
    points = torch.from_numpy(np.array([recorded.points3D[point.point3D_id].xyz for point in seen]))
    pixels, _ = project(points[None], k[None], scene.c2w[:1])
    off = (pixels[0] - wanted[:, :2]).norm(dim=-1)
    assert len(seen) > 100 and float(off.median()) < 1.5
