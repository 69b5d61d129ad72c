"""What DTU's own evaluation knows of a scan: the reference points and the part of space they may be compared in.

    Points/stl/stl<NNN>_total.ply      points of the structured-light scan, millimetres, already thinned
    ObsMask/ObsMask<N>_10.mat          ObsMask, a grid of booleans; BB, its corners; Res, the side of a cell
    ObsMask/Plane<N>.mat               P, the plane of the table: above it is where P . (x, y, z, 1) > 0

as unpacked from DTU's ``SampleSet.zip`` (``MVS Data``) and ``Points.zip``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hess_plugin.exceptions import MissingDependency, SceneError
from hess_plugin.scenes.clouds import read_cloud

TEST_SCANS = (1, 4, 9, 10, 11, 12, 13, 15, 23, 24, 29, 32, 33, 34, 48, 49, 62, 75, 77, 110, 114, 118)
"""The 22 scans that MVSNet and what came after it are evaluated on."""


@dataclass(frozen=True, eq=False)
class DtuVolume:
    """Where a scan was observed.

    Attributes:
        observed: bool `[X, Y, Z]`; a cell is named by its centre.
        corner: centre of the first cell `[3]` float64, millimetres.
        spacing: distance of two cells, millimetres.
        plane: `[4]` float64; points of the table have ``plane . (x, y, z, 1) = 0``, those above it more.
        opposite: the other corner of the volume's box `[3]` float64, millimetres.
    """

    observed: Tensor
    corner: Tensor
    spacing: float
    plane: Tensor
    opposite: Tensor

    def observable(self, points: Tensor) -> Tensor:
        """Which of `[M, 3]` points lie in an observed cell, bool `[M]`: where accuracy is measured."""
        # Half way between two cells is the upper one's, as in the Matlab code; torch.round would take the even one.
        cell = ((points.double() - self.corner) / self.spacing + 0.5).floor().long()
        size = torch.tensor(self.observed.shape)
        inside = ((cell >= 0) & (cell < size)).all(-1)
        x, y, z = cell.clamp(min=torch.zeros_like(size), max=size - 1).unbind(-1)
        return inside & self.observed[x, y, z]

    def above_plane(self, points: Tensor) -> Tensor:
        """Which of `[M, 3]` points lie above the table, bool `[M]`: where completeness is measured."""
        return points.double() @ self.plane[:3] + self.plane[3] > 0


def truth_cloud(folder: Path, scan: int) -> Path:
    """The file of a scan's reference points."""
    return folder / "Points" / "stl" / f"stl{scan:03d}_total.ply"


def read_volume(folder: Path, scan: int) -> DtuVolume | None:
    """The volume of a scan; None where a folder has neither of its two files.

    Raises:
        SceneError: when one of the files is missing or damaged.
        MissingDependency: when SciPy is not installed.
    """
    mask, plane = folder / "ObsMask" / f"ObsMask{scan}_10.mat", folder / "ObsMask" / f"Plane{scan}.mat"
    if not mask.is_file() and not plane.is_file():
        return None
    grid, table = _matrices(mask, ("ObsMask", "BB", "Res")), _matrices(plane, ("P",))
    box = _shaped(mask, "BB", grid["BB"], (2, 3))
    spacing = float(_shaped(mask, "Res", grid["Res"], (1,))[0])
    observed = np.asarray(grid["ObsMask"])
    if observed.ndim != 3 or not observed.size or not spacing > 0:
        raise SceneError(f"DTU file {mask}: ObsMask is {observed.shape}, Res is {spacing}; copy it again.")
    normal = _shaped(plane, "P", table["P"], (4,))
    corner, opposite = (torch.from_numpy(end.copy()) for end in box)
    return DtuVolume(torch.from_numpy(observed != 0), corner, spacing, torch.from_numpy(normal), opposite)


def read_truth(folder: Path, scan: int) -> Tensor:
    """The reference points `[M, 3]` float32, millimetres; where the volume is known, those above the table and in it.

    Raises:
        SceneError: when a file is missing or damaged, or no point is left.
        MissingDependency: when Open3D or SciPy is not installed.
    """
    path = truth_cloud(folder, scan)
    if not path.is_file():
        raise SceneError(f"Cloud file {path} does not exist; unpack DTU's Points.zip there or leave truth out.")
    points, volume = read_cloud(path), read_volume(folder, scan)
    if volume is not None:
        points = points[volume.above_plane(points) & volume.observable(points)]
    if not len(points):
        raise SceneError(f"Cloud file {path} has no point in the scan's observed volume; copy both again.")
    return points


def _matrices(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise MissingDependency("Reading DTU's .mat files needs SciPy: pip install scipy.") from error
    if not path.is_file():
        raise SceneError(f"DTU file {path} does not exist; unpack DTU's SampleSet.zip there.")
    try:
        held = loadmat(path, variable_names=names)
    except Exception as error:  # its parser raises whatever a damaged file makes it trip over
        raise SceneError(f"DTU file {path} is not a Matlab file ({error}); copy it again.") from error
    missing = [name for name in names if name not in held]
    if missing:
        raise SceneError(f"DTU file {path} has no {missing[0]}; copy it again.")
    return dict(held)


def _shaped(path: Path, field: str, value: Any, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
    array = np.asarray(value)
    if array.dtype.kind not in "iuf" or array.size != np.prod(shape) or not np.isfinite(array).all():
        raise SceneError(f"DTU file {path}: {field} is {array.dtype} {array.shape}, {shape} numbers were wanted.")
    return array.astype(np.float64).reshape(shape)
