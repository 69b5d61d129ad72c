"""The `scene-v1` folder: images, cameras.json, optional depth and points.ply.

    images/*        8-bit RGB, all of one size
    cameras.json    {format: "scene-v1", scene, depth_scale, frames: [{image, depth, width, height, K, c2w}]}
    depth/*.png     optional, 16-bit: units of length = value * depth_scale, 0 = not known, z-depth
    points.ply      optional, x y z in the world frame

`K` is in pixels, integer coordinate = pixel centre; `c2w` is camera-to-world with OpenCV axes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hess_plugin.exceptions import SceneError
from hess_plugin.scenes.choice import choose
from hess_plugin.scenes.clouds import read_cloud
from hess_plugin.scenes.images import read_depth, read_image
from hess_plugin.scenes.scene import Scene

FORMAT = "scene-v1"
CAMERAS = "cameras.json"
CLOUD = "points.ply"


def find_folders(root: str | Path) -> list[Path]:
    """The scene folders at `root`: itself, or those of its children that hold a cameras.json, sorted by name.

    Raises:
        SceneError: when there is none.
    """
    root = Path(root)
    if not root.is_dir():
        raise SceneError(f"Scene folder {root} does not exist; give a folder that holds scenes.")
    if (root / CAMERAS).is_file():
        return [root]
    found = sorted(child for child in root.iterdir() if (child / CAMERAS).is_file())
    if not found:
        raise SceneError(f"Folder {root} holds no scene: neither it nor a folder in it has a {CAMERAS}.")
    return found


def read_folder(path: str | Path, *, max_views: int | None = None, seed: int = 0) -> Scene:
    """Read one scene.

    Args:
        path: the scene's folder.
        max_views: at most so many views, drawn at random with `seed` and kept in recorded order; None = all.
        seed: chooses the views; the same seed chooses the same views.

    Returns:
        The scene with float32 images, depth and points and float64 cameras.

    Raises:
        SceneError: naming the file and the field that is wrong.
        MissingDependency: when Pillow, or Open3D for a points.ply, is not installed.
    """
    path = Path(path)
    record = _read_record(path / CAMERAS)
    frames = [record["frames"][i] for i in choose(len(record["frames"]), max_views, seed)]
    images = _read_images(path, frames)
    cameras = path / CAMERAS
    c2w = torch.stack([_matrix(cameras, frame, "c2w", 4) for frame in frames])
    intrinsics = torch.stack([_matrix(cameras, frame, "K", 3) for frame in frames])
    depth = _read_depths(path, frames, record.get("depth_scale"), tuple(images.shape[-2:]))
    points = read_cloud(path / CLOUD) if (path / CLOUD).is_file() else None
    try:
        return Scene(str(record.get("scene") or path.name), images, c2w, intrinsics, depth, points)
    except SceneError as error:
        raise SceneError(f"{path}: {error}") from error


def _read_record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SceneError(f"Scene file {path} does not exist; give the folder that holds it.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SceneError(f"Scene file {path} is not JSON ({error}); write it again.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        given = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise SceneError(f"Scene file {path}: format is {given!r}, {FORMAT!r} was wanted.")
    frames = record.get("frames")
    if not isinstance(frames, list) or not frames or not all(isinstance(frame, dict) for frame in frames):
        raise SceneError(f"Scene file {path}: frames is not a list of at least one frame.")
    return record


def _read_images(path: Path, frames: list[dict[str, Any]]) -> Tensor:
    images: list[Tensor] = []
    for frame in frames:
        file = path / _text(path / CAMERAS, frame, "image")
        image = read_image(file)
        size = (frame.get("height"), frame.get("width"))
        if tuple(image.shape[1:]) != size:
            raise SceneError(
                f"Image file {file} is {image.shape[1]}x{image.shape[2]} (height x width), {CAMERAS} says "
                f"{size[0]}x{size[1]}; its K would be wrong, so make the two agree."
            )
        if images and image.shape != images[0].shape:
            raise SceneError(
                f"Image file {file} is {image.shape[1]}x{image.shape[2]}, the first image is "
                f"{images[0].shape[1]}x{images[0].shape[2]}; all images of a scene need one size."
            )
        images.append(image)
    return torch.stack(images)


def _read_depths(path: Path, frames: list[dict[str, Any]], unit: object, size: tuple[int, ...]) -> Tensor | None:
    if all(frame.get("depth") is None for frame in frames):
        return None
    if isinstance(unit, bool) or not isinstance(unit, int | float) or not 0 < unit < math.inf:
        raise SceneError(f"Scene file {path / CAMERAS}: depth_scale is {unit!r}, give a positive number.")
    depths: list[Tensor] = []
    for frame in frames:
        if frame.get("depth") is None:
            depths.append(torch.zeros(size))
            continue
        file = path / _text(path / CAMERAS, frame, "depth")
        depths.append(read_depth(file, float(unit)))
        if tuple(depths[-1].shape) != size:
            raise SceneError(
                f"Depth file {file} is {depths[-1].shape[0]}x{depths[-1].shape[1]}, its image is "
                f"{size[0]}x{size[1]}; the two must have one size."
            )
    return torch.stack(depths)


def _text(cameras: Path, frame: Mapping[str, Any], field: str) -> str:
    value = frame.get(field)
    if not isinstance(value, str) or not value:
        raise SceneError(f"Scene file {cameras}: {field} of a frame is {value!r}, a file name was wanted.")
    return value


def _matrix(cameras: Path, frame: Mapping[str, Any], field: str, size: int) -> Tensor:
    where = f"Scene file {cameras}: {field} of {frame.get('image')}"
    try:
        matrix = torch.tensor(frame.get(field), dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SceneError(f"{where} is not a {size}x{size} matrix of numbers.") from error
    if tuple(matrix.shape) != (size, size):
        raise SceneError(f"{where} has shape {list(matrix.shape)}, {size}x{size} was wanted.")
    if not bool(torch.isfinite(matrix).all()):
        raise SceneError(f"{where} has values that are not finite; leave the frame out or correct it.")
    return matrix
