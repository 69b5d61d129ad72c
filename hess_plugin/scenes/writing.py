"""Writing a scene as a `scene-v1` folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hess_plugin.exceptions import SceneError
from hess_plugin.scenes.clouds import write_cloud
from hess_plugin.scenes.formats.folder import CAMERAS, CLOUD, FORMAT
from hess_plugin.scenes.images import write_depth, write_image
from hess_plugin.scenes.scene import Scene


def write_folder(scene: Scene, path: str | Path, *, origin: Mapping[str, Any] | None = None) -> Path:
    """Write `scene` so that `read_folder` gives it back: images to 1/255, depth to 1/65535 of the largest.

    The folder appears complete or not at all: it is written beside `path` and then renamed.

    Args:
        scene: with views of one size.
        path: folder to write; it must not exist.
        origin: how the scene was made, JSON types only; kept in cameras.json and passed over by `read_folder`.

    Raises:
        SceneError: when `path` exists already.
        MissingDependency: when Pillow, or Open3D for a scene with `points`, is not installed.
    """
    path = Path(path)
    if path.exists():
        raise SceneError(f"Scene folder {path} exists already; remove it or write elsewhere.")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        _write_files(scene, staging, origin)
        staging.chmod(0o755)  # mkdtemp makes private folders, a scene is meant to be shared
        staging.rename(path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return path


def _write_files(scene: Scene, folder: Path, origin: Mapping[str, Any] | None) -> None:
    (folder / "images").mkdir()
    unit = None
    if scene.depth is not None:
        (folder / "depth").mkdir()
        unit = max(float(scene.depth.max()), 1e-9) / 65535
    frames = []
    for view in range(scene.views):
        frames.append(_frame(scene, view))
        write_image(folder / frames[-1]["image"], scene.images[view])
        if scene.depth is not None and unit is not None:
            write_depth(folder / frames[-1]["depth"], scene.depth[view], unit)
    if scene.points is not None:
        write_cloud(folder / CLOUD, scene.points)
    record: dict[str, Any] = {
        "format": FORMAT,
        "scene": scene.name,
        "convention": "OpenCV camera axes (x right, y down, z forward); c2w maps camera to world; "
        "integer pixel = pixel centre",
        "unit": "arbitrary",
        "depth_scale": unit,
        "frames": frames,
    }
    if origin is not None:
        record["origin"] = dict(origin)
    (folder / CAMERAS).write_text(json.dumps(record, indent=1), encoding="utf-8")


def _frame(scene: Scene, view: int) -> dict[str, Any]:
    return {
        "image": f"images/{view:06d}.png",
        "depth": None if scene.depth is None else f"depth/{view:06d}.png",
        "width": scene.width,
        "height": scene.height,
        "K": _rows(scene.intrinsics[view]),
        "c2w": _rows(scene.c2w[view]),
    }


def _rows(matrix: Tensor) -> list[list[float]]:
    return [[float(value) for value in row] for row in matrix.detach().cpu().double()]
