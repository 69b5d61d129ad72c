"""Launches the kernels: tensors and block lists in, tensors out, nothing read on the host."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from hess_plugin_cuda.lists import BlockLists, block_count
from hess_plugin_cuda.schedule import order_of, work_order

from .configurations import Configuration, forward_configuration, key_configuration, query_configuration
from .support import is_interpreted
from .transposed import transposed


def forward(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, heads: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over block lists.

    Args:
        q: queries `[B, H, N_q, d]`, patch tokens first, of v's dtype, any strides.
        k: keys `[B, H, N_k, d]`.
        v: values `[B, H, N_k, d]`.
        lists: the kept patch blocks.
        scale: factor on q . k, of any sign.
        heads: compute only these heads of every item and leave the others unset; None is all of them.

    Returns:
        Output in the layout of q, and the natural logarithm of the sum of exp(scale * q . k) over the keys that a
        query sees, float32 `[B, H, N_q]`.
    """
    from .forward_kernel import forward_kernel

    q, k, v = (_readable(x) for x in (q, k, v))
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    special = block_count(q.shape[2] - lists.query_tokens, lists.block_q)
    order = work_order(lists, special, heads)
    chosen = forward_configuration(*_kind(v), lists.block_q, lists.block_k)
    _launch(
        forward_kernel, chosen, order,
        q, k, v, out, lse, lists.row_ptr, lists.col, order, abs(scale) * math.log2(math.e),
        *_strides(q), *_strides(k), *_strides(v), *_strides(out),
        lists.heads, lists.query_blocks, lists.query_blocks + special, *_tokens(q, k, lists),
        ROWS=lists.block_q, BLOCK=lists.block_k, STEP=chosen.step, GROUP=chosen.group, WIDTH=q.shape[3],
        NEGATE=scale < 0, **_arithmetic(),
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lists: BlockLists, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the attention over block lists, the same bits in every run.

    Args:
        grad: gradient of the output, `[B, H, N_q, d]`.
        q: as given to `forward`.
        k: as given to `forward`.
        v: as given to `forward`.
        out: its output.
        lse: its log-sum-exp.
        lists: as given to `forward`.
        scale: as given to `forward`.

    Returns:
        Gradients of q, k and v, in their dtypes and layouts.
    """
    from .backward_kernels import key_kernel, query_kernel

    q, k, v, out, grad = (_readable(x) for x in (q, k, v, out, grad))
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    q_grad, k_grad, v_grad = (torch.empty_like(x) for x in (q, k, v))
    scales = (scale * math.log2(math.e), scale)
    tokens = _tokens(q, k, lists)

    special = block_count(q.shape[2] - lists.query_tokens, lists.block_q)
    order = work_order(lists, special)
    chosen = query_configuration(*_kind(v), lists.block_q, lists.block_k)
    _launch(
        query_kernel, chosen, order,
        q, k, v, out, grad, lse, delta, q_grad, lists.row_ptr, lists.col, order, *scales,
        *_strides(q), *_strides(k), *_strides(v), *_strides(out), *_strides(grad), *_strides(q_grad),
        lists.heads, lists.query_blocks, lists.query_blocks + special, *tokens,
        ROWS=lists.block_q, BLOCK=lists.block_k, STEP=chosen.step, WIDTH=q.shape[3], **_arithmetic(),
    )  # fmt: skip

    special = block_count(k.shape[2] - lists.key_tokens, lists.block_k)
    pointer, rows = transposed(lists)
    cost = pointer.diff().view(lists.batch, lists.heads, lists.key_blocks)
    order = order_of(cost, special, lists.query_blocks)
    chosen = key_configuration(*_kind(v), lists.block_k, lists.block_q)
    _launch(
        key_kernel, chosen, order,
        q, k, v, grad, lse, delta, k_grad, v_grad, pointer, rows, order, *scales,
        *_strides(q), *_strides(k), *_strides(v), *_strides(grad), *_strides(k_grad), *_strides(v_grad),
        lists.heads, lists.key_blocks, lists.key_blocks + special, *tokens,
        ROWS=lists.block_k, BLOCK=lists.block_q, STEP=chosen.step, WIDTH=q.shape[3], **_arithmetic(),
    )  # fmt: skip
    return q_grad, k_grad, v_grad


def _launch(kernel: Any, chosen: Configuration, order: Tensor, *arguments: Any, **constants: Any) -> None:
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(order.device) if order.is_cuda else contextlib.nullcontext():
        kernel[(order.numel(),)](
            *arguments, **constants, num_warps=chosen.warps, num_stages=chosen.stages, **chosen.options
        )


def _readable(x: Tensor) -> Tensor:
    """A tensor as the kernels read it: a token's numbers are neighbours, and a block of tokens spans under 2^31."""
    return x if x.stride(3) == 1 and x.stride(2) < 2**24 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _tokens(q: Tensor, k: Tensor, lists: BlockLists) -> tuple[int, int, int, int]:
    return lists.query_tokens, q.shape[2], lists.key_tokens, k.shape[2]


def _kind(v: Tensor) -> tuple[int, int]:
    """Compute capability and width of a head."""
    major, minor = torch.cuda.get_device_capability(v.device) if v.is_cuda else (8, 0)
    return 10 * major + minor, v.shape[3]


def _arithmetic() -> dict[str, Any]:
    # The interpreter keeps bfloat16 as 16-bit integers, and multiplies them as such.
    return {"UPCAST": is_interpreted(), "PRECISION": "ieee"}
