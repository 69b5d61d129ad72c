"""TUM RGB-D, as it is unpacked.

    <scene>/rgb.txt, depth.txt          lines "timestamp file"
    <scene>/groundtruth.txt             lines "timestamp tx ty tz qx qy qz qw": camera-to-world, metres
    <scene>/rgb/*.png, depth/*.png      640x480; depth 16-bit, 5000 = one metre, 0 = not known

A colour image gets the depth and the pose nearest in time, at most 0.02 s away; the poses come about a hundred times
a second and are not interpolated. Images without such a pose are left out, those without such a depth have none known.
Depth is recorded in the colour camera. The intrinsics are those published for the colour cameras of freiburg1,
freiburg2 and freiburg3, told by the folder's name (``rgbd_dataset_freiburg1_xyz``); the lens distortion of the first
two is removed from images and depth. The root is one scene or a folder of scenes.
"""

from __future__ import annotations

import functools
import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hess_plugin.exceptions import SceneError
from hess_plugin.geometry import quaternion_to_matrix
from hess_plugin.scenes.formats.distortion import Lens, undistort_depth, undistort_image
from hess_plugin.scenes.formats.textfiles import read_lines, read_sized_image, scene_folders, to_numbers
from hess_plugin.scenes.images import read_depth
from hess_plugin.scenes.sources import SceneSource, View

WIDTH, HEIGHT = 640, 480
DEPTH_UNIT = 1 / 5000
FARTHEST = 0.02
"""Seconds between an image and what is taken for its depth and its pose, as in the data set's own tools."""

# fx fy cx cy and OpenCV's k1 k2 p1 p2 k3, from the data set's page on file formats. Integer = pixel centre there.
_PUBLISHED = {
    "freiburg1": (517.3, 516.5, 318.6, 255.3, 0.2624, -0.9531, -0.0054, 0.0026, 1.1633),
    "freiburg2": (520.9, 521.0, 325.1, 249.7, 0.2312, -0.7849, -0.0033, -0.0001, 0.9172),
    "freiburg3": (535.4, 539.2, 320.1, 247.6, 0.0, 0.0, 0.0, 0.0, 0.0),
}

OPTIONS = {"camera": f"{', '.join(_PUBLISHED)}: whose intrinsics (told by the folder's name)"}


def find_sources(root: Path, camera: str = "") -> list[SceneSource]:
    """The scenes at `root`, each named after its folder.

    Args:
        root: a scene or a folder of scenes.
        camera: ``freiburg1``, ``freiburg2`` or ``freiburg3``; empty = the one in the folder's name.

    Raises:
        SceneError: when there is no scene, or it does not tell whose camera it was.
    """
    folders = scene_folders(root, lambda folder: (folder / "rgb.txt").is_file(), "rgb.txt")
    return [
        SceneSource(folder.resolve().name, folder, functools.partial(_views, folder, _lens(folder, camera)))
        for folder in folders
    ]


def nearest_in_time(times: Sequence[float], wanted: float) -> int | None:
    """Index of the time nearest to the wanted one; None where it is more than `FARTHEST` away.

    Args:
        times: ascending.
        wanted: in the same seconds; of two as near the earlier is taken.
    """
    after = bisect_left(times, wanted)
    around = [i for i in (after - 1, after) if 0 <= i < len(times)]
    nearest = min(around, key=lambda i: abs(times[i] - wanted), default=None)
    return None if nearest is None or abs(times[nearest] - wanted) > FARTHEST else nearest


def _lens(folder: Path, camera: str) -> Lens:
    name = camera
    if not name and (found := re.search(r"freiburg\d", folder.resolve().name)) is not None:
        name = found[0]
    if name not in _PUBLISHED:
        raise SceneError(
            f"Scene {folder} was taken with camera {name or 'of unknown name'}, known are {', '.join(_PUBLISHED)}; "
            "say which: camera=..."
        )
    fx, fy, cx, cy, k1, k2, p1, p2, k3 = _PUBLISHED[name]
    # COLMAP's pixel centres are at +0.5; its FULL_OPENCV has three more coefficients than OpenCV's plain model.
    return Lens("FULL_OPENCV", WIDTH, HEIGHT, (fx, fy, cx + 0.5, cy + 0.5, k1, k2, p1, p2, k3, 0.0, 0.0, 0.0))


def _views(folder: Path, lens: Lens) -> list[View]:
    images = _listed(folder / "rgb.txt")
    depths = _listed(folder / "depth.txt") if (folder / "depth.txt").is_file() else []
    poses = _poses(folder / "groundtruth.txt")
    depth_times, pose_times = [time for time, _ in depths], [time for time, _ in poses]
    views = []
    for time, name in images:
        pose = nearest_in_time(pose_times, time)
        if pose is None:
            continue
        near, depth = nearest_in_time(depth_times, time), None
        if near is not None:
            depth = functools.partial(_depth, folder / depths[near][1], lens)
        read = functools.partial(_image, folder / name, lens)
        views.append(View(str(folder / name), read, poses[pose][1], lens.pinhole.intrinsics, depth))
    if not views:
        raise SceneError(f"Scene {folder} has no image in rgb.txt within {FARTHEST} s of a pose in groundtruth.txt.")
    return views


def _listed(path: Path) -> list[tuple[float, str]]:
    """Times and files, ascending."""
    entries = []
    for words in read_lines(path):
        if len(words) != 2:
            raise SceneError(f"Scene file {path}: {' '.join(words)!r} is not a time and a file; correct it.")
        entries.append((to_numbers(path, f"time of {words[1]}", words[:1], 1)[0], words[1]))
    return sorted(entries)


def _poses(path: Path) -> list[tuple[float, Tensor]]:
    poses = []
    for words in read_lines(path, "Pose"):
        time, *numbers = to_numbers(path, f"pose at {words[0]}", words, 8)
        shift, quaternion = torch.tensor(numbers, dtype=torch.float64).split([3, 4])
        if not math.isclose(float(quaternion.norm()), 1, abs_tol=1e-2):
            raise SceneError(f"Pose file {path}: the pose at {words[0]} has no unit quaternion; correct it.")
        c2w = torch.eye(4, dtype=torch.float64)
        c2w[:3, :3], c2w[:3, 3] = quaternion_to_matrix(quaternion), shift
        poses.append((time, c2w))
    return sorted(poses, key=lambda entry: entry[0])


def _image(path: Path, lens: Lens) -> Tensor:
    return undistort_image(read_sized_image(path, HEIGHT, WIDTH, "TUM RGB-D"), lens)


def _depth(path: Path, lens: Lens) -> Tensor:
    depth = read_depth(path, DEPTH_UNIT)
    if tuple(depth.shape) != (HEIGHT, WIDTH):
        raise SceneError(f"Depth file {path} is {list(depth.shape)}, [{HEIGHT}, {WIDTH}] was wanted; restore it.")
    return undistort_depth(depth, lens)
