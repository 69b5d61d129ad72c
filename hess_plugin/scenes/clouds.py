"""Point cloud files, through Open3D."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hess_plugin.exceptions import MissingDependency, SceneError


def read_cloud(path: Path) -> Tensor:
    """The vertices of a ply file as `[M, 3]` float32.

    Raises:
        SceneError: when the file is not a ply or holds fewer vertices than its header says.
        MissingDependency: when Open3D is not installed.
    """
    expected = _vertices_in_header(path)
    open3d = import_open3d("Reading a point cloud")
    # Open3D prints a warning and returns what it has when a file is cut short: count for ourselves.
    with open3d.utility.VerbosityContextManager(open3d.utility.VerbosityLevel.Error):
        cloud = open3d.io.read_point_cloud(str(path), format="ply")
    points = np.asarray(cloud.points)
    if len(points) != expected:
        raise SceneError(f"Cloud file {path} holds {len(points)} of {expected} points; copy it again.")
    return torch.from_numpy(points.astype(np.float32))


def write_cloud(path: Path, points: Tensor) -> None:
    """Write `[M, 3]` as a binary ply of float32 x y z and grey uint8 colours."""
    open3d = import_open3d("Writing a point cloud")
    core = open3d.core
    positions = points.detach().cpu().to(torch.float32).contiguous().numpy()
    cloud = open3d.t.geometry.PointCloud(core.Tensor(positions))
    cloud.point.colors = core.Tensor(np.full((len(positions), 3), 128, dtype=np.uint8))
    if not open3d.t.io.write_point_cloud(str(path), cloud):
        raise SceneError(f"Cloud file {path} could not be written; check the disk and the folder.")


def import_open3d(step: str) -> Any:
    """The open3d module, or MissingDependency naming the step that needs it."""
    try:
        import open3d
    except ImportError as error:
        raise MissingDependency(f"{step} needs Open3D: pip install open3d.") from error
    return open3d


def _vertices_in_header(path: Path) -> int:
    with path.open("rb") as file:
        head = file.read(65536)
    if not head.startswith(b"ply") or b"end_header" not in head:
        raise SceneError(f"Cloud file {path} is not a ply file; write it again or remove it.")
    for line in head.split(b"end_header")[0].splitlines():
        words = line.split()
        if words[:2] == [b"element", b"vertex"] and len(words) == 3 and words[2].isdigit():
            return int(words[2])
    raise SceneError(f"Cloud file {path} has no vertices in its header; write it again or remove it.")
