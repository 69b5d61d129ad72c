from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hess_plugin.exceptions import SceneError
from hess_plugin.geometry import project
from hess_plugin.scenes import Scene, read_scenes, write_folder
from hess_plugin.scenes.clouds import write_cloud
from hess_plugin.scenes.formats.distortion import Lens
from hess_plugin.scenes.formats.eth3d import read_scans

HEIGHT, WIDTH = 120, 160
FISHEYE = Lens(
    "THIN_PRISM_FISHEYE",
    WIDTH,
    HEIGHT,
    (150.0, 151.0, 81.0, 60.5, -0.02, 0.01, 0.001, 0.001, 0.002, -0.001, 0.003, -0.003),
)
STRAIGHT = Lens("PINHOLE", 150, 110, (150.0, 151.0, 76.0, 55.5))
NAMES = [f"DSC_{i:04d}.JPG" for i in range(3)]
# Where the two laser scanners stood.
TURN = torch.tensor([[0.0, -1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 1.0, -3.0], [0.0, 0.0, 0.0, 1.0]])


def write_scene(root: Path, studio: Any) -> np.ndarray:
    """A room as both sets of photographs, depth and two laser scans; returns the scanned points."""
    for folder, lens in (("dslr_images", FISHEYE), ("dslr_images_undistorted", STRAIGHT)):
        (root / "images" / folder).mkdir(parents=True)
        calibration = "dslr_calibration_jpg" if lens is FISHEYE else "dslr_calibration_undistorted"
        studio.write_model(root / calibration, lens, [f"{folder}/{name}" for name in NAMES], np.zeros((0, 3)))
        for name, c2w in zip(NAMES, studio.c2w, strict=True):
            Image.fromarray(studio.through(c2w, lens)[0]).save(
                root / "images" / folder / name, quality=100, subsampling=0
            )
    depths = root / "ground_truth_depth" / "dslr_images"
    depths.mkdir(parents=True)
    points = []
    for name, c2w in zip(NAMES, studio.c2w, strict=True):
        depth = studio.through(c2w, FISHEYE)[1]
        points.append(studio.world(c2w, FISHEYE, depth)[::97])
        depth[:30] = np.inf
        depth.astype("<f4").tofile(depths / name)
    write_scans(root / "dslr_scan_eval", [points[0], points[1]])
    return np.concatenate(points[:2])


def write_scans(folder: Path, clouds: list[np.ndarray]) -> None:
    folder.mkdir()
    meshes = ""
    for number, (cloud, pose) in enumerate(zip(clouds, (torch.eye(4), TURN), strict=True), start=1):
        local = (torch.from_numpy(cloud) - pose[:3, 3]) @ pose[:3, :3].double()
        write_cloud(folder / f"scan{number}.ply", local)
        rows = "\n".join(" ".join(f"{value:.9f}" for value in row) for row in pose.tolist())
        meshes += f'<MLMesh label="s" filename="scan{number}.ply"><MLMatrix44>\n{rows} \n</MLMatrix44></MLMesh>\n'
    (folder / "scan_alignment.mlp").write_text(
        f"<!DOCTYPE MeshLabDocument>\n<MeshLabProject>\n<MeshGroup>\n{meshes}</MeshGroup>\n</MeshLabProject>\n"
    )


def read(spec: str) -> Scene:
    [scene] = read_scenes(spec)
    assert isinstance(scene, Scene)
    return scene


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, studio: Any) -> tuple[Path, np.ndarray]:
    folder = tmp_path_factory.mktemp("eth3d") / "delivery"
    return folder, write_scene(folder, studio)


@pytest.fixture
def folder(recorded: tuple[Path, np.ndarray], tmp_path: Path) -> Path:
    shutil.copytree(recorded[0], tmp_path / "delivery")
    return tmp_path / "delivery"


@pytest.mark.parametrize("images", ["distorted", "undistorted"])
def test_what_is_read_is_what_its_cameras_see(recorded: tuple[Path, np.ndarray], studio: Any, images: str) -> None:
    scene = read(f"eth3d:{recorded[0]},images={images}")
    assert scene.name == "delivery" and scene.depth is not None
    torch.testing.assert_close(scene.c2w, studio.c2w)
    colours, depth = studio.misfit(scene)
    assert colours < 2.5 and depth < 0.5
    assert min(studio.misfit(scene, shift=shift)[0] for shift in (-0.5, 0.5)) > 3.5
    assert float((scene.depth[:, :20] > 0).float().mean()) < 0.2 < 0.9 < float((scene.depth[:, 40:] > 0).float().mean())


