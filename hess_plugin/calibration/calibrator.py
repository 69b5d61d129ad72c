"""Calibration: one forward and two backward passes a scene, traces kept raw, a profile at the end."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import logging
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import pluggy
import torch
from torch import nn

from hess_plugin import __version__
from hess_plugin.exceptions import CalibrationError, PatchError
from hess_plugin.files import check_writable
from hess_plugin.harm_curves import has_curves
from hess_plugin.interception import is_patched
from hess_plugin.plugins import resolve_adapter
from hess_plugin.presets import KEY, find_preset
from hess_plugin.profiles import HARM, Profile, model_digest, weights_fingerprint
from hess_plugin.scenes.image_set import ImageSet
from hess_plugin.scenes.scene import Scene
from hess_plugin.sites import Site

from .errors import EPS
from .harm import HarmSettings
from .measuring import Protocol, measuring
from .ranks import Ranks
from .record import Record
from .rounds import Progress, measure_all, scene_names

_log = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    scenes: Iterable[Scene | ImageSet],
    *,
    output: str | Path | None = None,
    camera_weight: float | None = None,
    eps: float = EPS,
    autocast: torch.dtype | None = None,
    memory: str = "lean",
    target: str = "auto",
    harm: HarmSettings | Literal[False] | None = None,
    preset: str | None = None,
    metadata: dict[str, Any] | None = None,
    progress: Progress | None = None,
    adapter: str | None = None,
    manager: pluggy.PluginManager | None = None,
    ranks: Ranks | None = None,
) -> Profile:
    """Measure how sensitive every attention head is (HeSS, sec. 3.2): one forward, two backward passes a scene.

    Each scene is normalised (first camera at the origin, mean distance of true points 1), the prediction is
    aligned to it, and the squared gradients of the camera and the point error with respect to every head's
    projections are recorded. Weights are left as they were; only their gradients are computed.

    Args:
        model: a model that an adapter claims; its device decides where it runs.
        scenes: scenes at a size the model takes, with true cameras and, for the point error, depth or points; or
            images alone. Lazily loaded sequences are read one scene at a time. Names must differ.
        output: write the profile here. While running, ``<output>.partial`` holds the raw traces: a killed
            calibration goes on from there and ends with the same profile.
        camera_weight: lambda of the score recorded in the profile; the model family's by default.
        eps: inlier distance of the point error, in units of the normalised scene (0.05 in the paper).
        autocast: run the forward under autocast in this type (bfloat16 on a GPU); None for the model's own.
        memory: ``lean`` keeps only what goes into each block and head and computes the rest again, ``plain`` keeps
            the whole graph; the traces agree to rounding.
        target: ``truth`` measures errors against the scenes' ground truth, as HeSS does; ``self`` needs none and
            measures them against the model's own prediction, displaced at random (see
            `hess_plugin.calibration.self_target`); ``auto`` takes the truth of scenes and, where all there is are
            images (`ImageSet`), the prediction. Recorded in the profile's metadata as ``truth`` or ``self``.
        harm: also measure what leaving out blocks of each head does to the errors, by one more forward a scene, with
            these blocks; what ``patch(allocation="harm")`` needs. None as the preset has it, False for traces alone.
        preset: what the profile is for, taken by every patch with it that names no other (see `hess_plugin.patch`);
            one that goes by harm has it measured, in its own way unless `harm` says another.
        metadata: provenance to record (weights, resolution, ...), JSON types only.
        progress: called as ``progress(done, total, scene)`` before each scene and once at the end; in rank 0 only.
        adapter: take this adapter instead of asking which one claims the model.
        manager: plugin manager; a fresh one by default.
        ranks: share the scenes with other processes, which all call this with the same arguments and get the same
            profile, the one that a single process makes; rank 0 alone reads and writes files at `output`, however
            many ranks there were when it was begun. None: alone.

    Returns:
        The profile.

    Raises:
        CalibrationError: no scene gave a usable error, a trace is not finite, some scenes have a truth and others
            none, or ``<output>.partial`` belongs to another calibration; another rank stopped, is gone, or was given
            something else.
        SceneError: a scene is malformed.
        PatchError: the model is patched, or there is no such preset.
    """
    ranks = ranks or Ranks()
    with ranks.together():
        find_preset(preset, None)
        if preset is not None and harm is None:
            harm = HarmSettings.of_preset(preset)
        if not isinstance(harm, HarmSettings) and harm not in (None, False):
            raise CalibrationError(f"harm is {harm!r}, wanted a HarmSettings, None or False.")
        harm = harm or None
        protocol = Protocol(eps=eps, autocast=autocast, memory=memory, target=target, harm=harm)
        _check_arguments(model, scenes, camera_weight)
        path = None if output is None or ranks.rank != 0 else Path(output)
        if path is not None:
            check_writable(path)
        chosen = resolve_adapter(model, adapter, manager)
        sites = chosen.sites(model)
        heads = {site.num_heads for site in sites}
        if len(heads) != 1:
            raise CalibrationError(
                f"sites have different numbers of heads ({sorted(heads)}), wanted one number for all."
            )
        family = chosen.family(model)
        weight = family.camera_weight if camera_weight is None else camera_weight
        source = family.source if camera_weight is None else "given"
        provenance = {
            **_provenance(model, autocast),
            **(metadata or {}),
            "eps": eps,
            "memory": memory,
            "target": target,
            **({} if harm is None else {"harm": harm.to_json()}),
            **({} if preset is None else {KEY: preset}),
        }
        settings = {
            **provenance,
            "adapter": chosen.name,
            "sites": [site.key for site in sites],
            "model_digest": "" if output is None and ranks.size == 1 else model_digest(model),
        }
        ranks.agree({**settings, "camera_weight": weight, **scene_names(scenes, ranks)})
        record = _open(path, settings, ranks)
        hint = "" if output is None else "run the same command again to go on"
        with ranks.together(hint), measuring(chosen, model, sites, protocol) as measurer:
            names = measure_all(measurer, scenes, record, ranks, progress if ranks.rank == 0 else None)
        _check_usable(record, names)
        profile = _profile(record, names, chosen.name, sites, weight, {**provenance, "camera_weight_source": source})
        if harm is not None and not has_curves(profile):
            _log.warning(
                "no scene has more than %d key blocks of %d patches, so that there are no harm curves and budgets will "
                "not go by them; calibrate on more views, or with a smaller block_k",
                harm.minimum,
                harm.block_k,
            )
        profile.scores()  # fails now, with nothing written, rather than when the profile is first used
        if path is not None:
            profile.save(path)
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


def _open(path: Path | None, settings: dict[str, Any], ranks: Ranks) -> Record:
    """Resume from the file of rank 0, or start; every rank gets a copy, machines need not share a file system."""
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    record = Record.open(None if path is None else Path(f"{path}.partial"), settings, started)
    first = ranks.exchange(record.to_bytes() if ranks.rank == 0 else b"")[0]
    return record if ranks.rank == 0 else Record.from_bytes(first)


def _check_usable(record: Record, names: Sequence[str]) -> None:
    """Refuse to make a profile of nothing."""
    found = record.found
    if not any(name in found.traces for name in names):
        reason = next((found.skipped[name] for name in names), "there was no scene.")
        if not found.traces:
            record.delete()  # nothing in it is worth resuming
        raise CalibrationError(f"none of {len(names)} scenes gave a usable error: {reason}")


def _profile(
    record: Record,
    names: Sequence[str],
    adapter: str,
    sites: Sequence[Site],
    camera_weight: float,
    provenance: dict[str, Any],
) -> Profile:
    """Make the profile of the scenes called `names`, in their order whatever order they were measured in."""
    found = record.found
    measured = [name for name in names if name in found.traces]
    traces = [found.traces[name] for name in measured]
    stacked = {key: torch.stack([each[key] for each in traces]) for key in traces[0]}
    return Profile(
        adapter=adapter,
        sites=tuple(site.key for site in sites),
        num_heads=sites[0].num_heads,
        scenes=tuple(measured),
        traces={key: stacked[key] for key in stacked if not key.startswith(HARM)},
        camera_weight=camera_weight,
        fingerprint=weights_fingerprint(sites),
        metadata={
            **provenance,
            "target": found.facts[measured[0]]["target"],  # one for all
            "created": record.started,
            "measured": {name: found.facts[name] for name in measured},
            "skipped": {name: found.skipped[name] for name in names if name in found.skipped},
        },
        harm={key.removeprefix(HARM): stacked[key] for key in stacked if key.startswith(HARM)},
    )


def _provenance(model: nn.Module, autocast: torch.dtype | None) -> dict[str, Any]:
    """Tell what the traces depend on besides model and scenes."""
    parameter = next(model.parameters())
    return {
        "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
        "device": parameter.device.type,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
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
