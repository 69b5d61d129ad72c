"""Comparing ways to divide the same budget: every arm on the same scenes, paired, with standard errors."""

from __future__ import annotations

import csv
import io
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pluggy
import torch
from torch import nn

from hess_plugin.adapting import Adapter
from hess_plugin.calibration.alignment import align
from hess_plugin.exceptions import PatchError, SceneError
from hess_plugin.files import write_bytes
from hess_plugin.patching import patch
from hess_plugin.plugins import resolve_adapter
from hess_plugin.predictions import Prediction
from hess_plugin.profiles import Profile, weights_fingerprint
from hess_plugin.scenes.image_set import require_truth
from hess_plugin.scenes.scene import Scene
from hess_plugin.scoring import Scoring, head_scores
from hess_plugin.settings import Settings

from .clouds import pointmap_error
from .pose import absolute_trajectory_error, pose_auc

_WITHOUT_PROFILE = ("uniform", "equal")
_SCORE_OPTIONS = tuple(field.name for field in fields(Scoring))
_PROFILE_OPTIONS = (*_SCORE_OPTIONS, "strict")
METRICS = ("auc30", "auc15", "auc5", "auc3", "ate", "point_error", "sparsity", "seconds")


@dataclass(frozen=True)
class Arm:
    """One way to run the model.

    Attributes:
        name: shown in tables.
        sparsity: target sparsity; 0 is the unpatched model.
        allocation: how budgets are divided among heads (see `hess_plugin.patch`).
    """

    name: str
    sparsity: float = 0.0
    allocation: str = "uniform"


@dataclass(frozen=True)
class Measurement:
    """One arm on one scene.

    Attributes:
        scene: scene id.
        arm: name of the arm.
        target: sparsity asked for.
        sparsity: sparsity measured.
        auc30: area under the accuracy curve of relative poses up to 30 degrees, 0 to 1 (larger is better);
            `auc15`, `auc5`, `auc3` likewise.
        ate: camera-centre RMSE after similarity alignment, in units of the normalised scene.
        point_error: mean distance of predicted to true points at the same pixels after alignment, same unit; NaN for
            a scene without depth.
        seconds: wall time of the forward.
    """

    scene: str
    arm: str
    target: float
    sparsity: float
    auc30: float
    auc15: float
    auc5: float
    auc3: float
    ate: float
    point_error: float
    seconds: float


@dataclass(frozen=True)
class Statistic:
    """A mean over scenes and its standard error (NaN for a single scene), by metric."""

    mean: dict[str, float]
    error: dict[str, float]


@dataclass(frozen=True)
class Summary:
    """One arm over all scenes.

    Attributes:
        arm: name of the arm.
        target: sparsity asked for.
        scenes: number of scenes.
        value: every metric.
        against: every metric minus that of a baseline, scene by scene: ``dense``, and ``uniform`` at the same
            target. Pairing takes out how hard each scene is, which is most of the error of `value`.
    """

    arm: str
    target: float
    scenes: int
    value: Statistic
    against: dict[str, Statistic]


def compare(
    model: nn.Module,
    scenes: Iterable[Scene],
    arms: Sequence[Arm],
    *,
    profile: Profile | None = None,
    progress: Callable[[str, str], None] | None = None,
    adapter: str | None = None,
    manager: pluggy.PluginManager | None = None,
    **options: Any,
) -> list[Measurement]:
    """Run every arm on every scene.

    Each scene goes through all arms before the next is read, so that timings of one scene lie side by side;
    the first scene is run once more beforehand to warm up.

    Args:
        model: a model that an adapter claims, unpatched.
        scenes: scenes with true cameras and depth, at a size the model takes.
        arms: what to compare; names and targets together must be distinct.
        profile: needed by arms that divide budgets by score.
        progress: called as ``progress(scene, arm)`` before each run.
        adapter: take this adapter instead of asking which one claims the model.
        manager: plugin manager; a fresh one by default.
        options: further arguments of `hess_plugin.patch` (block sizes, backend, how the score is made, ...).

    Returns:
        One measurement for each scene and arm, scenes outermost.
    """
    _check_arms(arms, profile, Scoring(**{name: options[name] for name in _SCORE_OPTIONS if name in options}))
    chosen = resolve_adapter(model, adapter, manager)
    if profile is not None and any(arm.allocation not in _WITHOUT_PROFILE for arm in arms):
        sites = chosen.sites(model)  # told now, not after the first scene's other arms
        profile.check(sites, weights_fingerprint(sites) if options.get("strict", True) else None)
    device = next(model.parameters()).device
    rows: list[Measurement] = []
    for index, scene in enumerate(scenes):
        require_truth(scene, "evaluating")
        if scene.views < 2:
            raise SceneError(f"scene {scene.name} has 1 view; cameras are compared in pairs, so give 2 views or more.")
        scene = scene.normalised().to(device)
        if index == 0:
            _run(chosen, model, scene, Arm("warm-up"), None, {})
        for arm in arms:
            if progress is not None:
                progress(scene.name, f"{arm.name} {arm.sparsity:g}" if arm.sparsity else arm.name)
            guided = arm.allocation not in _WITHOUT_PROFILE
            prediction, sparsity, seconds = _run(chosen, model, scene, arm, profile if guided else None, options)
            rows.append(_measure(scene, arm, prediction, sparsity, seconds))
    return rows


