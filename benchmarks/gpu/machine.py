"""The header of a report: what was measured, on what, with which versions."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from typing import Any

import torch

import hess_plugin
from hess_plugin.machine import describe_machine
from hess_plugin_cuda.dense import dense_kernels

_ASKED = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,power.draw,temperature.gpu"


def describe(device: torch.device) -> dict[str, Any]:
    """Names and versions, JSON types only."""
    about: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "device": str(device),
        "python": platform.python_version(),
        "hess_plugin": hess_plugin.__version__,
        "torch": torch.__version__,
        "triton": version("triton"),
        "numpy": version("numpy"),
        "dense kernels, bfloat16": list(dense_kernels(device, torch.bfloat16, 64)),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "gpu": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory, GiB": round(properties.total_memory / 2**30, 1),
            "second-level cache, MiB": getattr(properties, "L2_cache_size", 0) // 2**20,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": nvidia_smi(),
        }
    return about


def version(package: str) -> str | None:
    """Of an installed distribution; None if it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def nvidia_smi() -> dict[str, str] | None:
    """Driver and clocks of the first GPU, read and not set; None where the tool is missing or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, f"--query-gpu={_ASKED}", "--format=csv,noheader", "--id=0"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = result.stdout.strip().splitlines()[:1]
    return (
        dict(zip(_ASKED.split(","), (part.strip() for part in values[0].split(",")), strict=False)) if values else None
    )
