"""Attention over block lists, as plain as can be: the twin that every backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from .lists import BlockLists


def token_mask(lists: BlockLists, query_tokens: int, key_tokens: int) -> Tensor:
    """Which keys each query sees: bool `[B, H, N_q, N_k]`, special tokens included.

    Args:
        lists: the kept patch blocks.
        query_tokens: all queries N_q; those past `lists.query_tokens` are special and see everything.
        key_tokens: all keys N_k; those past `lists.key_tokens` are special and seen by every query.
    """
    shape = (lists.batch, lists.heads, query_tokens, key_tokens)
    mask = torch.ones(shape, dtype=torch.bool, device=lists.device)
    patches = lists.to_mask().repeat_interleave(lists.block_q, 2).repeat_interleave(lists.block_k, 3)
    patches = patches[:, :, : lists.query_tokens, : lists.key_tokens]
    mask[:, :, : lists.query_tokens, : lists.key_tokens] = patches
    return mask


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, dtype: torch.dtype | None = None
) -> Tensor:
    """Dense attention under a mask. Costs more than dense attention; for tests and small inputs.

    Args:
        q: queries `[B, H, N_q, d]`, patch tokens first.
        k: keys `[B, H, N_k, d]`, patch tokens first.
        v: values `[B, H, N_k, d]`.
        lists: the kept patch blocks.
        scale: factor on q . k, usually d ** -0.5.
        dtype: what to compute in, for instance float64; by default float32, or float64 where v is float64.

    Returns:
        `[B, H, N_q, d]` in the dtype of v, or in `dtype` where that is given.
    """
    work = dtype or torch.promote_types(v.dtype, torch.float32)
    scores = torch.matmul(q.to(work), k.to(work).transpose(-1, -2)) * scale
    scores = scores.masked_fill(~token_mask(lists, q.shape[2], k.shape[2]), float("-inf"))
    return torch.matmul(scores.softmax(-1), v.to(work)).to(dtype or v.dtype)


def forward(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, heads: tuple[int, ...] | None = None
) -> tuple[Tensor, None]:
    """`reference_attention` as a backend; see `Backend.forward`."""
    return reference_attention(q, k, v, lists, scale), None


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lists: BlockLists, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients, by autograd."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        again = reference_attention(leaves[0], leaves[1], leaves[2], lists, scale)
    grads = torch.autograd.grad(again, leaves, grad)
    return grads[0], grads[1], grads[2]
