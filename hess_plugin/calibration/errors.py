"""The camera and the point error of a scene, differentiable in the prediction (HeSS, calibration)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hess_plugin.calibration.alignment import Alignment, align
from hess_plugin.calibration.neighbours import CloudIndex
from hess_plugin.calibration.sampling import subsample
from hess_plugin.exceptions import CalibrationError
from hess_plugin.geometry import Similarity
from hess_plugin.predictions import Prediction
from hess_plugin.scenes.scene import Scene

EPS = 0.05
MAX_POINTS = 200_000
MAX_CLOUD = 1_000_000


@dataclass(frozen=True, eq=False)
class Errors:
    """The errors of one prediction; a scene without true points has no point error.

    Attributes:
        camera: 0-d, or None.
        points: 0-d, or None.
        alignment: how the prediction was brought to the scene.
        inliers: predicted points that `points` rests on.
    """

    camera: Tensor | None
    points: Tensor | None
    alignment: Alignment | None = None
    inliers: int = 0


def camera_error(centres: Tensor, true_centres: Tensor, similarity: Similarity) -> Tensor:
    """`1 / (2 N) * sum |G c - c*|^2` over camera centres `[N, 3]`: 0-d, differentiable in `centres`."""
    if centres.shape != true_centres.shape or centres.ndim != 2 or centres.shape[0] == 0:
        raise CalibrationError(
            f"Camera centres of shapes {list(centres.shape)} and {list(true_centres.shape)} do not fit; "
            "give two [N, 3] with N >= 1."
        )
    centres = at_least_float32(centres)
    difference = similarity.apply(centres) - true_centres.detach().to(centres)
    return difference.square().sum() / (2 * centres.shape[0])


def point_error(
    points: Tensor, cloud: CloudIndex | Tensor, similarity: Similarity, *, eps: float = EPS
) -> tuple[Tensor, int]:
    """`1 / (2 |I|) * sum_I |G x - p|^2`, p the nearest true point, I the points whose p is nearer than `eps`.

    The match is a constant; gradient reaches `points` through the distance only.

    Args:
        points: predicted points `[n, 3]`, those of low confidence already dropped.
        cloud: true points `[M, 3]`, or their index where several predictions share it.
        similarity: from prediction to truth, a constant.
        eps: in the unit of the truth; 0.05 is meant for normalised scenes.

    Returns:
        The error, 0-d, and the number of inliers.

    Raises:
        CalibrationError: when there is no inlier.
    """
    index = cloud if isinstance(cloud, CloudIndex) else CloudIndex(cloud)
    mapped = similarity.apply(at_least_float32(points))
    nearest, squared = index.nearest(mapped)
    inside = squared < eps * eps
    count = int(inside.sum())
    if count == 0:
        reach = float(squared.median().sqrt()) if len(squared) else float("nan")
        raise CalibrationError(
            f"None of {len(points)} predicted points lies within eps={eps:g} of the true cloud, their median "
            f"distance is {reach:.3g}; raise eps or check that prediction and scene belong together."
        )
    chosen = nearest[inside].to(index.points.device)
    truth = index.points[chosen].to(mapped)
    return (mapped[inside] - truth).square().sum() / (2 * count), count


def scene_errors(
    prediction: Prediction,
    scene: Scene,
    *,
    eps: float = EPS,
    max_points: int | None = MAX_POINTS,
    seed: int = 0,
) -> Errors:
    """Align a prediction with its scene and measure both errors, in units of the normalised scene.

    Args:
        prediction: of the scene's views; its graph is kept.
        scene: in any unit; it is normalised first, which gives `eps` its unit.
        eps: inlier distance of the point error.
        max_points: at most so many predicted points, drawn with `seed`, enter the point error; None = all.
        seed: of alignment and subsampling.

    Raises:
        CalibrationError: as `align` and `point_error`, or when no predicted point is confident.
        SceneError: when the scene has no size to normalise by.
    """
    with torch.autocast(prediction.points.device.type, enabled=False):
        return _scene_errors(prediction, scene.normalised(), eps, max_points, seed)


def _scene_errors(prediction: Prediction, scene: Scene, eps: float, max_points: int | None, seed: int) -> Errors:
    alignment = align(prediction, scene, seed=seed)
    camera = camera_error(prediction.centres, scene.centres, alignment.similarity)
    cloud = scene.cloud()
    if cloud is None:
        return Errors(camera, None, alignment)
    points = prediction.points[prediction.confident]
    if not len(points):
        raise CalibrationError(
            f"No predicted point of scene {scene.name} has confidence >= {prediction.min_confidence:g} "
            f"(largest {float(prediction.confidence.detach().max()):.3g}); lower the adapter's threshold."
        )
    index = CloudIndex(subsample(cloud, MAX_CLOUD, seed), seed=seed)
    try:
        error, inliers = point_error(subsample(points, max_points, seed), index, alignment.similarity, eps=eps)
    except CalibrationError as problem:
        raise CalibrationError(f"Scene {scene.name} ({alignment.method}): {problem}") from problem
    return Errors(camera, error, alignment, inliers)


def at_least_float32(points: Tensor) -> Tensor:
    """Half precision cannot hold squared distances of 1e-4: compute errors in float32 or wider."""
    return points.float() if points.dtype in (torch.float16, torch.bfloat16) else points
