"""Every metric of a prediction, under one alignment with the truth."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hess_plugin.calibration.alignment import Alignment, align, check_prediction, umeyama
from hess_plugin.calibration.sampling import subsample
from hess_plugin.exceptions import PatchError
from hess_plugin.geometry import Similarity
from hess_plugin.predictions import Prediction
from hess_plugin.scenes.scene import Scene

from .clouds import CloudScores, compare_clouds, pixel_distance
from .dtu import DtuProtocol, scan_number
from .pose import absolute_trajectory_error, pose_auc
from .records import FAILED

ALIGNMENTS = ("pixels", "icp", "cameras")


@dataclass(frozen=True)
class MetricSettings:
    """How a prediction is measured; checked when made.

    Attributes:
        threshold: distance of F1, in the unit of the scene (0.05 is meant for normalised ones).
        alignment: ``pixels``, the closed form on pixel correspondences, fitted twice (ReSS); ``icp``, the same refined
            by point-to-plane ICP (HeSS); ``cameras``, the closed form on camera centres. Where a scene has no depth,
            cameras stand in for pixels, and where centres fix no rotation, pixels for cameras, then features.
        min_confidence: points below it are left out of alignment and clouds; None for the adapter's own threshold.
        max_points: at most so many points of each cloud, drawn with a fixed seed. Neighbours get farther in a
            thinner cloud: both distances grow by about the gap between the points that are left, so compare figures
            of one `max_points` only. DTU's protocol has its own thinning and takes all points.
        dtu: measure clouds by DTU's protocol, in millimetres.
        clouds: whether to search nearest neighbours at all; without, accuracy, completeness, Chamfer and F1 are NaN.

    Raises:
        PatchError: naming the setting that is wrong.
    """

    threshold: float = 0.05
    alignment: str = "pixels"
    min_confidence: float | None = None
    max_points: int = 200_000
    dtu: DtuProtocol | None = None
    clouds: bool = True

    def __post_init__(self) -> None:
        if not _is_number(self.threshold) or not 0 < self.threshold < math.inf:
            raise PatchError(f"threshold is {self.threshold!r}, wanted a distance above 0.")
        if self.alignment not in ALIGNMENTS:
            raise PatchError(f"alignment is {self.alignment!r}, wanted one of {', '.join(ALIGNMENTS)}.")
        least = self.min_confidence
        if least is not None and (not _is_number(least) or math.isnan(least)):
            raise PatchError(f"min_confidence is {least!r}, wanted a number in the model's own range, or None.")
        count = self.max_points
        if not isinstance(count, numbers.Integral) or isinstance(count, bool) or count < 1:
            raise PatchError(f"max_points is {count!r}, wanted a whole number of at least 1.")


@dataclass(frozen=True)
class PredictionScores:
    """One prediction against the truth of its scene; NaN where the truth does not tell.

    Attributes:
        auc30: area under the accuracy curve of relative poses up to 30 degrees, 0 to 1 (larger is better);
            `auc15`, `auc5`, `auc3` likewise. Needs no alignment.
        ate: root mean square distance of camera centres after the alignment that is best for them (evo, TUM).
        centre_error: the same distance under `alignment`, which the points share.
        point_error: mean distance of predicted to true points of the same pixels, sure or unsure.
        accuracy: mean distance of confident predicted points to the true cloud; where that is made of depth maps, of
            the pixels that have depth.
        completeness: mean distance of true points to the confident predicted ones.
        chamfer: mean of accuracy and completeness.
        f1: harmonic mean of the shares of predicted and of true points with a neighbour closer than the threshold.
            No confident point at all gives 0, and NaN lengths.
        alignment: what was done in the end: ``pixels``, ``cameras``, ``features``, then what ICP did, if it was asked;
            or ``failed:`` and why, from `scores_without_alignment`.
        unit: of every length: ``scene``, the unit of the scene, or ``mm`` under DTU's protocol.
    """

    auc30: float
    auc15: float
    auc5: float
    auc3: float
    ate: float
    centre_error: float
    point_error: float
    accuracy: float
    completeness: float
    chamfer: float
    f1: float
    alignment: str
    unit: str


@torch.no_grad()
def measure_prediction(
    prediction: Prediction, scene: Scene, settings: MetricSettings | None = None
) -> PredictionScores:
    """Measure a prediction.

    Args:
        prediction: of all views of the scene, two or more.
        scene: normalised, for lengths and a threshold that mean the same in every scene.
        settings: how; the defaults where None.

    Raises:
        CalibrationError: when the prediction is not of the scene's views or not finite, or cannot be aligned with a
            scene that has depth or points. Cameras alone always can: centres on a line have a least distance, too.
        SceneError: when DTU's protocol does not know the scene, or lacks a file.
        MissingDependency: when a library that a step needs is not installed.
    """
    settings = settings or MetricSettings()
    if settings.min_confidence is not None:
        prediction = replace(prediction, min_confidence=settings.min_confidence)
    scan = None if settings.dtu is None else scan_number(scene.name)
    found = align_with_truth(prediction, scene, settings.alignment)
    areas = {f"auc{degrees}": area for degrees, area in pose_auc(prediction.c2w, scene.c2w).items()}
    clouds = _clouds(prediction, scene, found.similarity, settings, scan)
    unit = 1.0 if scan is None else scene.scale
    return PredictionScores(
        **areas,
        ate=unit * absolute_trajectory_error(prediction.c2w, scene.c2w),
        centre_error=unit * _centre_error(prediction, scene, found.similarity),
        point_error=unit * pixel_distance(prediction, scene, found.similarity),
        accuracy=clouds.accuracy,
        completeness=clouds.completeness,
        chamfer=clouds.chamfer,
        f1=clouds.f1,
        alignment=found.method,
        unit="scene" if scan is None else "mm",
    )


def scores_without_alignment(
    prediction: Prediction, scene: Scene, reason: str, settings: MetricSettings | None = None
) -> PredictionScores:
    """Measure what can be of a prediction that `measure_prediction` refused: the cameras.

    AUC needs no alignment; where a pose is not finite it counts as a miss. ATE has one of its own, and is NaN where a
    pose is not finite. Everything else is NaN.

    Args:
        prediction: of all views of the scene, two or more.
        scene: normalised.
        reason: what `measure_prediction` said; kept in `PredictionScores.alignment`.
        settings: how; the defaults where None.

    Raises:
        CalibrationError: when the prediction is not of the scene's views, which no scene excuses.
    """
    by_millimetres = settings is not None and settings.dtu is not None
    areas = {f"auc{degrees}": area for degrees, area in pose_auc(prediction.c2w, scene.c2w).items()}
    ate = math.nan
    if bool(torch.isfinite(prediction.c2w).all()):
        ate = (scene.scale if by_millimetres else 1.0) * absolute_trajectory_error(prediction.c2w, scene.c2w)
    return PredictionScores(
        **areas,
        ate=ate,
        centre_error=math.nan,
        point_error=math.nan,
        accuracy=math.nan,
        completeness=math.nan,
        chamfer=math.nan,
        f1=math.nan,
        alignment=FAILED + " ".join(reason.split()),
        unit="mm" if by_millimetres else "scene",
    )


def align_with_truth(prediction: Prediction, scene: Scene, how: str) -> Alignment:
    """Align a prediction with its scene in one of the `ALIGNMENTS`, as `MetricSettings` describes them."""
    if scene.depth is not None or scene.points is not None:
        closed_form = "cameras" if how == "cameras" else "pixels"
        return align(prediction, scene, icp=how == "icp", closed_form=closed_form)
    check_prediction(prediction, scene)
    # Only centres are measured, and their least distance is one even where two, or a line of them, leave a turn open.
    centres = scene.centres.to(prediction.centres.device)
    return Alignment(umeyama(prediction.centres, centres, unique=False), "cameras", scene.views)


def _centre_error(prediction: Prediction, scene: Scene, similarity: Similarity) -> float:
    predicted, true = (centres.detach().to("cpu", torch.float64) for centres in (prediction.centres, scene.centres))
    return float((similarity.apply(predicted) - true).square().sum(-1).mean().sqrt())


def _clouds(
    prediction: Prediction, scene: Scene, similarity: Similarity, settings: MetricSettings, scan: int | None
) -> CloudScores:
    if settings.dtu is not None and scan is not None:
        points = prediction.points.detach()[prediction.confident]
        points = _recorded(similarity.apply(points.to("cpu", torch.float64)), scene)
        return settings.dtu.measure(points, scan, settings.threshold * scene.scale)
    true = scene.cloud() if settings.clouds else None
    if true is None:
        return CloudScores(*[math.nan] * 6)
    points = prediction.points.detach()[prediction.confident & _in_reach(prediction, scene)]
    # Sampled before it is mapped: mapping millions of float64 points to keep a part of them is slow.
    points, true = (subsample(cloud, settings.max_points, seed=0).double() for cloud in (points, true))
    return compare_clouds(similarity.apply(points), true, settings.threshold)


def _in_reach(prediction: Prediction, scene: Scene) -> Tensor:
    """Which predicted points the true cloud can speak of, bool broadcast to `[S, H, W]`.

    All, where it was scanned. Where it is made of depth maps, pixels without depth are left out: sky and glass are not
    in it, however well they are predicted.
    """
    known = None if scene.points is not None else scene.world_points()
    if known is None:
        return torch.ones(1, dtype=torch.bool, device=prediction.points.device)
    rows, columns = (index.to(known[1].device) for index in prediction.pixel_grid(scene.height, scene.width))
    return known[1][:, rows][:, :, columns].to(prediction.points.device)


def _recorded(points: Tensor, scene: Scene) -> Tensor:
    """Points of a scene in the frame and unit that it was read in."""
    if scene.to_recorded is None:
        return points
    return points @ scene.to_recorded[:3, :3].T + scene.to_recorded[:3, 3]


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
