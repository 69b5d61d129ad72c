"""The `scene-v1` folder: images, cameras.json, optional depth and points.ply.

    images/*        8-bit RGB, all of one size
    cameras.json    {format: "scene-v1", scene, depth_scale, frames: [{image, depth, width, height, K, c2w}]}
    depth/*.png     optional, 16-bit: units of length = value * depth_scale, 0 = not known, z-depth
    points.ply      optional, x y z in the world frame

`K` is in pixels, integer coordinate = pixel centre; `c2w` is camera-to-world with OpenCV axes.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hess_plugin.exceptions import SceneError
from hess_plugin.scenes.clouds import read_cloud
from hess_plugin.scenes.images import read_depth, read_image
from hess_plugin.scenes.scene import Scene
from hess_plugin.scenes.sources import SceneSource, View

FORMAT = "scene-v1"
CAMERAS = "cameras.json"
CLOUD = "points.ply"


def find_folders(root: str | Path) -> list[Path]:
    """The scene folders at `root`: itself, or those of its children that hold a cameras.json, sorted by name.

    Raises:
        SceneError: when there is none.
    """
    root = Path(root)
    if root.is_file():
        raise SceneError(f"Scene folder {root} is a file; give the folder that holds it.")
    if not root.is_dir():
        raise SceneError(f"Scene folder {root} does not exist; give a folder that holds scenes.")
    if (root / CAMERAS).is_file():
        return [root]
    found = sorted(child for child in root.iterdir() if (child / CAMERAS).is_file())
    if not found:
        raise SceneError(f"Folder {root} holds no scene: neither it nor a folder in it has a {CAMERAS}.")
    return found


def find_sources(root: Path) -> list[SceneSource]:
    """The scenes at `root`, as `find_folders` finds them; each is named after its folder.

    Raises:
        SceneError: when there is none.
    """
    # The folder's name, which is unique among its siblings: a cameras.json may call itself something else.
    return [_source(path, path.resolve().name) for path in find_folders(root)]


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
    name = str(_read_record(path / CAMERAS).get("scene") or path.name)
    scene = _source(path, name).read(max_views=max_views, seed=seed)
    assert isinstance(scene, Scene)  # every frame of a cameras.json has a camera
    return scene


def _source(path: Path, name: str) -> SceneSource:
    cloud = path / CLOUD
    return SceneSource(name, path, lambda: _views(path), (lambda: read_cloud(cloud)) if cloud.is_file() else None)


def _views(path: Path) -> list[View]:
    cameras = path / CAMERAS
    record = _read_record(cameras)
    unit = record.get("depth_scale")
    views = []
    for frame in record["frames"]:
        image = path / _text(cameras, frame, "image")
        depth = None
        if frame.get("depth") is not None:
            depth = functools.partial(read_depth, path / _text(cameras, frame, "depth"), _unit(cameras, unit))
        views.append(
            View(
                str(image),
                functools.partial(_read_image, image, (frame.get("height"), frame.get("width"))),
                _matrix(cameras, frame, "c2w", 4),
                _matrix(cameras, frame, "K", 3),
                depth,
            )
        )
    return views


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


def _read_image(file: Path, size: tuple[object, object]) -> Tensor:
    image = read_image(file)
    if tuple(image.shape[1:]) != size:
        raise SceneError(
            f"Image file {file} is {image.shape[1]}x{image.shape[2]} (height x width), {CAMERAS} says "
            f"{size[0]}x{size[1]}; its K would be wrong, so make the two agree."
        )
    return image


def _unit(cameras: Path, unit: object) -> float:
    if isinstance(unit, bool) or not isinstance(unit, int | float) or not 0 < unit < math.inf:
        raise SceneError(f"Scene file {cameras}: depth_scale is {unit!r}, give a positive number.")
    return float(unit)


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
