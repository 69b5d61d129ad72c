"""Options that choose what an evaluation measures; the same for every command that evaluates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import COUNT, FOLDER, options

if TYPE_CHECKING:
    from hess_plugin.evaluation.metrics import MetricSettings

# The choices are spelt out here because importing the evaluation would import torch for every --help.
metric_options = options(
    click.option(
        "--alignment",
        type=click.Choice(["pixels", "icp", "cameras"]),
        default="pixels",
        show_default=True,
        help="Similarity before anything but AUC and ATE: Umeyama on the pixels' points, trimmed once; the same and "
        "ICP; or on camera centres.",
    ),
    click.option(
        "--threshold",
        type=click.FloatRange(0, min_open=True),
        help="Distance within which a point counts for F1: 0.05 mean distances of true points to the first camera by "
        "default; with --dtu in mm, 1 by default.",
    ),
    click.option(
        "--min-confidence", type=float, help="Points less confident are left out of clouds; the adapter's by default."
    ),
    click.option(
        "--max-points",
        type=COUNT,
        default=200_000,
        show_default=True,
        help="At most so many points of each cloud; distances grow as clouds thin out, so compare figures of one cap.",
    ),
    click.option(
        "--dtu",
        type=FOLDER,
        metavar="FOLDER",
        help="Measure clouds by DTU's protocol, in mm; the folder holds Points/stl/ and ObsMask/.",
    ),
)


def metrics_of(options: dict[str, Any]) -> MetricSettings:
    """Make the settings that the options name."""
    from hess_plugin.evaluation.dtu import DtuProtocol
    from hess_plugin.evaluation.metrics import MetricSettings

    folder: Path | None = options["dtu"]
    threshold = _threshold(options)
    return MetricSettings(
        threshold=0.05 if folder is not None else threshold,
        alignment=options["alignment"],
        min_confidence=options["min_confidence"],
        max_points=options["max_points"],
        dtu=None if folder is None else DtuProtocol(folder, threshold),
    )


def metric_facts(options: dict[str, Any]) -> dict[str, Any]:
    """What to record of them, beside a result."""
    facts = {name: options[name] for name in ("alignment", "min_confidence", "max_points")}
    return {**facts, "threshold": _threshold(options), "dtu": None if options["dtu"] is None else str(options["dtu"])}


def _threshold(options: dict[str, Any]) -> float:
    given: float | None = options["threshold"]
    if given is not None:
        return given
    return 0.05 if options["dtu"] is None else 1.0
