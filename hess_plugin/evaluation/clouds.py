"""Cloud metrics: accuracy, completeness, Chamfer distance, F1 and the pointmap error, in units of the truth.

Nearest neighbours are exact here, in float64 and the same on every machine: calibration's index searches
approximately, which a gradient forgives and a published figure does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hess_plugin.calibration.alignment import corresponding_points
from hess_plugin.exceptions import CalibrationError, MissingDependency
from hess_plugin.geometry import Similarity
from hess_plugin.predictions import Prediction
from hess_plugin.scenes.clouds import import_open3d
from hess_plugin.scenes.scene import Scene


@dataclass(frozen=True)
class CloudScores:
    """How well two clouds of one frame cover each other; lengths in their unit.

    Attributes:
        accuracy: mean distance from predicted points to the nearest true one.
        completeness: mean distance from true points to the nearest predicted one.
        chamfer: mean of both, the "overall" score of the DTU benchmark.
        precision: share of predicted points closer to a true one than the threshold.
        recall: share of true points closer to a predicted one than the threshold.
        f1: harmonic mean of precision and recall, 0 where both are 0.
    """

    accuracy: float
    completeness: float
    chamfer: float
    precision: float
    recall: float
    f1: float

    @classmethod
    def from_distances(cls, there: Tensor, back: Tensor, threshold: float, cut: float = math.inf) -> CloudScores:
        """Scores of nearest distances.

        Args:
            there: from predicted points to the true cloud `[n]`; no point gives NaN accuracy and precision 0.
            back: from true points to the predicted cloud `[m]`, likewise.
            threshold: distances below it count for precision and recall.
            cut: distances from here on are outliers, left out of the means; precision and recall count them.
        """
        accuracy, completeness = (float(distances[distances < cut].mean()) for distances in (there, back))
        precision, recall = (
            float((distances < threshold).double().mean()) if len(distances) else 0.0 for distances in (there, back)
        )
        both = precision + recall
        f1 = 2 * precision * recall / both if both else 0.0
        return cls(accuracy, completeness, (accuracy + completeness) / 2, precision, recall, f1)


@torch.no_grad()
def compare_clouds(predicted: Tensor, true: Tensor, threshold: float) -> CloudScores:
    """All scores of two clouds `[n, 3]` and `[m, 3]` in one frame, each direction searched once.

    Args:
        predicted: may be empty: lengths are NaN then, F1 is 0.
        true: at least one point.
        threshold: distance of precision and recall, in the clouds' unit; equal to it is not within it.

    Raises:
        CalibrationError: when a cloud is misshapen or not finite, or the true one empty.
        MissingDependency: when neither Open3D nor SciPy is installed.
    """
    if predicted.ndim == 2 and not len(predicted):
        nothing = torch.empty(0, dtype=torch.float64)
        return CloudScores.from_distances(nothing, nothing, threshold)
    there, back = nearest_distances(predicted, true), nearest_distances(true, predicted)
    return CloudScores.from_distances(there, back, threshold)


@torch.no_grad()
def pixel_distance(prediction: Prediction, scene: Scene, similarity: Similarity) -> float:
    """Mean distance between predicted and true points of the same pixels; NaN for a scene without depth.

    Points of low confidence count as well: a model must not score better by being unsure.

    Args:
        prediction: of the scene's views.
        scene: in any unit, which is that of the distance.
        similarity: from the prediction to the scene, for example from `align`.
    """
    pairs = corresponding_points(prediction, scene, confident_only=False)
    if pairs is None or not len(pairs[0]):
        return math.nan
    predicted, true = pairs
    return float((similarity.apply(predicted.double()) - true.double()).norm(dim=-1).mean())


def nearest_distances(source: Tensor, target: Tensor) -> Tensor:
    """Distance from every point of one cloud to the nearest of another, exact.

    Args:
        source: `[n, 3]`, any floating dtype and device, n at least 1.
        target: `[m, 3]`, likewise.

    Returns:
        `[n]` float64 on the CPU.

    Raises:
        CalibrationError: when a cloud is empty, misshapen or not finite.
        MissingDependency: when neither Open3D nor SciPy is installed.
    """
    start, end = (_checked(points) for points in (source, target))
    try:
        open3d = import_open3d("Measuring clouds")
    except MissingDependency:
        return _scipy_distances(start, end)
    clouds = [open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points.numpy())) for points in (start, end)]
    return torch.from_numpy(np.array(clouds[0].compute_point_cloud_distance(clouds[1])))  # its list is slow to read


def _scipy_distances(source: Tensor, target: Tensor) -> Tensor:
    try:
        from scipy.spatial import cKDTree
    except ImportError as error:
        raise MissingDependency("Measuring clouds needs Open3D or SciPy: pip install scipy.") from error
    return torch.from_numpy(cKDTree(target.numpy()).query(source.numpy(), workers=torch.get_num_threads())[0])


def _checked(points: Tensor) -> Tensor:
    if points.ndim != 2 or points.shape[1] != 3 or not len(points):
        raise CalibrationError("A cloud to measure is empty or not [n, 3]; give at least one point.")
    if not bool(torch.isfinite(points).all()):
        raise CalibrationError("A cloud to measure has values that are not finite; remove them.")
    return points.detach().to("cpu", torch.float64).contiguous()
