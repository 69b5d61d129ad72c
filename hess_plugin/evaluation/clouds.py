"""Cloud metrics: accuracy, completeness, Chamfer distance and the pointmap error, in units of the truth."""

from __future__ import annotations

import torch
from torch import Tensor

from hess_plugin.calibration.alignment import corresponding_points
from hess_plugin.calibration.neighbours import CloudIndex
from hess_plugin.exceptions import CalibrationError
from hess_plugin.geometry import Similarity
from hess_plugin.predictions import Prediction
from hess_plugin.scenes.scene import Scene


def accuracy(predicted: Tensor, true: Tensor | CloudIndex) -> float:
    """Mean distance from predicted points `[n, 3]` to the nearest true point."""
    return _mean_distance(predicted, true)


def completeness(predicted: Tensor | CloudIndex, true: Tensor) -> float:
    """Mean distance from true points `[m, 3]` to the nearest predicted point."""
    return _mean_distance(true, predicted)


def chamfer(predicted: Tensor, true: Tensor) -> float:
    """Mean of accuracy and completeness, the "overall" score of the DTU benchmark, of clouds in one frame."""
    return (accuracy(predicted, true) + completeness(predicted, true)) / 2


@torch.no_grad()
def pointmap_error(prediction: Prediction, scene: Scene, similarity: Similarity) -> float:
    """Mean distance between predicted and true points of the same pixels, wherever the truth is known.

    Points of low confidence count as well: a model must not score better by being unsure.

    Args:
        prediction: of the scene's views.
        scene: with depth.
        similarity: from the prediction to the scene, for example from `align`.

    Raises:
        CalibrationError: when the scene has no depth.
    """
    pairs = corresponding_points(prediction, scene, confident_only=False)
    if pairs is None or not len(pairs[0]):
        raise CalibrationError(f"Scene {scene.name} has no depth to compare a pointmap with; use a scene with depth.")
    predicted, true = pairs
    return float((similarity.apply(predicted.double()) - true.double()).norm(dim=-1).mean())


@torch.no_grad()
def _mean_distance(source: Tensor, target: Tensor | CloudIndex) -> float:
    if isinstance(source, CloudIndex) or source.ndim != 2 or source.shape[1:] != (3,) or not len(source):
        raise CalibrationError("A cloud to measure is empty or not [n, 3]; give at least one point.")
    index = target if isinstance(target, CloudIndex) else CloudIndex(target)
    return float(index.nearest(source.double())[1].sqrt().mean())
