"""Comparing ways to divide the same budget: every arm on the same scenes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields
from typing import Any

import pluggy
import torch
from torch import nn

from hess_plugin.adapting import Adapter
from hess_plugin.exceptions import CalibrationError, PatchError, SceneError
from hess_plugin.harm_curves import model_curves
from hess_plugin.patching import patch
from hess_plugin.plugins import resolve_adapter
from hess_plugin.predictions import Prediction
from hess_plugin.presets import find_preset, preset_name
from hess_plugin.profiles import Profile, weights_fingerprint
from hess_plugin.scenes.image_set import require_truth
from hess_plugin.scenes.scene import Scene
from hess_plugin.scoring import Scoring, head_scores
from hess_plugin.settings import Settings, make_settings

from .arms import Arm, scene_seed
from .metrics import MetricSettings, PredictionScores, measure_prediction, scores_without_alignment
from .records import Measurement
from .timing import finish

_log = logging.getLogger(__name__)
SCORE_OPTIONS = tuple(field.name for field in fields(Scoring))
_SETTINGS = {"preset", *Settings.__dataclass_fields__}
Pruner = Callable[[nn.Module, str, float], AbstractContextManager[Any]]
"""Called as ``pruner(model, method, sparsity)``; gives a handle with ``report()`` while whole heads are pruned."""


class Runner:
    """A model ready to be measured with any arm.

    Args:
        model: a model that an adapter claims, unpatched.
        profile: needed by arms that divide budgets by score.
        metrics: what is measured, and how.
        pruner: needed by arms that prune heads.
        adapter: take this adapter instead of asking which one claims the model.
        manager: plugin manager; a fresh one by default.
        options: further arguments of `hess_plugin.patch` (block sizes, backend, how the score is made, ...).

    Raises:
        ProfileMismatch: the profile is not the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        profile: Profile | None = None,
        metrics: MetricSettings | None = None,
        pruner: Pruner | None = None,
        adapter: str | None = None,
        manager: pluggy.PluginManager | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.profile, self.metrics = model, profile, metrics or MetricSettings()
        self._pruner, self._options = pruner, dict(options or {})
        self.scoring = Scoring(**{name: self._options.pop(name) for name in SCORE_OPTIONS if name in self._options})
        self._strict = self._options.pop("strict", True)
        # Arms without a profile choose their blocks as the others do.
        if self._options.get("preset") is None:
            find_preset(None, profile)
            self._options["preset"] = preset_name(profile)
        self.adapter: Adapter = resolve_adapter(model, adapter, manager)
        self._warm = False

    def check(self, arms: Sequence[Arm]) -> None:
        """Refuse arms that could not run, before the first forward of the others.

        Raises:
            PatchError: an amount, allocation or option out of range, a missing profile or pruner, or an arm given
                twice.
            ProfileError: a score that the profile cannot make, or a profile of another model.
        """
        if len({(arm.name, arm.label) for arm in arms}) < len(arms):
            raise PatchError("two arms have the same name and row; give every arm once.")
        for arm in arms:
            if arm.pruning is not None and self._pruner is None:
                raise PatchError(f"arm {arm.name!r} prunes heads, which needs gate gradients, and none were given.")
            if not arm.dense and arm.pruning is None:
                self._check_settings(arm)
            if arm.guided:
                self._check_score(arm)
        if self.profile is None and self.scoring != Scoring():
            raise PatchError(
                f"a score was chosen ({self.scoring}), which is made of a profile, and none was given; pass profile=..."
            )
        if any(arm.guided for arm in arms):
            assert self.profile is not None
            sites = self.adapter.sites(self.model)
            self.profile.check(sites, weights_fingerprint(sites) if self._strict else None)

    def _check_settings(self, arm: Arm) -> None:
        """Refuse what a patch would refuse only after the arms before it were measured."""
        options = {name: value for name, value in self._options_of(arm).items() if name in _SETTINGS}
        make_settings(profile=self.profile, **asdict(arm.row), allocation=arm.allocation, **options)

    def _options_of(self, arm: Arm) -> dict[str, Any]:
        return self._options | ({} if arm.preset is None else {"preset": arm.preset})

    def _check_score(self, arm: Arm) -> None:
        if self.profile is None:
            raise PatchError(f"arm {arm.name!r} divides budgets by a profile and none was given; pass profile=...")
        scoring = arm.scoring or self.scoring
        head_scores(self.profile, scoring)
        if arm.allocation == "harm":
            model_curves(self.profile, scoring.camera_weight)

    def prepared(self, scene: Scene) -> Scene:
        """The scene as it is measured: normalised, on the model's device.

        Raises:
            SceneError: it has no truth, or a single view.
        """
        check_scene(scene)
        scene = scene.normalised().to(next(self.model.parameters()).device)
        if not self._warm:
            with torch.inference_mode():
                self._timed(scene)
            self._warm = True
        return scene

    def measure(self, scene: Scene, arm: Arm) -> Measurement:
        """Run one arm on one prepared scene and score what it predicts.

        A prediction that cannot be aligned with the scene is a result as well, and no reason to lose the others: its
        measurement has NaN and `Measurement.failure`.
        """
        prediction, sparsity, layers, seconds = self.predict(scene, arm)
        scores = asdict(self._scores(prediction, scene, arm))
        scores.pop("unit", None)
        return Measurement(
            scene=scene.name,
            row=arm.label,
            arm=arm.name,
            sparsity=sparsity,
            seconds=seconds,
            knob=arm.knob,
            layers=layers,
            **scores,
        )

    def _scores(self, prediction: Prediction, scene: Scene, arm: Arm) -> PredictionScores:
        try:
            return measure_prediction(prediction, scene, self.metrics)
        except CalibrationError as error:
            scores = scores_without_alignment(prediction, scene, str(error), self.metrics)
            _log.warning("%s at %s is not measured on %s: %s", arm.name, arm.label, scene.name, error)
            return scores

    def predict(self, scene: Scene, arm: Arm) -> tuple[Prediction, float, tuple[float, ...], float]:
        """Run one arm on one prepared scene: prediction, measured sparsity, that of every site, seconds."""
        with torch.inference_mode(), self._running(scene, arm) as handle:
            prediction, seconds = self._timed(scene)
        if handle is None:
            return prediction, 0.0, (), seconds
        report = handle.report()
        return prediction, report.sparsity or 0.0, tuple(site.sparsity or 0.0 for site in report.sites), seconds

    def _running(self, scene: Scene, arm: Arm) -> AbstractContextManager[Any]:
        if arm.dense:
            return nullcontext()
        if arm.pruning is not None:
            assert self._pruner is not None and arm.sparsity is not None
            return self._pruner(self.model, arm.pruning, arm.sparsity)
        options = self._options_of(arm)
        if arm.guided:  # settings of a profile's scores mean nothing to the others
            options |= {"profile": self.profile, "strict": self._strict, **asdict(arm.scoring or self.scoring)}
        if arm.allocation == "random":
            options.setdefault("seed", scene_seed(scene.name))
        return patch(
            self.model,
            sparsity=arm.sparsity,
            sparse_ratio=arm.sparse_ratio,
            cdf_threshold=arm.cdf_threshold,
            allocation=arm.allocation,
            adapter=self.adapter.name,
            manager=self.adapter.manager,
            # An evaluation measures what was asked for, whatever was found out before, and equal totals: heads that a
            # GPU would let keep more would favour uneven budgets.
            verdict="ignore",
            dense_below=0,
            dense_from=1.0,
            **options,
        )

    def _timed(self, scene: Scene) -> tuple[Prediction, float]:
        """One forward and its wall time; a GPU has finished before each clock is read."""
        finish(scene.images.device)
        started = time.perf_counter()
        prediction = self.adapter.predict(self.model, scene.images)
        finish(scene.images.device)
        return prediction, time.perf_counter() - started


