"""The public function: check the arguments, choose a backend, compute."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import resolve_backend
from .computing import Attention, problem_of
from .dense import dense_attention
from .lists import BlockLists
from .operator import attention_operator

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of each query over the keys that its block's list keeps, renormalised over them.

    Patch tokens come first in q, k and v and are what `lists` speaks of; every token after them is special
    (camera, registers): special queries attend to all keys, special keys are visible to all queries
    (SparseVGGT, sec. 3, made exact). Lists that keep everything go through one dense
    `scaled_dot_product_attention`.

    The contents of `lists` are trusted; call `lists.check()` once on lists made by hand.

    Args:
        q: queries `[B, H, N_q, d]`, float16, bfloat16, float32 or float64, any strides.
        k: keys `[B, H, N_k, d]`.
        v: values `[B, H, N_k, d]`. q and k are cast to its dtype where they differ, and under autocast all
            three to autocast's, as `scaled_dot_product_attention` does.
        lists: the kept patch blocks, on the same device.
        scale: factor on q . k; None is d ** -0.5.
        backend: "auto" picks the best that can run; a name from `available_backends()` runs that one or
            raises.

    Returns:
        `[B, H, N_q, d]`, differentiable in q, k and v.

    Raises:
        TypeError: an argument is not a floating tensor of a supported dtype, or `lists` is not `BlockLists`.
        ValueError: shapes, devices or token counts do not fit, or there is no such backend.
        RuntimeError: the named backend cannot run these tensors.
    """
    _check_tensors(q, k, v)
    _check_lists(q, k, lists)
    kind, dtype = v.device.type, v.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not torch.is_autocast_enabled(kind):
        return _attend(q.to(dtype), k.to(dtype), v, lists, scale, backend)
    if dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return _attend(q.to(dtype), k.to(dtype), v.to(dtype), lists, scale, backend)


def _attend(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, backend: str) -> Tensor:
    if torch.compiler.is_compiling():  # it may know the lists' length as a symbol only, and records one operator
        return attention_operator(q, k, v, lists, scale, backend)
    if lists.is_full and resolve_backend(backend, problem_of(v, lists)) != "reference":
        return dense_attention(q, k, v, scale)  # the twin is asked for by name to be independent
    attended: Tensor = Attention.apply(q, k, v, lists, scale, backend)
    return attended


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, value in (("q", q), ("k", k), ("v", v)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor [B, H, N, d]; got {type(value).__name__}.")
        if value.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {value.dtype}, cast it first.")
        if value.dim() != 4 or 0 in value.shape:
            raise ValueError(f"{name} must be [B, H, N, d], no size zero; got {list(value.shape)}.")
        if value.device != v.device:
            raise ValueError(f"q, k and v must be on one device; {name} is on {value.device}, v on {v.device}.")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape; got {list(k.shape)} and {list(v.shape)}.")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q and k must agree in items, heads and head width; got {list(q.shape)} and {list(k.shape)}. "
            "Repeat the key heads first if queries share them."
        )


def _check_lists(q: Tensor, k: Tensor, lists: BlockLists) -> None:
    if not isinstance(lists, BlockLists):
        raise TypeError(f"lists must be BlockLists; got {type(lists).__name__}. BlockLists.from_mask takes a mask.")
    if lists.device != q.device:
        raise ValueError(f"lists must be on the device of q, {q.device}; they are on {lists.device}, use lists.to().")
    if (lists.batch, lists.heads) != tuple(q.shape[:2]):
        raise ValueError(f"lists are for {lists.batch} items x {lists.heads} heads; q has {q.shape[0]} x {q.shape[1]}.")
    for name, tokens, patches in (("q", q.shape[2], lists.query_tokens), ("k", k.shape[2], lists.key_tokens)):
        if tokens < patches:
            raise ValueError(
                f"lists cover {patches} patch tokens of {name}, which has only {tokens} tokens; "
                "build the lists from the same input, patch tokens first."
            )
