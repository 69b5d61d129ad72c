"""Block-sparse attention as one operator of torch, which compilers and exporters record instead of looking into it.

Its first call by hand would load the compiler, which takes seconds: whoever does not compile never calls it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .computing import compute, gradients
from .lists import BlockLists

_NAME = "hess_plugin::block_sparse_attention"


def attention_operator(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, backend: str) -> Tensor:
    """Attention of q, k, v `[B, H, N, d]` of one dtype over block lists; the arguments are trusted."""
    sizes = [lists.batch, lists.heads, lists.query_tokens, lists.key_tokens, lists.block_q, lists.block_k]
    kept = list(lists.head_kept or ())
    out, _ = _forward(q, k, v, lists.row_ptr, lists.col, sizes, kept, lists.exact, scale, backend)
    return out


@torch.library.custom_op(_NAME, mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    sizes: Sequence[int],
    head_kept: Sequence[int],
    exact: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    out, lse = compute(q, k, v, _lists(row_ptr, col, sizes, head_kept, exact), scale, backend)
    # What a compiler plans by the fake's strides must have them.
    return _like(q, out), lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op(f"{_NAME}_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    sizes: Sequence[int],
    head_kept: Sequence[int],
    exact: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with _autograd_inside():
        lists = _lists(row_ptr, col, sizes, head_kept, exact)
        found = gradients(grad, q, k, v, out, lse, lists, scale, backend)
    return _like(q, found[0]), _like(k, found[1]), _like(v, found[2])


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, row_ptr, col, *ctx.others = inputs
    ctx.save_for_backward(q, k, v, *output, row_ptr, col)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    # The log-sum-exp is there for this alone, and its own gradient nobody's.
    return (*_backward(grad, *ctx.saved_tensors, *ctx.others), *[None] * (2 + len(ctx.others)))


torch.library.register_autograd(_NAME, _differentiate, setup_context=_save)


def _lists(row_ptr: Tensor, col: Tensor, sizes: Sequence[int], head_kept: Sequence[int], exact: bool) -> BlockLists:
    batch, heads, query_tokens, key_tokens, block_q, block_k = sizes
    kept = tuple(head_kept) or None
    return BlockLists(
        row_ptr, col, batch, heads, query_tokens, key_tokens, block_q, block_k, head_kept=kept, exact=exact
    )


def _like(model: Tensor, given: Tensor) -> Tensor:
    """A tensor of its own with the strides that ``torch.empty_like(model)`` has."""
    strides = torch.empty_like(model, device="meta").stride()
    return given if given.stride() == strides else torch.empty_like(model).copy_(given)


@contextlib.contextmanager
def _autograd_inside() -> Iterator[None]:
    """Let autograd record inside an operator, where torch keeps it out; backends differentiate dense parts by it."""
    key = torch._C.DispatchKey.AutogradFunctionality
    before = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, before)
