"""The protocol of the DTU benchmark (Jensen et al. 2014), step by step as its published Matlab code takes them.

1. The predicted cloud is thinned until no two points are within 0.2 mm, visiting them in random order. The reference
   points come thinned.
2. Accuracy: distances from thinned predicted points in an observed cell of ObsMask to all reference points.
3. Completeness: distances from reference points above the plane of the table to all thinned predicted points.
4. Distances of 20 mm and more are outliers, left out. Accuracy and completeness are the means of the rest, their mean
   is the overall score.

The Matlab code searches in cells of 60 mm, laid from the first corner of the volume's box until they cover it, and
gives a point outside of them 60 mm: such a point is an outlier of whatever side it is on. Neither cloud is cut to the
box as the one that is searched in.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hess_plugin.evaluation.clouds import CloudScores
from hess_plugin.evaluation.thinning import thin
from hess_plugin.exceptions import MissingDependency, PatchError, SceneError
from hess_plugin.scenes.clouds import read_cloud
from hess_plugin.scenes.formats.dtu import DtuVolume, read_volume, truth_cloud

SPACING = 0.2
OUTLIER = 20.0
SEARCH_CELL = 60.0
_SCAN = re.compile(r"scan(\d+)(?:_train)?")
_SLACK = 1 + 1e-9


@dataclass(frozen=True)
class DtuProtocol:
    """DTU's own way to measure a cloud.

    Attributes:
        folder: with ``Points/stl`` and ``ObsMask``, as in `hess_plugin.scenes.formats.dtu`.
        threshold: distance of F1, millimetres; None for the distance that is used without the protocol. The benchmark
            itself knows no F1: it is made of the distances of steps 2 and 3, where outliers are misses.
        seed: of the order in which the cloud is thinned.

    Raises:
        SceneError: when there is no such folder.
        PatchError: when the threshold is not a positive number.
    """

    folder: Path
    threshold: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise SceneError(f"Folder {self.folder} does not exist; give the one with DTU's Points and ObsMask.")
        if self.threshold is not None and not 0 < self.threshold < math.inf:
            raise PatchError(f"DTU's threshold is {self.threshold!r}, wanted a distance above 0 in millimetres.")

    @torch.no_grad()
    def measure(self, points: Tensor, scan: int, threshold: float) -> CloudScores:
        """Measure a cloud against a scan.

        Args:
            points: `[n, 3]`, millimetres in the frame of the scan's cameras, finite; n may be 0.
            scan: its number.
            threshold: of F1 where the protocol sets none, millimetres.

        Returns:
            Scores in millimetres; a mean over no point is NaN.

        Raises:
            SceneError: when a file of the scan is missing or damaged.
            MissingDependency: when Open3D or SciPy is not installed.
        """
        truth = _read(self.folder, scan)
        points = points.detach().to("cpu", torch.float64)
        thinned = points[thin(points, SPACING, seed=self.seed)]
        threshold = self.threshold or threshold
        farthest = max(OUTLIER, threshold)
        inside = thinned[truth.volume.observable(thinned)]
        there = _distances(inside, truth.tree, truth.volume, farthest)
        back = _distances(truth.above, _tree(thinned), truth.volume, farthest)
        return CloudScores.from_distances(there, back, threshold, OUTLIER)


def scan_number(name: str) -> int:
    """The scan that a scene is of, by its name as `hess_plugin.scenes.formats.mvsnet` gives it.

    Raises:
        SceneError: when the name holds none.
    """
    found = _SCAN.fullmatch(name.rpartition("/")[2])
    if found is None:
        raise SceneError(
            f"Scene {name} is not named scan<N>, so its reference points in DTU are not known; name it so or measure "
            "it without DTU's protocol."
        )
    return int(found[1])


@dataclass(frozen=True, eq=False)
class _Truth:
    """A scan's reference: a tree of all its points, those above the table `[m, 3]` float64, and its volume."""

    tree: Any
    above: Tensor
    volume: DtuVolume


@functools.lru_cache(maxsize=1)
def _read(folder: Path, scan: int) -> _Truth:
    """Kept for the next arm on the same scene: millions of points take seconds to read."""
    path, volume = truth_cloud(folder, scan), read_volume(folder, scan)
    if not path.is_file():
        raise SceneError(f"Cloud file {path} does not exist; unpack DTU's Points.zip there.")
    if volume is None:
        wanted = folder / "ObsMask" / f"ObsMask{scan}_10.mat"
        raise SceneError(f"DTU file {wanted} does not exist; unpack DTU's SampleSet.zip there.")
    points = read_cloud(path).double()
    if not len(points) or not bool(torch.isfinite(points).all()):
        raise SceneError(f"Cloud file {path} has no points or some that are not finite; copy it again.")
    return _Truth(_tree(points), points[volume.above_plane(points)], volume)


def _distances(source: Tensor, tree: Any, volume: DtuVolume, farthest: float) -> Tensor:
    """Distances to a tree, exact below `farthest`; infinite from there on and for points that are not searched."""
    distances = torch.full((len(source),), math.inf, dtype=torch.float64)
    searched = _is_searched(source, volume)
    if tree is not None and bool(searched.any()):
        found, _ = tree.query(
            source[searched].numpy(), distance_upper_bound=farthest * _SLACK, workers=torch.get_num_threads()
        )
        distances[searched] = torch.from_numpy(found)
    return distances


def _is_searched(points: Tensor, volume: DtuVolume) -> Tensor:
    cells = ((volume.opposite - volume.corner) / SEARCH_CELL).floor() + 1
    return ((points >= volume.corner) & (points < volume.corner + cells * SEARCH_CELL)).all(-1)


def _tree(points: Tensor) -> Any:
    """A KD-tree; None of no point."""
    try:
        from scipy.spatial import cKDTree
    except ImportError as error:
        raise MissingDependency("DTU's protocol needs SciPy: pip install scipy.") from error
    return cKDTree(points.numpy()) if len(points) else None
