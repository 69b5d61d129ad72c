"""The backends of this package, registered when it is imported; their code is imported when they are first used."""

from __future__ import annotations

import os

from torch import Tensor

from . import gather, reference
from .backends import Backend, Problem, register_backend
from .lists import BlockLists

_Heads = tuple[int, ...] | None
_Output = tuple[Tensor, Tensor | None]
_Gradients = tuple[Tensor, Tensor, Tensor]


def _sm90_forward(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, heads: _Heads) -> _Output:
    from .sm90.launch import forward

    return forward(q, k, v, lists, scale, heads)


def _sm90_refusal(problem: Problem) -> str | None:
    if problem.device.type != "cuda":
        return "it needs a CUDA device"
    from .sm90.launch import refusal

    return refusal(problem)


def _triton_forward(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, heads: _Heads) -> _Output:
    from .triton import forward

    return forward(q, k, v, lists, scale, heads)


def _triton_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lists: BlockLists, scale: float
) -> _Gradients:
    from .triton import backward

    return backward(grad, q, k, v, out, lse, lists, scale)


def _triton_refusal(problem: Problem) -> str | None:
    if problem.device.type != "cuda" and "TRITON_INTERPRET" not in os.environ:
        return "it needs a CUDA device"  # known without importing it
    from .triton import refusal

    return refusal(problem)


def _flex_forward(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, heads: _Heads) -> _Output:
    from .flex import forward

    return forward(q, k, v, lists, scale, heads)


def _flex_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lists: BlockLists, scale: float
) -> _Gradients:
    from .flex import backward

    return backward(grad, q, k, v, out, lse, lists, scale)


def _flex_refusal(problem: Problem) -> str | None:
    from .flex import refusal

    return refusal(problem)


def register_built_in() -> None:
    """Register them all."""
    # The kernels for Hopper compute no gradients: Triton's read the same log-sum-exp.
    register_backend(
        Backend("cuda_sm90", 40, _sm90_forward, _triton_backward, _sm90_refusal, dense_heads=True, tested=True)
    )
    register_backend(
        Backend("triton", 30, _triton_forward, _triton_backward, _triton_refusal, dense_heads=True, tested=True)
    )
    register_backend(Backend("flex", 20, _flex_forward, _flex_backward, _flex_refusal, dense_heads=True, tested=True))
    register_backend(Backend("gather", 10, gather.forward, gather.backward))
    register_backend(Backend("reference", -1, reference.forward, reference.backward))
