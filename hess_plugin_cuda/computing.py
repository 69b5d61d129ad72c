"""What a call over block lists does: heads that keep everything to a dense kernel, the others to the chosen backend."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .backends import Problem, get_backend, resolve_backend
from .dense import dense_attention
from .lists import BlockLists


def compute(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """Output like q, and the log-sum-exp `[B, H, N_q]` that `gradients` reads, zero where it needs none."""
    chosen = get_backend(resolve_backend(backend, problem_of(v, lists)))
    full = _full_heads(lists) if chosen.dense_heads else ()
    if len(full) == lists.heads:
        return dense_attention(q, k, v, scale), q.new_zeros(q.shape[:3], dtype=torch.float32)
    sparse = tuple(head for head in range(lists.heads) if head not in full) if full else None
    out, lse = chosen.forward(q, k, v, lists, scale, sparse)
    if full:
        some = _index(full, q.device)
        dense_q, dense_k, dense_v = _pick(some, q, k, v)
        out.index_copy_(1, some, dense_attention(dense_q, dense_k, dense_v, scale))
    return out, q.new_zeros(q.shape[:3], dtype=torch.float32) if lse is None else lse


def gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: BlockLists,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, of what `compute` returned."""
    # Autocast may be on where the backward pass is started, and was off in the forward pass.
    with torch.autocast(grad.device.type, enabled=False):
        chosen = get_backend(resolve_backend(backend, problem_of(v, lists)))
        full = _full_heads(lists) if chosen.dense_heads else ()
        if not full:
            return chosen.backward(grad, q, k, v, out, lse, lists, scale)
        if len(full) == lists.heads:
            return _dense_gradients(grad, q, k, v, scale)
        whole = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        some = _index(full, q.device)
        flow, some_q, some_k, some_v = _pick(some, grad, q, k, v)
        _put(whole, some, _dense_gradients(flow, some_q, some_k, some_v, scale))
        sparse = tuple(head for head in range(lists.heads) if head not in full)
        some = _index(sparse, q.device)
        flow, some_q, some_k, some_v, some_out, some_lse = _pick(some, grad, q, k, v, out, lse)
        found = chosen.backward(flow, some_q, some_k, some_v, some_out, some_lse, lists.of_heads(sparse), scale)
        _put(whole, some, found)
        return whole


def problem_of(v: Tensor, lists: BlockLists) -> Problem:
    """What a backend is asked for by values `[B, H, N_k, d]` and lists."""
    return Problem(v.device, v.dtype, v.shape[-1], lists.block_q, lists.block_k)


class Attention(torch.autograd.Function):
    """`compute` and `gradients`, for autograd."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, backend: str) -> Tensor:
        """Attend to the kept blocks."""
        out, lse = compute(q, k, v, lists, scale, backend)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.lists, ctx.scale, ctx.backend = lists, scale, backend
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute again what the gradients need, instead of keeping it."""
        q, k, v, out, lse = ctx.saved_tensors
        return (*gradients(grad, q, k, v, out, lse, ctx.lists, ctx.scale, ctx.backend), None, None, None)


def _full_heads(lists: BlockLists) -> tuple[int, ...]:
    """Heads of which the host knows that they keep everything."""
    if lists.is_full:
        return tuple(range(lists.heads))
    pairs = lists.query_blocks * lists.key_blocks
    return tuple(head for head, kept in enumerate(lists.head_kept or ()) if kept == pairs)


@functools.lru_cache(maxsize=256)  # a copy to a GPU waits for what it still has to do
def _index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(heads, device=device)


def _pick(heads: Tensor, *tensors: Tensor) -> list[Tensor]:
    return [x.index_select(1, heads) for x in tensors]


def _put(whole: tuple[Tensor, ...], heads: Tensor, parts: tuple[Tensor, ...]) -> None:
    for each, part in zip(whole, parts, strict=True):
        each.index_copy_(1, heads, part)


def _dense_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = dense_attention(leaves[0], leaves[1], leaves[2], scale)
    dq, dk, dv = torch.autograd.grad(out, leaves, grad)
    return dq, dk, dv
