"""Alignment of a prediction with the truth of its scene (HeSS, calibration): nothing is differentiable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hess_plugin.calibration.registration import coarse, refine
from hess_plugin.calibration.sampling import subsample
from hess_plugin.calibration.umeyama import are_collinear, trimmed_umeyama, umeyama
from hess_plugin.exceptions import CalibrationError
from hess_plugin.geometry import Similarity
from hess_plugin.predictions import Prediction
from hess_plugin.scenes.scene import Scene

__all__ = ["Alignment", "align", "check_prediction", "corresponding_points", "trimmed_umeyama", "umeyama"]

MIN_CORRESPONDENCES = 16
MAX_CORRESPONDENCES = 200_000
CLOSED_FORMS = ("pixels", "cameras")

_Start = tuple[Similarity, str, int]  # and its method and inliers, before ICP


@dataclass(frozen=True, eq=False)
class Alignment:
    """How a prediction was brought into the frame of its scene.

    Attributes:
        similarity: maps predicted points to the scene, float64, a constant for autograd.
        method: `"pixels"`, `"cameras"` or `"features"`, then what ICP did: `"pixels, icp"`.
        inliers: correspondences that the closed-form (or RANSAC) step rests on.
    """

    similarity: Similarity
    method: str
    inliers: int


@torch.no_grad()
def align(
    prediction: Prediction, scene: Scene, *, seed: int = 0, icp: bool = True, closed_form: str = "pixels"
) -> Alignment:
    """The similarity from prediction to ground truth.

    Closed form on pixel correspondences where the scene has depth (fitted, the worst fifth dropped, fitted
    again); else on camera centres; else, where these fix no rotation, feature matching of the clouds. Then
    point-to-plane ICP against the true cloud, rigid, kept only when it brings the clouds closer. Repeatable
    bit for bit on one machine with one number of torch threads.

    Args:
        prediction: of the scene's views, in their order.
        scene: in any unit and frame; the similarity leads into it.
        seed: of RANSAC and of subsampling.
        icp: whether to refine.
        closed_form: the one tried first, of `CLOSED_FORMS`; the other where it fixes nothing.

    Raises:
        CalibrationError: when prediction and scene differ in views, values are not finite, nothing fixes a
            similarity, or there is no such closed form.
        MissingDependency: when Open3D is needed and not installed.
    """
    check_prediction(prediction, scene)
    start = _closed_form(prediction, scene, seed, closed_form) or _by_features(prediction, scene, seed)
    similarity, method, inliers = start
    cloud = scene.cloud() if icp else None
    points = prediction.points[prediction.confident]
    if cloud is not None and len(points):
        # Sampled before it is mapped: mapping millions of float64 points to keep a part of them is slow.
        points = similarity.apply(subsample(points, MAX_CORRESPONDENCES, seed).double())
        step, what = refine(points, cloud, scene.unit_length(), seed=seed)
        method = f"{method}, {what}"
        if step is not None:
            similarity = step.compose(similarity)
    return Alignment(similarity, method, inliers)


def corresponding_points(
    prediction: Prediction, scene: Scene, *, confident_only: bool = True
) -> tuple[Tensor, Tensor] | None:
    """Predicted and true points of the same pixels, `[n, 3]` each, where truth is known; None without depth.

    Where the prediction is coarser than the image, the truth of the nearest pixel is taken. Predicted points
    keep their gradient and dtype, the true ones come on the same device.
    """
    known = scene.world_points()
    if known is None:
        return None
    rows, columns = (index.to(known[0].device) for index in prediction.pixel_grid(scene.height, scene.width))
    truth, valid = (part[:, rows][:, :, columns].to(prediction.points.device) for part in known)
    if confident_only:
        valid = valid & prediction.confident
    return prediction.points[valid], truth[valid]


def _closed_form(prediction: Prediction, scene: Scene, seed: int, first: str) -> _Start | None:
    if first not in CLOSED_FORMS:
        raise CalibrationError(f"closed_form is {first!r}, wanted one of {', '.join(CLOSED_FORMS)}.")
    if first == "cameras":
        return _by_cameras(prediction, scene) or _by_pixels(prediction, scene, seed)
    return _by_pixels(prediction, scene, seed) or _by_cameras(prediction, scene)


def _by_pixels(prediction: Prediction, scene: Scene, seed: int) -> _Start | None:
    pairs = corresponding_points(prediction, scene)
    if pairs is None or len(pairs[0]) < MIN_CORRESPONDENCES:
        return None
    source, target = (subsample(points, MAX_CORRESPONDENCES, seed) for points in pairs)
    if are_collinear(source) or are_collinear(target):
        return None
    similarity, kept = trimmed_umeyama(source, target)
    return similarity, "pixels", int(kept.sum())


def _by_cameras(prediction: Prediction, scene: Scene) -> _Start | None:
    if are_collinear(prediction.centres) or are_collinear(scene.centres):
        return None
    return umeyama(prediction.centres, scene.centres.to(prediction.centres.device)), "cameras", scene.views


def _by_features(prediction: Prediction, scene: Scene, seed: int) -> _Start:
    cloud = scene.cloud()
    if cloud is None:
        raise CalibrationError(_nothing_to_align(prediction, scene))
    points = prediction.points[prediction.confident]
    if len(points) < MIN_CORRESPONDENCES:
        raise CalibrationError(
            f"The prediction for scene {scene.name} has {len(points)} points of confidence at least "
            f"{prediction.min_confidence:g}, too few to align; lower the adapter's threshold."
        )
    unit = float((points.double() - prediction.centres[0].double()).norm(dim=-1).mean())
    if not unit > 0:
        raise CalibrationError(f"The predicted points of scene {scene.name} are all in one place.")
    similarity, inliers = coarse(points, unit, cloud, scene.unit_length(), seed=seed)
    return similarity, "features", inliers


def _nothing_to_align(prediction: Prediction, scene: Scene) -> str:
    remedy = "give it depth, points, or at least 3 views that are not on a line."
    if scene.views < 3:
        views = "one view" if scene.views == 1 else f"{scene.views} views"
        return f"Scene {scene.name} has {views} and no depth or points to align a prediction to; {remedy}"
    whose = "true" if are_collinear(scene.centres) else "predicted"
    return (
        f"The {whose} camera centres of scene {scene.name} lie on a line or in one place and it has no "
        f"depth or points, so no rotation can be found; {remedy}"
    )


def check_prediction(prediction: Prediction, scene: Scene) -> None:
    """Raise CalibrationError unless `prediction` is of all views of `scene` and finite."""
    views = prediction.c2w.shape[0]
    if views != scene.views:
        raise CalibrationError(
            f"The prediction has {views} views, scene {scene.name} has {scene.views}; predict all of them."
        )
    for name in ("points", "c2w", "confidence"):
        bad = int((~torch.isfinite(getattr(prediction, name))).sum())
        if bad:
            raise CalibrationError(
                f"The prediction for scene {scene.name} has {bad} values in {name} that are not finite; "
                "run the model in float32 and check its weights."
            )
