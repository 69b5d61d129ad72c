"""`hess-patch calibrate --dry-run`: what the scenes at hand would take, in plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pluggy
import torch
from torch import nn

from hess_plugin.plugins import resolve_adapter
from hess_plugin.scenes.image_set import ImageSet
from hess_plugin.scenes.scene import Scene

from .estimate import Estimate, describe, estimate
from .measuring import Protocol

GPU_CONTEXT = 2 * 10**9  # what a GPU's context and its allocator's fragmentation take, at most in practice


def rehearse(
    model: nn.Module,
    scenes: Sequence[Scene | ImageSet],
    protocol: Protocol,
    adapter: str | None = None,
    manager: pluggy.PluginManager | None = None,
    *,
    processes: int = 1,
) -> str:
    """Tell what calibrating would take; the first scene is read, and a small forward is run for its time.

    Args:
        model: on the device it would be calibrated on.
        scenes: the first stands for all.
        protocol: how they would be measured.
        adapter: take this adapter instead of asking which one claims the model.
        manager: plugin manager; a fresh one by default.
        processes: how many would share the scenes.

    Raises:
        CalibrationError: the model cannot be run without values.
        SceneError: the first scene is malformed.
    """
    chosen = resolve_adapter(model, adapter, manager)
    first, device = scenes[0], next(model.parameters()).device
    size = (first.views, first.height, first.width)
    found = estimate(chosen, model, *size, protocol)
    autocast = "none" if protocol.autocast is None else str(protocol.autocast).removeprefix("torch.")
    lines = [
        f"{type(model).__name__} (adapter {chosen.name}), {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M "
        f"parameters, on {device}; {len(scenes)} scenes like {first.name}: {first.views} views of {first.height} x "
        f"{first.width} px; memory {protocol.memory}, autocast {autocast}",
        f"memory: {describe(found.total)} (weights {describe(found.weights)}, the rest {describe(found.activations)}); "
        "a GPU needs 1 to 2 GB more for its context and fragmentation",
    ]
    if protocol.memory == "lean":
        plain = estimate(chosen, model, *size, replace(protocol, memory="plain"), timed=False)
        lines.append(f"without --memory lean: {describe(plain.total)}")
    available = _available(device)
    if available is not None:
        lines.append(f"available: {describe(available)}{_verdict(found, available, device.type == 'cuda')}")
    rounds = -(-len(scenes) // processes)
    shared = "" if processes == 1 else f" with {processes} processes"
    if found.seconds is None:
        return "\n".join([*lines, f"time: unknown ({found.flops / 1e12:.3g} TFLOP a scene); a small forward failed"])
    lines.append(
        f"time: about {_duration(found.seconds)} a scene, {_duration(found.seconds * rounds)} in all{shared} "
        f"({found.flops / 1e12:.3g} TFLOP a scene, at the speed of a small forward; reading and alignment come on top)"
    )
    return "\n".join(lines)


def _verdict(found: Estimate, available: int, on_gpu: bool) -> str:
    beside = GPU_CONTEXT if on_gpu else 0
    if found.activations + beside < available:
        return ""
    return ": NOT ENOUGH; use fewer --views, a smaller --resolution, or --autocast bfloat16"


def _available(device: torch.device) -> int | None:
    """Free memory of the device beside the model, which is on it already."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    # Not what is free: files that were read fill the rest, and make room.
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