def _check_arms(arms: Sequence[Arm], profile: Profile | None, scoring: Scoring) -> None:
    """Refuse an arm that could not run, before the first forward of the others."""
    if len({(arm.name, arm.sparsity) for arm in arms}) < len(arms):
        raise PatchError("two arms have the same name and sparsity; give every arm once.")
    for arm in arms:
        if arm.sparsity != 0.0:
            Settings(sparsity=arm.sparsity, sparse_ratio=None, cdf_threshold=None, allocation=arm.allocation)
        if profile is None and arm.allocation not in _WITHOUT_PROFILE:
            raise PatchError(f"arm {arm.name!r} divides budgets by a profile and none was given; pass profile=...")
    if profile is None and scoring != Scoring():
        raise PatchError(
            f"a score was chosen ({scoring}), which is made of a profile, and none was given; pass profile=..."
        )
    if profile is not None and any(arm.allocation not in _WITHOUT_PROFILE for arm in arms):
        head_scores(profile, scoring)


def _run(
    adapter: Adapter, model: nn.Module, scene: Scene, arm: Arm, profile: Profile | None, options: dict[str, Any]
) -> tuple[Prediction, float, float]:
    """Run one arm on one scene: prediction, measured sparsity, seconds."""
    if profile is None:  # settings of a profile's scores mean nothing to this arm
        options = {name: value for name, value in options.items() if name not in _PROFILE_OPTIONS}
    with torch.inference_mode():
        if arm.sparsity == 0.0:
            prediction, seconds = _timed(adapter, model, scene)
            return prediction, 0.0, seconds
        with patch(
            model,
            profile=profile,
            sparsity=arm.sparsity,
            allocation=arm.allocation,
            adapter=adapter.name,
            manager=adapter.manager,
            **options,
        ) as handle:
            prediction, seconds = _timed(adapter, model, scene)
        return prediction, handle.report().sparsity or 0.0, seconds


def _timed(adapter: Adapter, model: nn.Module, scene: Scene) -> tuple[Prediction, float]:
    """One forward and its wall time; a GPU has finished before each clock is read."""
    _finish(scene.images.device)
    started = time.perf_counter()
    prediction = adapter.predict(model, scene.images)
    _finish(scene.images.device)
    return prediction, time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measure(scene: Scene, arm: Arm, prediction: Prediction, sparsity: float, seconds: float) -> Measurement:
    areas = {f"auc{threshold}": area for threshold, area in pose_auc(prediction.c2w, scene.c2w).items()}
    point_error = math.nan
    if scene.depth is not None:
        point_error = pointmap_error(prediction, scene, align(prediction, scene, icp=False).similarity)
    return Measurement(
        scene=scene.name,
        arm=arm.name,
        target=arm.sparsity,
        sparsity=sparsity,
        ate=float(absolute_trajectory_error(prediction.c2w, scene.c2w)),
        point_error=point_error,
        seconds=seconds,
        **areas,
    )


def summarise(rows: Sequence[Measurement]) -> list[Summary]:
    """Average every arm over its scenes and compare it, scene by scene, with dense and with uniform."""
    groups: dict[tuple[str, float], dict[str, Measurement]] = {}
    for row in rows:
        groups.setdefault((row.arm, row.target), {})[row.scene] = row
    summaries = []
    for (arm, target), by_scene in groups.items():
        against = {}
        for name, key in (("dense", ("dense", 0.0)), ("uniform", ("uniform", target))):
            if key in groups and key != (arm, target):
                against[name] = _differences(by_scene, groups[key])
        value = _statistic([[getattr(row, m) for row in by_scene.values()] for m in METRICS])
        summaries.append(Summary(arm, target, len(by_scene), value, against))
    return summaries


def _differences(by_scene: dict[str, Measurement], baseline: dict[str, Measurement]) -> Statistic:
    pairs = [(row, baseline[scene]) for scene, row in by_scene.items() if scene in baseline]
    return _statistic([[getattr(row, m) - getattr(base, m) for row, base in pairs] for m in METRICS])


def _statistic(columns: list[list[float]]) -> Statistic:
    """Mean and standard error of each metric's column, over the scenes that have the metric."""
    columns = [[value for value in column if not math.isnan(value)] for column in columns]
    mean = {m: statistics.fmean(c) if c else math.nan for m, c in zip(METRICS, columns, strict=True)}
    spread = [statistics.stdev(c) / math.sqrt(len(c)) if len(c) > 1 else math.nan for c in columns]
    return Statistic(mean, dict(zip(METRICS, spread, strict=True)))


def write_csv(path: str | Path, rows: Sequence[Measurement], provenance: dict[str, Any]) -> None:
    """Write one line for each measurement, every line carrying the provenance columns as well."""
    buffer = io.StringIO()
    names = [field.name for field in fields(Measurement)]
    writer = csv.DictWriter(buffer, [*names, *provenance], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**asdict(row), **provenance})
    write_bytes(path, buffer.getvalue().encode())