def check_scene(scene: Scene) -> None:
    """Refuse a scene that cannot be measured.

    Raises:
        SceneError: it has no truth, or a single view.
    """
    require_truth(scene, "evaluating")
    if scene.views < 2:
        raise SceneError(f"scene {scene.name} has 1 view; cameras are compared in pairs, so give 2 views or more.")


def compare(
    model: nn.Module,
    scenes: Iterable[Scene],
    arms: Sequence[Arm],
    *,
    profile: Profile | None = None,
    metrics: MetricSettings | None = None,
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
        scenes: scenes with true cameras, at a size the model takes.
        arms: what to compare; names and rows together must be distinct.
        profile: needed by arms that divide budgets by score.
        metrics: what is measured, and how.
        progress: called as ``progress(scene, arm)`` before each run.
        adapter: take this adapter instead of asking which one claims the model.
        manager: plugin manager; a fresh one by default.
        options: further arguments of `hess_plugin.patch` (block sizes, backend, how the score is made, ...).

    Returns:
        One measurement for each scene and arm, scenes outermost.

    Raises:
        PatchError: an arm cannot run.
        ProfileError: the profile is of another model or has no such score.
        SceneError: a scene without truth, or of a single view.
        CalibrationError: a prediction is not of its scene's views. One that cannot be aligned is a measurement of NaN.
    """
    runner = Runner(model, profile=profile, metrics=metrics, adapter=adapter, manager=manager, options=options)
    runner.check(arms)
    rows: list[Measurement] = []
    for scene in scenes:
        scene = runner.prepared(scene)
        for arm in arms:
            if progress is not None:
                progress(scene.name, arm.name if arm.dense else f"{arm.name} {arm.label}")
            rows.append(runner.measure(scene, arm))
    return rows
