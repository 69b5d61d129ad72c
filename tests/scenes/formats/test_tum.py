from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hess_plugin.exceptions import SceneError
from hess_plugin.scenes import Scene, read_scenes
from hess_plugin.scenes.formats.distortion import Lens
from hess_plugin.scenes.formats.tum import FARTHEST, nearest_in_time

LENSES = {
    "freiburg1": (517.3, 516.5, 318.6, 255.3, 0.2624, -0.9531, -0.0054, 0.0026, 1.1633),
    "freiburg2": (520.9, 521.0, 325.1, 249.7, 0.2312, -0.7849, -0.0033, -0.0001, 0.9172),
    "freiburg3": (535.4, 539.2, 320.1, 247.6, 0.0, 0.0, 0.0, 0.0, 0.0),
}
START = 1305031102.0


def opencv_rays(camera: str) -> np.ndarray:
    """Rays `[480, 640, 3]` by OpenCV's own formula, solved by iteration; integer coordinate = pixel centre."""
    fx, fy, cx, cy, k1, k2, p1, p2, k3 = LENSES[camera]
    v, u = np.mgrid[:480, :640]
    x0, y0 = (u - cx) / fx, (v - cy) / fy
    x, y = x0.copy(), y0.copy()
    for _ in range(60):
        r = x * x + y * y
        radial = 1 + r * (k1 + r * (k2 + r * k3))
        x, y = (
            (x0 - 2 * p1 * x * y - p2 * (r + 2 * x * x)) / radial,
            (y0 - p1 * (r + 2 * y * y) - 2 * p2 * x * y) / radial,
        )
    return np.stack([x, y, np.ones_like(x)], -1)


def write_scene(folder: Path, studio: Any, camera: str) -> None:
    """Three images a tenth of a second apart, their depth 8 ms later, the poses every 10 ms with others between."""
    for name in ("rgb", "depth"):
        (folder / name).mkdir(parents=True)
    images, depths, poses = (
        ["# color images", "# timestamp filename"],
        ["# depth maps"],
        ["# timestamp tx ty tz qx qy qz qw"],
    )
    rays = opencv_rays(camera)
    for i, c2w in enumerate(studio.c2w):
        time = START + i / 10
        image, depth = studio.shoot(c2w, rays)
        values = np.rint(5000 * depth).astype(np.uint16)
        values[200:210] = 0
        Image.fromarray(image).save(folder / f"rgb/{time:.6f}.png", compress_level=1)
        Image.fromarray(values).save(folder / f"depth/{time + 0.008:.6f}.png", compress_level=1)
        images.append(f"{time:.6f} rgb/{time:.6f}.png")
        depths.append(f"{time + 0.008:.6f} depth/{time + 0.008:.6f}.png")
        place = " ".join(
            repr(float(number)) for number in (*c2w[:3, 3], *pycolmap.Rotation3d(c2w[:3, :3].numpy()).quat)
        )
        poses += [
            f"{time - 0.006:.4f} 9 9 9 0 0 0 1",
            f"{time + 0.004:.4f} {place}",
            f"{time + 0.014:.4f} 8 8 8 0 0 0 1",
        ]
    for name, lines in (("rgb", images), ("depth", depths), ("groundtruth", poses)):
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


def read(spec: str) -> Scene:
    [scene] = read_scenes(spec)
    assert isinstance(scene, Scene)
    return scene


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, studio: Any) -> Path:
    folder = tmp_path_factory.mktemp("tum") / "rgbd_dataset_freiburg1_room"
    write_scene(folder, studio, "freiburg1")
    return folder


@pytest.fixture
def folder(recorded: Path, tmp_path: Path) -> Path:
    shutil.copytree(recorded, tmp_path / recorded.name)
    return tmp_path / recorded.name


def test_what_is_read_is_what_its_cameras_see(recorded: Path, studio: Any) -> None:
    scene = read(f"tum:{recorded}")
    assert scene.name == "rgbd_dataset_freiburg1_room" and scene.depth is not None and scene.points is None
    torch.testing.assert_close(scene.c2w, studio.c2w)
    assert (scene.height, scene.width) == (449, 602)  # COLMAP's choice: nothing of it is black
    colours, depth = studio.misfit(scene)
    assert colours < 0.7 and depth < 0.1
    assert min(studio.misfit(scene, shift=shift)[0] for shift in (-0.5, 0.5)) > 1.1
    assert float(scene.images.amax(1).eq(0).float().mean()) < 1e-3
    assert float(scene.depth[:, 187:191, 280:320].max()) == 0 < float(scene.depth[:, 220:].min())


def test_images_without_distortion_are_read_as_they_are(tmp_path: Path, studio: Any) -> None:
    write_scene(tmp_path / "office", studio, "freiburg3")
    scene = read(f"tum:{tmp_path},camera=freiburg3")
    assert scene.name == "office" and scene.depth is not None
    assert studio.misfit(scene) == (pytest.approx(0, abs=0.05), pytest.approx(0, abs=0.02))
    fx, fy, cx, cy = LENSES["freiburg3"][:4]
    k = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(scene.intrinsics, k.expand(3, 3, 3))
    pixels = np.array(Image.open(tmp_path / f"office/rgb/{START:.6f}.png"))
    assert torch.equal(scene.images[0], torch.from_numpy(pixels).permute(2, 0, 1) / 255)


