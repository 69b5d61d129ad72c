"""The backends: which code computes attention over block lists, where each one runs, and which a call gets."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .lists import BlockLists
from .self_test import SelfTests

Forward = Callable[
    [Tensor, Tensor, Tensor, BlockLists, float, "tuple[int, ...] | None"],
    "tuple[Tensor, Tensor | None]",
]
Backward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, BlockLists, float],
    "tuple[Tensor, Tensor, Tensor]",
]

CHOICE = "HESS_BACKEND"
"""Environment variable that names the backend which "auto" stands for."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """What decides whether a backend can compute an attention.

    Attributes:
        device: of the tensors.
        dtype: of v, to which q and k are cast.
        head_dim: width d of a head.
        block_q: queries of a block.
        block_k: keys of a block.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int = 64
    block_q: int = 128
    block_k: int = 64

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{kind}, head width {self.head_dim}, blocks of {self.block_q} x {self.block_k} on {self.device}"


def _runs_anywhere(problem: Problem) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to compute attention over block lists.

    Attributes:
        name: what a caller writes to get it.
        priority: "auto" takes the usable backend with the highest; below zero it is only taken by name.
        forward: `(q, k, v, lists, scale, heads)` -> output like q, and the log-sum-exp of the scaled scores
            `[B, H, N_q]`, float32, or None where it does not compute it. Given heads, it leaves all others unset.
        backward: `(grad, q, k, v, out, lse, lists, scale)` -> gradients of q, k and v.
        refusal: says in a few words why it cannot compute a problem, or None if it can.
        dense_heads: heads that keep everything are better computed by a dense kernel: `forward` is given the others.
        tested: it is made for GPUs, and its first use on one compares it with plain torch.
    """

    name: str
    priority: int
    forward: Forward
    backward: Backward
    refusal: Callable[[Problem], str | None] = _runs_anywhere
    dense_heads: bool = False
    tested: bool = False

    def __post_init__(self) -> None:
        if not self.name or self.name == "auto":
            raise ValueError(f'A backend needs a name of its own; got {self.name!r} ("auto" is the choice itself).')


_BACKENDS: dict[str, Backend] = {}
_SELF_TESTS = SelfTests()


def register_backend(backend: Backend) -> None:
    """Add a backend.

    Raises:
        ValueError: the name is taken.
    """
    if backend.name in _BACKENDS:
        raise ValueError(f"There is a backend {backend.name!r} already; give the new one another name.")
    _BACKENDS[backend.name] = backend
    _choose.cache_clear()


def get_backend(name: str) -> Backend:
    """The backend of a name that `resolve_backend` returned."""
    return _BACKENDS[name]


def available_backends(problem: Problem | None = None) -> tuple[str, ...]:
    """Names of the backends, best first: all that exist, or those that do not refuse a problem."""
    ranked = sorted(_BACKENDS.values(), key=lambda backend: -backend.priority)
    return tuple(backend.name for backend in ranked if problem is None or backend.refusal(problem) is None)


def resolve_backend(name: str, problem: Problem) -> str:
    """The backend that a call will use: the named one or nothing; for "auto" the best that can run.

    What computes on a GPU is compared with plain torch on a small problem, once in a process for each kind of problem.
    "auto" passes over a backend that fails, and logs one line; the environment variable HESS_BACKEND may name what it
    stands for.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the named backend cannot run here or computes wrong results, or "auto" finds none.
    """
    named = os.environ.get(CHOICE) if name == "auto" else None
    if problem.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # Nothing can be tested now, so that nothing is to be remembered either.
        return _choose.__wrapped__(named or name, problem, bool(named))
    return _choose(named or name, problem, bool(named))


@functools.lru_cache(maxsize=256)  # asked by every call
def _choose(name: str, problem: Problem, by_environment: bool) -> str:
    if name == "auto":
        return _best(problem)
    source = f" (named by {CHOICE})" if by_environment else ""
    if name not in _BACKENDS:
        names = ", ".join(["auto", *available_backends()])
        raise ValueError(f"There is no attention backend {name!r}{source}; choose one of {names}.")
    refusal = _BACKENDS[name].refusal(problem) or why_wrong(name, problem)
    if refusal is not None:
        usable = [other for other in available_backends(problem) if other != name and _BACKENDS[other].priority >= 0]
        others = " or ".join(["auto", *usable])
        raise RuntimeError(f"Backend {name!r}{source} cannot run {problem}: {refusal}; choose {others}.")
    return name


def _best(problem: Problem) -> str:
    for name in available_backends(problem):
        if _BACKENDS[name].priority < 0 or (_BACKENDS[name].tested and _is_emulated(problem)):
            continue
        wrong = why_wrong(name, problem)
        if wrong is None:
            _log.info("attention backend %s for %s", name, problem)
            return name
        _log.warning("attention backend %s is passed over for %s: %s", name, problem, wrong)
    raise RuntimeError(f"No attention backend runs {problem}.")


def _is_emulated(problem: Problem) -> bool:
    """Whether kernels for GPUs would run in an interpreter, which is asked for by name."""
    return problem.device.type == "cpu"


def why_wrong(name: str, problem: Problem) -> str | None:
    """What the self-test of a backend says, run once in a process: None if it is right or needs no test."""
    backend = _BACKENDS[name]
    return _SELF_TESTS.result(name, backend.forward, problem) if backend.tested else None
