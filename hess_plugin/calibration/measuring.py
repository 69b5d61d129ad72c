"""Measuring one scene: a forward pass, its errors, and a backward pass for each of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hess_plugin.adapting import Adapter
from hess_plugin.exceptions import CalibrationError, HessError
from hess_plugin.predictions import Prediction
from hess_plugin.profiles import ERROR_NAMES
from hess_plugin.scenes.image_set import ImageSet, require_truth
from hess_plugin.scenes.scene import Scene
from hess_plugin.sites import PROJECTIONS, Site

from .errors import EPS, MAX_CLOUD, Errors
from .fisher import head_traces, only_sites_require_grad
from .harm import HarmSettings
from .harm_meter import HarmMeter, harm_meter
from .lean import lean
from .patch_rows import Taps, taps
from .sampling import subsample
from .self_target import image_seed, self_errors

MEMORY = ("lean", "plain")
TARGETS = ("auto", "truth", "self")


@dataclass(frozen=True)
class Protocol:
    """How scenes are measured; part of what the traces depend on.

    Attributes:
        eps: inlier distance of the point error, in units of the normalised scene.
        autocast: type of the forward, or None for the model's own.
        memory: ``lean`` recomputes blocks and runs heads frame by frame, ``plain`` keeps the whole graph; the
            traces agree to rounding.
        target: what errors are measured against: ``truth`` is the scene's own, ``self`` the model's own prediction
            (see `self_target`; eps plays no part), ``auto`` the truth where a scene has one, else the prediction.
        harm: how harm curves are measured as well; None for none.

    Raises:
        CalibrationError: a value out of range.
    """

    eps: float = EPS
    autocast: torch.dtype | None = None
    memory: str = "lean"
    target: str = "auto"
    harm: HarmSettings | None = None

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise CalibrationError(f"eps is {self.eps}, wanted a distance above 0 in units of the normalised scene.")
        if self.memory not in MEMORY:
            raise CalibrationError(f"memory is {self.memory!r}, wanted one of {', '.join(MEMORY)}.")
        if self.target not in TARGETS:
            raise CalibrationError(f"target is {self.target!r}, wanted one of {', '.join(TARGETS)}.")

    def measures_itself(self, scene: Scene | ImageSet) -> bool:
        """Whether a scene is measured against the model's own prediction."""
        return self.target == "self" or (self.target == "auto" and isinstance(scene, ImageSet))


@dataclass(frozen=True, eq=False)
class Measured:
    """What one scene gave.

    Attributes:
        traces: by ``"<error>.<projection>"`` and, through patch tokens alone, ``"<error>.<projection>.patch"``:
            float64 ``[L, H]``, NaN for an error that the scene does not have. Beside them, if harm was asked for,
            ``"<error>.output"``, see `HarmMeter.output_traces`, and the curves ``harm.camera``, ``harm.points`` and
            ``harm.shares``, see `HarmMeter.measure`.
        facts: how it was measured, JSON types only.
    """

    traces: dict[str, Tensor]
    facts: dict[str, Any]


