"""Point cloud files, through Open3D."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hess_plugin.exceptions import MissingDependency, SceneError

_BYTES = {
    **dict.fromkeys(("char", "uchar", "int8", "uint8"), 1),
    **dict.fromkeys(("short", "ushort", "int16", "uint16"), 2),
    **dict.fromkeys(("int", "uint", "float", "int32", "uint32", "float32"), 4),
    **dict.fromkeys(("double", "float64"), 8),
}


def read_cloud(path: Path) -> Tensor:
    """The vertices of a ply file as `[M, 3]` float32.

    Raises:
        SceneError: when the file is not a ply or holds fewer vertices than its header says.
        MissingDependency: when Open3D is not installed.
    """
    expected = _vertices(path)
    open3d = import_open3d("Reading a point cloud")
    with open3d.utility.VerbosityContextManager(open3d.utility.VerbosityLevel.Error):
        cloud = open3d.io.read_point_cloud(str(path), format="ply")
    points = np.asarray(cloud.points)
    if len(points) != expected:
        raise SceneError(f"Cloud file {path} gives {len(points)} of {expected} points; write it again.")
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


def _vertices(path: Path) -> int:
    """Number of vertices, from the header.

    Open3D fills the vertices that a file cut short lacks with whatever memory holds: the length is checked here.
    """
    data = path.read_bytes()
    head, end, body = data.partition(b"end_header\n")
    if not head.startswith(b"ply") or not end:
        raise SceneError(f"Cloud file {path} is not a ply file; write it again or remove it.")
    lines = [line.split() for line in head.decode("ascii", "replace").splitlines()]
    starts = [i for i, words in enumerate(lines) if words[:1] == ["element"]]
    if not starts or lines[starts[0]][1:2] != ["vertex"] or not lines[starts[0]][-1].isdigit():
        raise SceneError(f"Cloud file {path} does not begin with its vertices; write it again or remove it.")
    count = int(lines[starts[0]][-1])
    stop = starts[1] if len(starts) > 1 else len(lines)
    types = [words[1] for words in lines[starts[0] + 1 : stop] if words[:1] == ["property"]]
    if ["format", "ascii", "1.0"] in lines:
        held = body.count(b"\n")
    else:
        held = len(body) // max(1, sum(_BYTES.get(kind, 0) for kind in types))
    if held < count:
        raise SceneError(f"Cloud file {path} holds {held} of {count} points; copy it again.")
    return count