@pytest.mark.parametrize("camera", ["freiburg1", "freiburg2"])
def test_the_lens_is_opencvs(camera: str) -> None:
    """Coefficients in COLMAP's order and centres half a pixel on bend a ray as OpenCV's formula does."""
    fx, fy, cx, cy, *bend = LENSES[camera]
    lens = Lens("FULL_OPENCV", 640, 480, (fx, fy, cx + 0.5, cy + 0.5, *bend, 0.0, 0.0, 0.0))
    model = pycolmap.Camera(model=lens.model, width=640, height=480, params=lens.params)
    v, u = np.mgrid[:480, :640]
    pixels = model.img_from_cam(opencv_rays(camera).reshape(-1, 3)) - 0.5
    np.testing.assert_allclose(pixels, np.stack([u.ravel(), v.ravel()], -1), atol=1e-6)


def test_the_camera_is_told_by_name_or_option(folder: Path) -> None:
    plain = folder.rename(folder.parent / "room")
    with pytest.raises(
        SceneError, match="taken with camera of unknown name, known are freiburg1, freiburg2, freiburg3"
    ):
        read_scenes(f"tum:{plain}")
    assert read_scenes(f"tum:{plain},camera=freiburg1").names == ["room"]
    with pytest.raises(SceneError, match="taken with camera freiburg4"):
        read_scenes(f"tum:{plain},camera=freiburg4")
    with pytest.raises(SceneError, match=r"holds no scene: neither it nor a folder in it has rgb\.txt"):
        read_scenes(f"tum:{plain / 'rgb'}")


@given(st.lists(st.integers(0, 200), max_size=8), st.integers(0, 200))
def test_the_nearest_time_is_that_of_the_twin(numbers: list[int], wanted: int) -> None:
    times = sorted(number / 100 for number in numbers)
    away = [abs(time - wanted / 100) for time in times]
    near = min(away, default=np.inf) <= FARTHEST
    found = nearest_in_time(times, wanted / 100)
    assert (found is not None) == near
    if found is not None:
        assert away[found] == min(away)


def test_images_far_from_a_pose_are_left_out_and_those_far_from_depth_have_none(folder: Path, studio: Any) -> None:
    lines = (folder / "groundtruth.txt").read_text().splitlines()
    (folder / "groundtruth.txt").write_text("\n".join([*lines[:4], *lines[7:]]))
    lines = (folder / "depth.txt").read_text().splitlines()
    (folder / "depth.txt").write_text("\n".join(lines[:-1]))
    scene = read(f"tum:{folder}")
    torch.testing.assert_close(scene.c2w, studio.c2w[[0, 2]])
    assert scene.depth is not None and float(scene.depth[1].max()) == 0 < float(scene.depth[0].max())
    (folder / "depth.txt").unlink()
    assert read(f"tum:{folder}").depth is None


IMAGE, DEPTH = f"rgb/{START + 0.1:.6f}.png", f"depth/{START + 0.108:.6f}.png"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no poses": (lambda f: (f / "groundtruth.txt").unlink(), "groundtruth.txt does not exist"),
    "poses cut": (lambda f: (f / "groundtruth.txt").write_text("1.0 0 0 0 0 0"), "has 6 numbers, 8 were wanted"),
    "poses of words": (lambda f: (f / "groundtruth.txt").write_text("1 a b c d e f g"), "pose at 1 is not 8 numbers"),
    "no quaternion": (lambda f: (f / "groundtruth.txt").write_text("1 0 0 0 0 0 0 0"), "at 1 has no unit quaternion"),
    "poses of another day": (
        lambda f: (f / "groundtruth.txt").write_text("1 0 0 0 0 0 0 1"),
        "has no image in rgb.txt within 0.02 s of a pose",
    ),
    "no images listed": (lambda f: (f / "rgb.txt").write_text("# nothing\n"), "has no image in rgb.txt"),
    "list without files": (lambda f: (f / "rgb.txt").write_text("1.0\n"), "'1.0' is not a time and a file"),
    "list of words": (lambda f: (f / "depth.txt").write_text("now a.png\n"), "time of a.png is not 1 numbers"),
    "list not text": (lambda f: (f / "depth.txt").write_bytes(b"\xff\xff"), "cannot be read as text"),
    "image missing": (lambda f: (f / IMAGE).unlink(), "png does not exist"),
    "image truncated": (lambda f: (f / IMAGE).write_bytes((f / IMAGE).read_bytes()[:999]), "cannot be decoded"),
    "image of another size": (lambda f: Image.new("RGB", (320, 240)).save(f / IMAGE), "TUM RGB-D says 480x640"),
    "depth missing": (lambda f: (f / DEPTH).unlink(), "Depth file .* does not exist"),
    "depth of 8 bits": (lambda f: Image.new("L", (640, 480)).save(f / DEPTH), "mode L, 16-bit grey was wanted"),
    "depth of another size": (lambda f: Image.new("I;16", (320, 240)).save(f / DEPTH), r"\[240, 320\], \[480, 640\]"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named(folder: Path, case: str) -> None:
    damage, sentence = BROKEN[case]
    damage(folder)
    with pytest.raises(SceneError, match=sentence) as raised:
        read(f"tum:{folder}")
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


def test_nothing_is_opened_before_it_is_asked_for(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_text("nothing")
    assert read_scenes(f"tum:{folder}").names == [folder.name]