class Measurer:
    """A model made ready to be measured; made by `measuring`."""

    def __init__(
        self,
        adapter: Adapter,
        model: nn.Module,
        sites: Sequence[Site],
        protocol: Protocol,
        found: Taps,
        meter: HarmMeter | None = None,
    ) -> None:
        self._adapter, self._model, self._sites, self._protocol, self._taps = adapter, model, sites, protocol, found
        self._meter = meter
        self._weights = list({id(w): w for site in sites for w in (site.weight(p) for p in PROJECTIONS)}.values())

    def measure(self, scene: Scene | ImageSet) -> Measured:
        """Measure one scene.

        Raises:
            CalibrationError: the scene cannot be aligned, has no usable error, or a gradient is not finite.
            SceneError: the scene is malformed, or has no ground truth and the target is one.
            HessError: it does not fit into memory.
        """
        try:
            return self._measure(scene)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            # Not one of the errors for which a scene is skipped: all others would be too large as well.
            raise HessError(
                f"Scene {scene.name} ({scene.views} views of {scene.height} x {scene.width}) does not fit into memory; "
                f"use fewer views, a smaller resolution{self._advice()}."
            ) from error

    def _advice(self) -> str:
        lean = "" if self._protocol.memory == "lean" else ', memory="lean"'
        return lean + ("" if self._protocol.autocast is not None else ", or bfloat16 autocast")

    def _measure(self, scene: Scene | ImageSet) -> Measured:
        device = self._weights[0].device
        traces, facts, errors = self._backward(scene, device)
        if self._meter is not None:
            # By now the graph is gone: the second forward needs no room beside it.
            images = scene.images.to(device)
            curves, facts["harm"] = self._harm(self._meter, images, errors)
            traces |= curves
        return Measured(traces, facts)

    def _backward(
        self, scene: Scene | ImageSet, device: torch.device
    ) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
        """Traces of one scene, how they were measured, and which errors it has."""
        with self._memory(scene.views), _no_autocast(device), torch.enable_grad():
            with self._autocast(device):
                errors, facts = self._errors(scene, device)
            present = [(kind, error) for kind in ERROR_NAMES if (error := getattr(errors, kind)) is not None]
            if not present:
                raise CalibrationError(
                    f"scene {scene.name} has neither a camera nor a point error; give it views or depth."
                )
            traces = self._traces(present)
        return traces, {**facts, **_facts(errors, present, facts["target"])}, [kind for kind, _ in present]

    def _harm(self, meter: HarmMeter, images: Tensor, errors: Sequence[str]) -> tuple[dict[str, Tensor], str]:
        with self._memory(len(images)), _no_autocast(images.device):
            return meter.measure(errors, lambda: self.predict(images))

    def predict(self, images: Tensor) -> Prediction:
        """Run the forward of a measurement on images ``[S, 3, H, W]``."""
        with self._autocast(images.device):
            return self._adapter.predict(self._model, images)

    def rehearse(self, images: Tensor) -> None:
        """Go through a measurement without a scene, its errors replaced by sums: for counting what it takes."""
        with self._memory(len(images)), _no_autocast(images.device), torch.enable_grad():
            prediction = self.predict(images)
            self._traces([("camera", prediction.centres.square().sum()), ("points", prediction.points.square().sum())])
            del prediction
        if self._meter is not None:
            self._harm(self._meter, images, ERROR_NAMES)

    def _errors(self, scene: Scene | ImageSet, device: torch.device) -> tuple[Errors, dict[str, Any]]:
        """The errors of one scene, and what is known about it before they are."""
        facts: dict[str, Any] = {"views": scene.views, "size": [scene.height, scene.width]}
        if self._protocol.measures_itself(scene):
            prediction = self._adapter.predict(self._model, scene.images.to(device))
            errors = self_errors(prediction, name=scene.name, seed=image_seed(scene.images))
            return errors, {**facts, "target": "self"}
        require_truth(scene, "calibrating against ground truth")
        assert isinstance(scene, Scene)
        scene = scene.normalised()
        if scene.points is not None:  # a laser scan of tens of millions of points must not lie on the GPU whole
            scene = replace(scene, points=subsample(scene.points, MAX_CLOUD, 0))
        scene = scene.to(device)
        errors = self._adapter.compute_errors(self._model, scene, self._protocol.eps)
        return errors, {**facts, "scale": scene.scale, "target": "truth"}

    def _traces(self, present: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
        twins = self._taps.twins if self._taps.complete() else None
        suffixes = ("",) if twins is None else ("", ".patch")
        missing = torch.full((len(self._sites), self._sites[0].num_heads), torch.nan, dtype=torch.float64)
        names = [f"{p}{s}" for p in PROJECTIONS for s in suffixes] + ([] if self._meter is None else ["output"])
        # A copy each: safetensors refuses to write one tensor under several names.
        traces = {f"{kind}.{name}": missing.clone() for kind in ERROR_NAMES for name in names}
        for index, (kind, error) in enumerate(present):
            last = index == len(present) - 1
            collecting = contextlib.nullcontext() if self._meter is None else self._meter.collecting(kind)
            with collecting:
                found = head_traces(error, self._sites, self._weights, retain_graph=not last, twins=twins)
            if self._meter is not None:
                found["output"] = self._meter.output_traces(kind)
            traces |= {f"{kind}.{name}": trace for name, trace in found.items()}
        return traces

    def _memory(self, frames: int) -> contextlib.AbstractContextManager[None]:
        if self._protocol.memory == "plain":
            return contextlib.nullcontext()
        return lean(self._model, self._adapter.family(self._model), self._sites, frames)

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        if self._protocol.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self._protocol.autocast)


@contextlib.contextmanager
def measuring(adapter: Adapter, model: nn.Module, sites: Sequence[Site], protocol: Protocol) -> Iterator[Measurer]:
    """Make a model ready to be measured, and give it back as it was.

    Args:
        adapter: of the model.
        model: any mode; gradients are asked of the sites' projections alone.
        sites: the L sites.
        protocol: how to measure.
    """
    # A caller under inference_mode gets its gradients all the same.
    with (
        torch.inference_mode(False),
        only_sites_require_grad(model, sites),
        taps(adapter, model, sites) as found,
        harm_meter(adapter, model, sites, protocol.harm) as meter,
    ):
        yield Measurer(adapter, model, sites, protocol, found, meter)


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Keep a caller's autocast out: what is measured depends on what is recorded, nothing else."""
    return torch.autocast(device.type, enabled=False)


def _facts(errors: Errors, present: Sequence[tuple[str, Tensor]], target: str) -> dict[str, Any]:
    # Against itself a prediction has the errors that were drawn: they say nothing.
    facts: dict[str, Any] = {} if target == "self" else {f"{kind}_error": error.item() for kind, error in present}
    if errors.alignment is not None:
        facts["alignment"] = errors.alignment.method
    if errors.points is not None:
        facts["inliers"] = errors.inliers
    return facts
