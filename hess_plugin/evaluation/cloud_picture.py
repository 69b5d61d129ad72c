"""Predicted clouds of one scene side by side, with the points that are off coloured (the picture of HeSS, fig. 5)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from hess_plugin.exceptions import SceneError
from hess_plugin.files import write_bytes
from hess_plugin.predictions import Prediction
from hess_plugin.scenes.scene import Scene

from .arms import Arm
from .clouds import nearest_distances
from .metrics import MetricSettings, align_with_truth

if TYPE_CHECKING:
    from .comparison import Runner

POINTS = 60_000
MILLIMETRES = 5.0  # HeSS, fig. 5
_METADATA_KEY = "hess_clouds"
_PARTS = {"points": (torch.float32, 3), "colours": (torch.uint8, 3), "errors": (torch.float32, None)}


@dataclass(frozen=True, eq=False)
class Clouds:
    """What several arms predicted for one scene, in the frame of the scene.

    Attributes:
        tensors: for the i-th arm ``"i.points"`` ``[n, 3]`` float32 in units of the normalised scene, ``"i.colours"``
            ``[n, 3]`` uint8 of the image, ``"i.errors"`` ``[n]`` float32 in `unit`, NaN where the truth of a pixel is
            not known; and the true cameras, ``"c2w"`` ``[S, 4, 4]`` float32.
        scene: its name.
        arms: their names.
        row: the row of the arms that drop blocks.
        threshold: distance above which a point is coloured, in `unit`.
        unit: of errors: ``scene`` (mean distance of true points to the first camera is 1) or ``mm``.
        measure: ``pixels``, distance to the true point of the same pixel, or ``nearest``, to the true cloud.
        alignment: how each arm was aligned.
    """

    tensors: Mapping[str, Tensor]
    scene: str
    arms: tuple[str, ...]
    row: str
    threshold: float
    unit: str
    measure: str
    alignment: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.arms or len(self.alignment) != len(self.arms):
            raise SceneError(f"clouds of {len(self.arms)} arms with {len(self.alignment)} alignments were given.")
        for index in range(len(self.arms)):
            count = len(self.tensors.get(f"{index}.points", ()))
            for part, (dtype, width) in _PARTS.items():
                shape = (count,) if width is None else (count, width)
                _check_tensor(self.tensors, f"{index}.{part}", shape, dtype)
        views = len(self.tensors.get("c2w", ()))
        _check_tensor(self.tensors, "c2w", (max(views, 1), 4, 4), torch.float32)

    def part(self, index: int, name: str) -> Tensor:
        """``points``, ``colours`` or ``errors`` of one arm."""
        return self.tensors[f"{index}.{name}"]

    def share_off(self, index: int, threshold: float | None = None) -> float:
        """Share of the points of one arm that are off by more than a threshold, of those whose truth is known."""
        errors = self.part(index, "errors")
        known = errors[~errors.isnan()]
        return float((known > (self.threshold if threshold is None else threshold)).double().mean())

    def save(self, path: str | Path) -> None:
        """Write them as safetensors with JSON metadata, atomically."""
        facts = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "tensors"}
        text = json.dumps({"version": 1, **facts}, sort_keys=True)
        write_bytes(path, safetensors.torch.save(dict(self.tensors), metadata={_METADATA_KEY: text}))

    @classmethod
    def load(cls, path: str | Path) -> Clouds:
        """Read what `save` wrote.

        Raises:
            SceneError: the file is missing, damaged or of another version.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})[_METADATA_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if facts.pop("version") != 1:
                raise SceneError(f"{path} is of another version; sweep again to draw clouds.")
            facts |= {name: tuple(map(str, facts[name])) for name in ("arms", "alignment")}
            return cls(tensors, **{**facts, "threshold": float(facts["threshold"])})
        except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise SceneError(
                f"{path} holds no clouds or is damaged ({error}); delete it, and the same sweep makes it again."
            ) from error
        except SceneError as error:
            raise SceneError(f"{path}: {error}") from error


@torch.no_grad()
def capture_clouds(
    runner: Runner, scene: Scene, arms: Sequence[Arm], settings: MetricSettings | None = None, *, seed: int = 0
) -> Clouds | None:
    """Run arms once more on one scene and keep part of what they predict, in the frame of the truth.

    The same pixels are kept of every arm as far as it is confident there, so that pictures differ by what was
    predicted.

    Args:
        runner: the model.
        scene: prepared by `Runner.prepared`.
        arms: what to show, the dense model first.
        settings: how predictions are aligned; the runner's own by default. Under DTU's protocol the threshold is 5 mm,
            else what one in ten points of the first arm exceeds, rounded.
        seed: chooses the pixels.

    Returns:
        The clouds, of at most 60 000 points each; None for a scene of cameras alone, which has no true cloud.

    Raises:
        PatchError: an arm cannot run.
        CalibrationError: a prediction cannot be aligned with the scene.
    """
    settings = settings or runner.metrics
    true = scene.cloud()
    if true is None:
        return None
    tensors, methods = {"c2w": scene.c2w.detach().to("cpu", torch.float32).contiguous()}, []
    scale = 1.0 if settings.dtu is None else scene.scale
    for index, arm in enumerate(arms):
        prediction = runner.predict(scene, arm)[0]
        if settings.min_confidence is not None:
            prediction = replace(prediction, min_confidence=settings.min_confidence)
        found = align_with_truth(prediction, scene, settings.alignment)
        pixels = _chosen(prediction, seed)
        points = found.similarity.apply(prediction.points.flatten(0, 2)[pixels].to("cpu", torch.float64))
        tensors[f"{index}.points"] = points.float()
        tensors[f"{index}.colours"] = _colours(prediction, scene)[pixels].cpu()
        tensors[f"{index}.errors"] = (scale * _errors(points, prediction, scene, true, pixels)).float()
        methods.append(found.method)
    return Clouds(
        tensors,
        scene=scene.name,
        arms=tuple(arm.name for arm in arms),
        row=next((arm.label for arm in arms if not arm.dense), "0"),
        threshold=_exceeded(tensors["0.errors"]) if settings.dtu is None else MILLIMETRES,
        unit="scene" if settings.dtu is None else "mm",
        measure="nearest" if scene.depth is None else "pixels",
        alignment=tuple(methods),
    )


def _chosen(prediction: Prediction, seed: int) -> Tensor:
    """Indices of the first confident pixels in one random order of all, sorted."""
    confident = prediction.confident.flatten().cpu()
    order = torch.randperm(len(confident), generator=torch.Generator().manual_seed(seed))
    return order[confident[order]][:POINTS].sort().values


def _colours(prediction: Prediction, scene: Scene) -> Tensor:
    """Image colours ``[n, 3]`` uint8 of all predicted points."""
    rows, columns = (index.to(scene.images.device) for index in prediction.pixel_grid(scene.height, scene.width))
    images = scene.images.detach()[:, :, rows][:, :, :, columns]
    return (images.permute(0, 2, 3, 1).flatten(0, 2).clamp(0, 1) * 255).round().to(torch.uint8)


def _errors(points: Tensor, prediction: Prediction, scene: Scene, true: Tensor, pixels: Tensor) -> Tensor:
    """Distance of each chosen point ``[n, 3]`` to its truth, in units of the scene; NaN where that is not known."""
    known = scene.world_points()
    if known is None:
        return nearest_distances(points, true) if len(points) else points.new_empty(0)
    rows, columns = (index.to(known[0].device) for index in prediction.pixel_grid(scene.height, scene.width))
    truth, valid = (part[:, rows][:, :, columns].flatten(0, 2)[pixels.to(part.device)].cpu() for part in known)
    return torch.where(valid, (points - truth.double()).norm(dim=-1), math.nan)


def _exceeded(errors: Tensor) -> float:
    """A number of two digits that about one in ten errors exceed."""
    known = errors[~errors.isnan()].double().sort().values
    return float(f"{known[int(0.9 * len(known))]:.1e}") if len(known) else 0.0


def _check_tensor(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = tensors.get(name)
    if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype:
        given = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise SceneError(f"tensor {name} is {given}, wanted {dtype} {list(shape)}.")
    if name.endswith(("points", "c2w")) and not bool(tensor.isfinite().all()):
        raise SceneError(f"tensor {name} holds values that are not finite.")
