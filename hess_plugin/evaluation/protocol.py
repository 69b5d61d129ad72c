"""What the figures of an evaluation are, in words that stand beside them."""

from __future__ import annotations

from .metrics import MetricSettings

_UNIT = "the mean distance of true points, or without any of the other cameras, to the first camera"
ALIGNMENT_WORDS = {
    "pixels": "Umeyama on the points of the same pixels, the worst fifth dropped and fitted again (camera centres "
    "where a scene has no depth)",
    "icp": "Umeyama on the points of the same pixels, the worst fifth dropped and fitted again, then ICP",
    "cameras": "Umeyama on camera centres",
}


def describe_cameras(settings: MetricSettings) -> str:
    """What is measured of cameras."""
    unit = "mm" if settings.dtu is not None else f"units of {_UNIT}"
    return (
        "AUC in points (0 to 100), over all pairs of views, of the larger of rotation and translation angle, as in "
        f"VGGT's evaluation; ATE: RMSE of camera centres after Umeyama on them, in {unit}; mean ± standard error over "
        "scenes."
    )


def describe_clouds(settings: MetricSettings) -> str:
    """What is measured of points."""
    least = "the adapter's threshold" if settings.min_confidence is None else f"{settings.min_confidence:g}"
    aligned = f"All after {ALIGNMENT_WORDS[settings.alignment]}."
    unit = "mm" if settings.dtu is not None else f"units of {_UNIT}"
    paired = f"Point error: mean distance of points of the same pixels, in {unit}."
    counted = f"{aligned} Points of confidence below {least} do not count"
    if settings.dtu is not None:
        mark = settings.dtu.threshold
        return (
            f"{paired} Accuracy, completeness and Chamfer (their mean) by DTU's protocol in mm: prediction thinned to "
            "0.2 mm, observed volume, above the table, distances of 20 mm and more left out; F1 at "
            f"{f'{mark:g} mm' if mark else f'{settings.threshold:g} scene units'}. {counted}."
        )
    return (
        f"{paired} Accuracy, completeness, Chamfer (their mean): mean distance to the nearest point of the other "
        f"cloud, same unit; F1 at {settings.threshold:g}. {counted}, but for the point error, nor where depth maps are "
        f"the truth and have none; at most {settings.max_points} points of a cloud."
    )
