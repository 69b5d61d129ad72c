"""What a sweep's report says beside its figures: where they come from and how they were made."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from hess_plugin.block_choice import with_choice
from hess_plugin.profiles import Profile

from .cloud_picture import POINTS, Clouds
from .metrics import MetricSettings
from .protocol import ALIGNMENT_WORDS
from .shown import SHOWN
from .sweep_results import SweepResults

_UNIT = "the mean distance of true points to the first camera (of the other cameras, where no true point is known)"
_RECORDED = ("model", "weights", "data", "views", "seed", "resolution", "framing", "eps", "memory", "target")
_PLANNED = {
    "model": "model", "weights": "weights", "data": "data", "views": "views of a scene", "seed": "seed",
    "resolution": "resolution", "framing": "framing", "block_q": "patch queries in a block",
    "block_k": "patch keys in a block", "selector": "selector",
    "pool_q": "patch queries pooled together", "pool_k": "patch keys pooled together", "block_order": "block order",
    "tolerance": "tolerance of sparsity",
    "calibration_data": "scenes for pruning", "model_digest": "digest of the model", "profile": "digest of the traces",
}  # fmt: skip


_FIRST = ("model", "weights", "data", "scenes", "views of a scene", "date", "machine")


def facts(results: SweepResults) -> tuple[dict[str, str], dict[str, str]]:
    """What was measured, on what and when: what a reader wants first, and the rest."""
    plan, about = with_choice(results.folder.plan), results.folder.about
    found = {"scenes": str(results.scenes)}
    found |= {said: str(plan[key]) for key, said in _PLANNED.items() if plan.get(key) not in (None, "")}
    found.setdefault("views of a scene", "all")
    if results.profile is not None:
        found["profile"] = f"{len(results.profile.scenes)} scenes, camera weight {results.profile.camera_weight:g}"
        found["weights fingerprint"] = results.profile.fingerprint
    found |= {name.replace("hess_plugin", "hess-plugin"): str(value) for name, value in about.items()}
    found.pop("command", None)
    first = {name: found.pop(name) for name in _FIRST if name in found}
    return first, found


def warnings(results: SweepResults) -> list[str]:
    """What a reader must know before believing a figure."""
    found = []
    if results.missing:
        done = len(results.planned) - len(results.missing)
        rows = ", ".join(results.missing)
        found.append(
            f"This sweep is not finished: {done} of {len(results.planned)} rows are there; missing: {rows}. "
            "The same command goes on."
        )
    if results.folder.plan.get("weights") == "random":
        found.append("Random weights: no figure here means anything about the real model.")
    if results.profile is not None:
        measured = {m.scene for cell in results.cells for m in cell.measurements}
        shared = sorted(measured & set(results.profile.scenes))
        if shared:
            found.append(f"The profile was calibrated on {len(shared)} of the scenes measured here ({shared[0]}, ...).")
    return found


def definitions(results: SweepResults) -> dict[str, str]:
    """What each metric that was measured is."""
    headings: dict[str, list[str]] = {}
    for metric in results.known(tuple(SHOWN)):
        headings.setdefault(SHOWN[metric].meaning, []).append(SHOWN[metric].heading)
    return {", ".join(names): meaning for meaning, names in headings.items()}


def protocol(results: SweepResults) -> dict[str, str]:
    """How the figures were made, by topic."""
    plan, default = results.folder.plan, MetricSettings()
    asked = str(plan.get("alignment_asked", default.alignment))
    done = ", ".join(dict.fromkeys(s.alignment for s in results.summaries if s.alignment)) or "none"
    dtu = plan.get("dtu") is not None
    found = {
        "Units": (
            "Lengths are in millimetres." if dtu else f"Lengths are in units of {_UNIT}, which is 1 in every scene."
        )
        + " AUC is in points, 0 to 100; sparsity and F1 are shares, 0 to 1.",
        "Alignment": f"For all but AUC and ATE, asked for: {ALIGNMENT_WORDS.get(asked, asked)}. Done: {done}.",
    }
    if results.known(("chamfer",)):
        least = plan.get("min_confidence")
        sure = "the adapter's threshold" if least is None else f"{least:g}"
        found["Clouds"] = (
            f"F1 counts points within {plan.get('threshold', default.threshold):g} {'mm' if dtu else 'units'} of the "
            f"other cloud. Predicted points of confidence below {sure} do not count, but for the point error"
        ) + (
            ". Distances are taken by DTU's protocol: prediction thinned to 0.2 mm, observed volume, above the table, "
            "distances of 20 mm and more left out."
            if dtu
            else ", nor, where depth maps are the truth, those of pixels without depth. At most "
            f"{plan.get('max_points', default.max_points)} points of a cloud are drawn, with a fixed seed."
        )
    return found | {
        "Sparsity": (
            "Sparsity is measured, never assumed: the share of patch-block pairs that were dropped, averaged over "
            "heads and layers. In each row the setting of every arm is turned until its mean sparsity is within "
            f"{plan.get('tolerance', 0.005):g} of that of uniform; an arm that cannot get there is marked. Arms that "
            "prune heads get as near as whole heads can."
        ),
        "Errors": (
            "All arms see the same scenes. Figures are means over scenes ± the standard error of the mean. Differences "
            "are taken scene by scene, then averaged, which takes out how hard each scene is. A * marks a difference "
            "whose 95 % interval (Student's t, two-sided) does not hold 0; with many arms and metrics one in twenty "
            "would be marked by mere luck."
        ),
        "Time": "Seconds are the wall time of one forward, for orientation: arms were not timed side by side, which "
        "hess-patch bench does.",
    }


def clouds_caption(clouds: Clouds, threshold: float | None) -> str:
    """What the picture of clouds shows."""
    unit = "mm" if clouds.unit == "mm" else "mean distances of true points to the first camera"
    measured = {
        "pixels": "the true point of the same pixel; pixels without truth keep their colour and do not count",
        "nearest": "the nearest point of the true cloud",
    }.get(clouds.measure, clouds.measure)
    threshold = clouds.threshold if threshold is None else threshold
    return (
        f"Scene {clouds.scene}, row {clouds.row}: confident predicted points, at most {POINTS} of each arm, in muted "
        f"colours of the images, from a camera behind and above a true one. Coloured: farther than {threshold:g} "
        f"{unit} from {measured}. Aligned by: {', '.join(dict.fromkeys(clouds.alignment))}."
    )


def no_clouds(results: SweepResults) -> str:
    """Why there is no picture of clouds."""
    if not results.known(("chamfer", "point_error")):
        return "The scenes have true cameras only, neither depth nor points: there is no true cloud to compare with."
    if results.missing:
        return "Clouds are kept at the end of a sweep, and this one is not finished."
    return "This sweep kept no clouds."


def calibration_command(profile: Profile) -> str | None:
    """The command that makes the profile again, as far as the profile recorded it; None if it was made otherwise."""
    known = profile.metadata
    if any(not isinstance(known.get(name), str) for name in ("model", "weights", "data")):
        return None
    words = ["hess-patch", "calibrate", "--model", known["model"]]
    words += [] if known["weights"] == "shipped" else ["--weights", known["weights"]]
    for data in known["data"].split():
        words += ["--data", data]
    words += ["--scenes", str(len(profile.scenes) + len(known.get("skipped") or {}))]
    for name in ("views", "seed", "resolution", "framing", "eps", "memory"):
        words += [] if known.get(name) is None else [f"--{name}", str(known[name])]
    if "autocast" in known:
        words += ["--autocast", known["autocast"] or "none"]
    if "target" in known:
        words += ["--target", str(known["target"])]
    if known.get("camera_weight_source") == "given":
        words += ["--camera-weight", f"{profile.camera_weight:g}"]
    words += ["--preset", str(known["preset"])] if "preset" in known else []
    return shlex.join([*words, *_harm_words(known), "-o", "profile.hess"])


def _harm_words(known: Mapping[str, Any]) -> list[str]:
    """Options that measure harm as the profile has it, or that measure none."""
    harm = known.get("harm")
    if not isinstance(harm, Mapping):
        return ["--no-harm"] if "preset" in known else []
    given = ("block_q", "block_k", "pool_q", "pool_k", "block_order", "selector")
    values = [(f"--{name.replace('_', '-')}", str(harm[name])) for name in given if harm.get(name) is not None]
    return ["--harm", *(word for pair in values for word in pair)]


def calibration_facts(profile: Profile) -> dict[str, str]:
    """What the profile records of how it was made."""
    shown = {"adapter": profile.adapter, "scenes": str(len(profile.scenes))}
    for name in (*_RECORDED, "autocast", "dtype", "device", "created", "camera_weight_source", "versions"):
        value: Any = profile.metadata.get(name)
        if value not in (None, "", {}, []):
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
            shown[name.replace("_", " ")] = text
    return shown
