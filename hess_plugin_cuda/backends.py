"""The backends: which code computes attention over block lists, and where each one runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .gather import gather_attention
from .lists import BlockLists
from .reference import reference_attention

Run = Callable[[Tensor, Tensor, Tensor, BlockLists, float], Tensor]
Refusal = Callable[[torch.device, torch.dtype, int], "str | None"]


def _runs_anywhere(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to compute attention over block lists.

    Attributes:
        name: what a caller writes to get it.
        priority: "auto" takes the usable backend with the highest; below zero it is only taken by name.
        run: computes `(q, k, v, lists, scale)` -> output like q, once the arguments have been checked.
        refusal: says in a few words why it cannot run on `(device, dtype, head_dim)`, or None if it can.
    """

    name: str
    priority: int
    run: Run
    refusal: Refusal = _runs_anywhere

    def __post_init__(self) -> None:
        if not self.name or self.name == "auto":
            raise ValueError(f'A backend needs a name of its own; got {self.name!r} ("auto" is the choice itself).')


_BACKENDS: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Add a backend.

    Raises:
        ValueError: the name is taken.
    """
    if backend.name in _BACKENDS:
        raise ValueError(f"There is a backend {backend.name!r} already; give the new one another name.")
    _BACKENDS[backend.name] = backend


def available_backends(
    device: torch.device | str | None = None, dtype: torch.dtype | None = None, head_dim: int | None = None
) -> tuple[str, ...]:
    """Names of the backends, best first: all that exist, or those that can run on the device given.

    Args:
        device: list only what runs here; dtype and head_dim default to float32 and 64.
        dtype: of v.
        head_dim: width d of a head.
    """
    ranked = sorted(_BACKENDS.values(), key=lambda backend: -backend.priority)
    if device is not None:
        asked = (torch.device(device), dtype or torch.float32, head_dim or 64)
        ranked = [backend for backend in ranked if backend.refusal(*asked) is None]
    return tuple(backend.name for backend in ranked)


def resolve_backend(name: str, *, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str:
    """The backend that a call will use: the named one or nothing; for "auto" the best that can run.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the named backend cannot run here, or "auto" finds none.
    """
    device = torch.device(device)
    usable = [other for other in available_backends(device, dtype, head_dim) if _BACKENDS[other].priority >= 0]
    if name == "auto":
        if not usable:
            raise RuntimeError(f"No attention backend runs {dtype}, head width {head_dim} on {device}.")
        return usable[0]
    if name not in _BACKENDS:
        names = ", ".join(["auto", *available_backends()])
        raise ValueError(f"There is no attention backend {name!r}; choose one of {names}.")
    refusal = _BACKENDS[name].refusal(device, dtype, head_dim)
    if refusal is not None:
        raise RuntimeError(
            f"Backend {name!r} cannot run {dtype}, head width {head_dim} on {device}: {refusal}; "
            f"choose auto or one of {', '.join(usable)}."
        )
    return name


def get_backend(name: str) -> Backend:
    """The backend of a name that `resolve_backend` returned."""
    return _BACKENDS[name]


register_backend(Backend("gather", priority=10, run=gather_attention))
register_backend(Backend("reference", priority=-1, run=reference_attention))
