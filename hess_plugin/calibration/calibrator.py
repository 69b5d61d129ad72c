"""Calibration: one forward and two backward passes a scene, traces kept raw, a profile at the end."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
from collections.abc import Callable, Iterable, Sequence, Sized
from pathlib import Path
from typing import Any

import pluggy
import torch
from torch import Tensor, nn

from hess_plugin import __version__
from hess_plugin.adapting import Adapter
from hess_plugin.exceptions import CalibrationError, PatchError, SceneError
from hess_plugin.files import check_writable
from hess_plugin.interception import is_patched
from hess_plugin.plugins import resolve_adapter
from hess_plugin.profiles import Profile, model_digest, weights_fingerprint
from hess_plugin.scenes.image_set import ImageSet
from hess_plugin.scenes.scene import Scene
from hess_plugin.sites import Site

from .errors import EPS
from .measuring import Measurer, Protocol, measuring
from .record import Record

Progress = Callable[[int, int, str], None]


def calibrate(
    model: nn.Module,
    scenes: Iterable[Scene | ImageSet],
    *,
    output: str | Path | None = None,
    camera_weight: float | None = None,
    eps: float = EPS,
    autocast: torch.dtype | None = None,
    memory: str = "lean",
    metadata: dict[str, Any] | None = None,
    progress: Progress | None = None,
    adapter: str | None = None,
    manager: pluggy.PluginManager | None = None,
) -> Profile:
    """Measure how sensitive every attention head is (HeSS, sec. 3.2): one forward, two backward passes a scene.

    Each scene is normalised (first camera at the origin, mean distance of true points 1), the prediction is
    aligned to it, and the squared gradients of the camera and the point error with respect to every head's
    projections are recorded. Weights are left as they were; only their gradients are computed.

    Args:
        model: a model that an adapter claims; its device decides where it runs.
        scenes: scenes at a size the model takes, with true cameras and, for the point error, depth or points;
            lazily loaded sequences are read one scene at a time. Names must differ.
        output: write the profile here. While running, ``<output>.partial`` holds the raw traces: a killed
            calibration goes on from there and ends with the same profile.
        camera_weight: lambda of the score recorded in the profile; the model family's by default.
        eps: inlier distance of the point error, in units of the normalised scene (0.05 in the paper).
        autocast: run the forward under autocast in this type (bfloat16 on a GPU); None for the model's own.
        memory: ``lean`` keeps only what goes into each block and head and computes the rest again, ``plain`` keeps
            the whole graph; the traces agree to rounding.
        metadata: provenance to record (weights, resolution, ...), JSON types only.
        progress: called as ``progress(done, total, scene)`` before each scene and once at the end.
        adapter: take this adapter instead of asking which one claims the model.
        manager: plugin manager; a fresh one by default.

    Returns:
        The profile.

    Raises:
        CalibrationError: no scene gave a usable error, a trace is not finite, or ``<output>.partial`` belongs to
            another calibration.
        SceneError: a scene is malformed.
        PatchError: the model is patched.
    """
    protocol = Protocol(eps=eps, autocast=autocast, memory=memory)
    _check_arguments(model, scenes, camera_weight)
    if output is not None:
        check_writable(output)
    chosen = resolve_adapter(model, adapter, manager)
    sites = chosen.sites(model)
    heads = {site.num_heads for site in sites}
    if len(heads) != 1:
        raise CalibrationError(f"sites have different numbers of heads ({sorted(heads)}), wanted one number for all.")
    family = chosen.family(model)
    weight = family.camera_weight if camera_weight is None else camera_weight
    fingerprint = weights_fingerprint(sites)
    provenance = {**_provenance(model, autocast), **(metadata or {}), "eps": eps, "memory": memory}
    record = Record.open(
        None if output is None else Path(f"{output}.partial"),
        {
            "adapter": chosen.name,
            "sites": [site.name for site in sites],
            "model_digest": "" if output is None else model_digest(model),
            **provenance,
        },
        datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
    names = _measure_all(chosen, model, sites, scenes, record, protocol, progress)
    skipped = {name: record.skipped[name] for name in names if name in record.skipped}
    profile = Profile(
        adapter=chosen.name,
        sites=tuple(site.name for site in sites),
        num_heads=heads.pop(),
        scenes=tuple(name for name in names if name in record.traces),
        traces=_stack(record, names),
        camera_weight=weight,
        fingerprint=fingerprint,
        metadata={
            **provenance,
            "camera_weight_source": family.source if camera_weight is None else "given",
            "created": record.started,
            "measured": {name: record.facts[name] for name in names if name in record.facts},
            "skipped": skipped,
        },
    )
    profile.scores()  # fails now, with nothing written, rather than when the profile is first used
    if output is not None:
        profile.save(output)
        record.delete()
    return profile


def _check_arguments(model: nn.Module, scenes: Iterable[Scene | ImageSet], camera_weight: float | None) -> None:
    """Refuse now what would only be noticed after the last scene."""
    if isinstance(scenes, (str, Path, Scene, ImageSet)):
        raise CalibrationError(
            f"scenes is of type {type(scenes).__name__}, wanted a sequence of scenes; read folders with "
            "hess_plugin.scenes.read_scenes, put a single scene into a list."
        )
    if camera_weight is not None and not 0.0 <= camera_weight <= 1.0:
        raise CalibrationError(f"camera_weight is {camera_weight}, wanted a number from 0 (points) to 1 (camera).")
    if isinstance(model, nn.Module) and is_patched(model):
        raise PatchError("this model is patched; remove the patch before calibrating.")


def _measure_all(
    adapter: Adapter,
    model: nn.Module,
    sites: Sequence[Site],
    scenes: Iterable[Scene | ImageSet],
    record: Record,
    protocol: Protocol,
    progress: Progress | None,
) -> list[str]:
    """Measure every scene that the record does not hold yet; return all scene names in order."""
    names: list[str] = []
    total = len(scenes) if isinstance(scenes, Sized) else 0
    with measuring(adapter, model, sites, protocol) as measurer:
        for scene in scenes:
            if scene.name in names:
                raise CalibrationError(f"two scenes are called {scene.name!r}; give every scene its own name.")
            if progress is not None:
                progress(len(names), total, scene.name)
            names.append(scene.name)
            # Also finished scenes are read again: a scene that changed since must not keep its old traces.
            digest = scene.digest()
            if not record.done(scene.name, digest):
                _measure(measurer, scene, digest, record)
    if progress is not None:
        progress(len(names), len(names), "")
    if not any(name in record.traces for name in names):
        reason = next((record.skipped[name] for name in names), "there was no scene.")
        if not record.traces:
            record.delete()  # nothing in it is worth resuming
        raise CalibrationError(f"none of {len(names)} scenes gave a usable error: {reason}")
    return names


def _measure(measurer: Measurer, scene: Scene | ImageSet, digest: str, record: Record) -> None:
    """Measure one scene; one that cannot be aligned is recorded as skipped, with the reason."""
    try:
        measured = measurer.measure(scene)
    except (CalibrationError, SceneError) as error:
        record.skip(scene.name, digest, str(error))
    else:
        record.add(scene.name, digest, measured.traces, measured.facts)


def _stack(record: Record, names: Sequence[str]) -> dict[str, Tensor]:
    """Stack the traces of all measured scenes, in scene order whatever order they were measured in."""
    measured = [record.traces[name] for name in names if name in record.traces]
    return {key: torch.stack([traces[key] for traces in measured]) for key in measured[0]}


def _provenance(model: nn.Module, autocast: torch.dtype | None) -> dict[str, Any]:
    """Tell what the traces depend on besides model and scenes."""
    parameter = next(model.parameters())
    return {
        "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
        "device": parameter.device.type,
        "versions": {
            "hess_plugin": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **_installed("numpy", "faiss-cpu", "faiss-gpu", "open3d-cpu", "open3d"),
        },
    }


def _installed(*names: str) -> dict[str, str]:
    """Versions of those distributions that are installed; alignment and matches depend on them."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
