"""What this machine computes sparse attention with, why, and what would be faster."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

import hess_plugin_cuda
from hess_plugin_cuda.backends import CHOICE, get_backend, why_wrong
from hess_plugin_cuda.dense import dense_kernels

from .machine import machine_key

_PACKAGES = ("triton", "flash-attn", "flash-attn-4", "xformers")
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class BackendState:
    """What one backend can do for a problem.

    Attributes:
        name: of the backend.
        state: ``chosen`` (what "auto" takes), ``usable``, ``by name only``, ``refused`` or ``wrong``.
        reason: why it is chosen or refused, or what its self-test found; empty otherwise.
    """

    name: str
    state: str
    reason: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All that decides how fast patched attention is on a machine.

    Attributes:
        device: name of the device, its memory and driver.
        versions: of Python, torch and what comes with it, by name.
        problem: the attention that backends were asked for.
        backends: best first.
        dense: torch's kernels for dense attention, best first.
        advice: sentences on what would be faster; empty where nothing is known.
        unusable: why no backend is chosen; None where one is.
    """

    device: str
    versions: dict[str, str]
    problem: str
    backends: tuple[BackendState, ...]
    dense: tuple[str, ...]
    advice: tuple[str, ...]
    unusable: str | None = None

    @property
    def chosen(self) -> str | None:
        """The backend that "auto" takes; None if none can run."""
        return next((backend.name for backend in self.backends if backend.state == "chosen"), None)

    @property
    def healthy(self) -> bool:
        """Whether a backend can run, and none computes wrong results."""
        return self.chosen is not None and not any(backend.state == "wrong" for backend in self.backends)

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as JSON types."""
        return {**asdict(self), "chosen": self.chosen, "healthy": self.healthy}


def diagnose(problem: hess_plugin_cuda.Problem) -> Diagnosis:
    """Look at a device and at every backend; runs the self-tests of those that have one.

    Args:
        problem: the device, and the attention that is asked for there.
    """
    try:
        chosen, unusable = hess_plugin_cuda.resolve_backend("auto", problem), None
    except (RuntimeError, ValueError) as error:
        chosen, unusable = None, str(error)
    backends = tuple(_state(name, problem, chosen) for name in hess_plugin_cuda.available_backends())
    return Diagnosis(
        device=_device(problem.device),
        versions=_versions(problem.device),
        problem=str(problem),
        backends=backends,
        dense=dense_kernels(problem.device, problem.dtype, problem.head_dim),
        advice=tuple(_advice(problem, {backend.name: backend for backend in backends})),
        unusable=unusable,
    )


def _state(name: str, problem: hess_plugin_cuda.Problem, chosen: str | None) -> BackendState:
    refusal = get_backend(name).refusal(problem)
    if refusal is not None:
        return BackendState(name, "refused", refusal)
    wrong = why_wrong(name, problem)
    if wrong is not None:
        return BackendState(name, "wrong", wrong)
    if name == chosen:
        named = os.environ.get(CHOICE)
        return BackendState(name, "chosen", f"named by {CHOICE}" if named else "the first that can run here")
    return BackendState(name, "usable" if get_backend(name).priority >= 0 else "by name only")


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device.type}: {machine_key(device)}"
    facts = torch.cuda.get_device_properties(device)
    driver = _driver()
    told = "" if driver is None else f", driver for CUDA {driver}"
    return f"{device}: {facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB{told}"


def _driver() -> str | None:
    """The newest CUDA that the installed driver runs, without starting one; None where there is no driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _versions(device: torch.device) -> dict[str, str]:
    found = {"Python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        found["CUDA"] = str(torch.version.cuda)
        found["cuDNN"] = str(torch.backends.cudnn.version())
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _advice(problem: hess_plugin_cuda.Problem, backends: dict[str, BackendState]) -> list[str]:
    """What would make attention faster here, the largest gain first."""
    told = []
    if os.environ.get(CHOICE):
        told.append(f"{CHOICE}={os.environ[CHOICE]} stands for auto; without it the best backend is chosen.")
    told += _on_a_gpu(problem, backends) if problem.device.type == "cuda" else _without_a_gpu(problem)
    told += [
        f"{backend.name} would be tried first, but {backend.reason}; please report this."
        for backend in backends.values()
        if backend.state == "wrong"
    ]
    return told


def _on_a_gpu(problem: hess_plugin_cuda.Problem, backends: dict[str, BackendState]) -> list[str]:
    told = []
    chosen = next((backend.name for backend in backends.values() if backend.state == "chosen"), None)
    capability = torch.cuda.get_device_capability(problem.device)
    if problem.dtype not in _HALVES:
        told.append("Run the model in bfloat16 (autocast), for which the kernels are made.")
    elif chosen != "cuda_sm90" and capability == (9, 0) and "cuda_sm90" in backends:
        reason = backends["cuda_sm90"].reason
        told.append("cuda_sm90 is made for this card" + (f"; here {reason}." if reason else "."))
    if chosen not in ("cuda_sm90", "triton") and "triton" in backends and backends["triton"].reason:
        told.append(f"triton goes before {chosen} where it runs; here {backends['triton'].reason}.")
    if capability[0] in (9, 10) and dense_kernels(problem.device, problem.dtype, problem.head_dim)[0] != "cudnn":
        told.append("torch prefers cuDNN 9.15 or later for dense attention on this card; torch 2.11 brings it.")
    return told


def _without_a_gpu(problem: hess_plugin_cuda.Problem) -> list[str]:
    if problem.device.type == "cpu" and torch.version.cuda is None and _driver() is not None:
        return ["There is an NVIDIA driver, but this torch is built without CUDA: install a CUDA build of it."]
    if problem.device.type == "cpu" and torch.cuda.is_available():
        return ["There is a CUDA device: --device cuda."]
    return ["A CUDA device of compute capability 8.0 or later; `hess-patch bench` measures what patching saves here."]