def test_depth_is_as_close_as_the_nearest_pixel(recorded: tuple[Path, np.ndarray], studio: Any) -> None:
    """Every known depth is one that the camera sees within a pixel of there, and one of the file's own values."""
    scene = read(f"eth3d:{recorded[0]}")
    assert scene.depth is not None
    for i, c2w in enumerate(studio.c2w):
        values = np.fromfile(recorded[0] / "ground_truth_depth/dslr_images" / NAMES[i], dtype="<f4")
        known = scene.depth[i] > 0
        known[0] = known[-1] = known[:, 0] = known[:, -1] = False  # their nearest pixel may lie out of sight
        assert np.isin(scene.depth[i][known].numpy(), values).all()
        seen = torch.from_numpy(studio.pinhole(c2w, scene.intrinsics[i], scene.height, scene.width)[1])[None, None]
        low = -torch.nn.functional.max_pool2d(-seen, 3, 1, 1)[0, 0]
        high = torch.nn.functional.max_pool2d(seen, 3, 1, 1)[0, 0]
        inside = (scene.depth[i] >= low - 1e-3) & (scene.depth[i] <= high + 1e-3)
        assert float(inside[known].float().mean()) > 0.995


def test_scans_lie_in_the_frame_of_the_cameras(recorded: tuple[Path, np.ndarray], studio: Any) -> None:
    scene = read(f"eth3d:{recorded[0]}")
    assert scene.points is not None
    torch.testing.assert_close(scene.points, torch.from_numpy(recorded[1]).float(), atol=1e-5, rtol=0)
    pixels, z = project(scene.points[None].double(), scene.intrinsics[:1], scene.c2w[:1])
    _, depth = studio.pinhole(scene.c2w[0], scene.intrinsics[0], scene.height, scene.width)
    u, v = pixels[0].round().long().unbind(-1)
    inside = (u >= 0) & (u < scene.width) & (v >= 0) & (v < scene.height)
    inside[len(recorded[1]) // 2 :] = False  # the second scan sees what the first camera may not
    seen = torch.from_numpy(depth)[v[inside], u[inside]]
    assert float(((z[0][inside] - seen) / seen).abs().median()) < 0.005


def test_the_set_that_is_there_is_read(folder: Path) -> None:
    shutil.rmtree(folder / "dslr_calibration_jpg")
    scene = read(f"eth3d:{folder}")
    assert (scene.height, scene.width) == (110, 150) and scene.depth is None
    shutil.rmtree(folder / "dslr_scan_eval")
    assert read(f"eth3d:{folder.parent}").points is None
    with pytest.raises(SceneError, match="has dslr_calibration_jpg"):
        read_scenes(f"eth3d:{folder},images=distorted")


def test_an_image_without_depth_has_none_known(folder: Path) -> None:
    (folder / "ground_truth_depth/dslr_images" / NAMES[1]).unlink()
    scene = read(f"eth3d:{folder}")
    assert scene.depth is not None and float(scene.depth[1].max()) == 0 < float(scene.depth[0].max())
    shutil.rmtree(folder / "ground_truth_depth")
    assert read(f"eth3d:{folder}").depth is None


def test_nothing_is_opened_before_it_is_asked_for(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_text("nothing")
    assert read_scenes(f"eth3d:{folder}").names == ["delivery"]


def test_a_scene_survives_the_way_through_a_folder(recorded: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    scene = read(f"eth3d:{recorded[0]}")
    back = read(f"folder:{write_folder(scene, tmp_path / 'made')}")
    torch.testing.assert_close(back.intrinsics, scene.intrinsics)
    assert back.depth is not None and scene.depth is not None and torch.equal(back.depth > 0, scene.depth > 0)


SCANS, DEPTH = "dslr_scan_eval/scan_alignment.mlp", f"ground_truth_depth/dslr_images/{NAMES[1]}"


def rewrite(name: str, old: str, new: str) -> Callable[[Path], object]:
    def change(scene: Path) -> None:
        text = (scene / name).read_text()
        assert old in text
        (scene / name).write_text(text.replace(old, new, 1))

    return change


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "depth too short": (
        lambda f: (f / DEPTH).write_bytes(bytes(4 * WIDTH * HEIGHT - 4)),
        "DSC_0001.JPG has 76796 bytes",
    ),
    "depth not whole": (
        lambda f: (f / DEPTH).write_bytes(bytes(4 * WIDTH * HEIGHT + 1)),
        "DSC_0001.JPG has 76801 bytes",
    ),
    "depth negative": (
        lambda f: np.full(WIDTH * HEIGHT, -1, "<f4").tofile(f / DEPTH),
        "DSC_0001.JPG has negative values",
    ),
    "depth is a picture": (
        lambda f: shutil.copy(f / "images/dslr_images" / NAMES[1], f / DEPTH),
        "120x160 float32 .* were wanted",
    ),
    "image missing": (lambda f: (f / "images/dslr_images" / NAMES[1]).unlink(), "DSC_0001.JPG does not exist"),
    "image of the other set": (
        lambda f: shutil.copy(f / "images/dslr_images_undistorted" / NAMES[1], f / "images/dslr_images" / NAMES[1]),
        "DSC_0001.JPG is 110x150",
    ),
    "model cut": (rewrite("dslr_calibration_jpg/cameras.txt", " 81.0", ""), "COLMAP model .* cannot be read"),
    "project is text": (lambda f: (f / SCANS).write_text("hello"), "scan_alignment.mlp is not a MeshLab project"),
    "project without scans": (lambda f: (f / SCANS).write_text("<a></a>"), "scan_alignment.mlp names no scan"),
    "scan without a name": (rewrite(SCANS, ' filename="scan1.ply"', ""), "an MLMesh has no filename"),
    "matrix cut": (rewrite(SCANS, "1.000000000", ""), "MLMatrix44 of scan1.ply has 15 numbers"),
    "matrix of words": (rewrite(SCANS, "1.000000000", "one"), "MLMatrix44 of scan1.ply is not 16 numbers"),
    "matrix mirrored": (rewrite(SCANS, "1.000000000", "-1.0"), "MLMatrix44 of scan1.ply is not a rigid transform"),
    "matrix scaled": (rewrite(SCANS, "1.000000000", "2.0"), "MLMatrix44 of scan1.ply is not a rigid transform"),
    "matrix infinite": (rewrite(SCANS, "0.000000000", "inf"), "MLMatrix44 of scan1.ply has values that are not finite"),
    "no matrix": (
        lambda f: (f / SCANS).write_text('<a><MLMesh filename="scan1.ply"/></a>'),
        "MLMatrix44 of scan1.ply has 0 numbers",
    ),
    "scan missing": (lambda f: (f / "dslr_scan_eval/scan2.ply").unlink(), "scan2.ply does not exist"),
    "scan cut": (
        lambda f: (f / "dslr_scan_eval/scan2.ply").write_bytes((f / "dslr_scan_eval/scan2.ply").read_bytes()[:-9]),
        "scan2.ply holds",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named(folder: Path, case: str) -> None:
    damage, sentence = BROKEN[case]
    damage(folder)
    with pytest.raises(SceneError, match=sentence) as raised:
        read(f"eth3d:{folder}")
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


def test_a_wrong_option_is_named(folder: Path) -> None:
    with pytest.raises(SceneError, match="option images is 'rig', distorted or undistorted"):
        read_scenes(f"eth3d:{folder},images=rig")
    with pytest.raises(SceneError, match="holds no scene"):
        read_scenes(f"eth3d:{folder / 'images'}")


def test_scans_are_turned_by_the_rotation_and_then_moved(tmp_path: Path) -> None:
    write_scans(tmp_path / "scans", [np.array([[1.0, 2.0, 3.0]]), np.array([[4.0, 5.0, 6.0]])])
    text = (tmp_path / "scans/scan_alignment.mlp").read_text()
    assert "0.000000000 -1.000000000 0.000000000 1.000000000" in text
    found = read_scans(tmp_path / "scans/scan_alignment.mlp")
    torch.testing.assert_close(found, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
