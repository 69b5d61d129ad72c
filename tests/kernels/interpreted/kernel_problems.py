"""Random problems for the checks of Triton kernels, and what results of any kernel are held to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from hess_plugin_cuda import BlockLists, block_count, reference_attention, token_mask


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem; special tokens come on top of the patch tokens."""

    batch: int
    heads: int
    query_patches: int
    key_patches: int
    special_queries: int
    special_keys: int
    block_q: int
    block_k: int
    width: int


def make_lists(shape: Shape, device: torch.device, seed: int = 0) -> BlockLists:
    """Lists of every kind: a full head, a head with one block in each row, others with a fullness of their own."""
    generator = torch.Generator().manual_seed(seed)
    blocks = (block_count(shape.query_patches, shape.block_q), block_count(shape.key_patches, shape.block_k))
    fullness = torch.rand(shape.batch, shape.heads, 1, 1, generator=generator)
    mask = torch.rand(shape.batch, shape.heads, *blocks, generator=generator) < fullness
    mask[:, shape.heads // 2] = False
    mask.scatter_(-1, torch.randint(blocks[1], (*mask.shape[:-1], 1), generator=generator), True)
    mask[:, shape.heads - 1 if shape.heads > 2 else shape.heads :] = True
    sizes = (shape.query_patches, shape.key_patches, shape.block_q, shape.block_k)
    return BlockLists.from_mask(mask, *sizes).to(device).check()


def make_tokens(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a problem; scores of a standard deviation of about two."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = shape.query_patches + shape.special_queries, shape.key_patches + shape.special_keys
    q, k, v = (
        torch.randn(shape.batch, shape.heads, tokens, shape.width, generator=generator, dtype=torch.float64)
        for tokens in (queries, keys, keys)
    )
    return (q * 2).to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def far_apart(x: Tensor, gap: int) -> Tensor:
    """The same numbers `[B, H, N, d]`, with `gap` numbers from one token to the next, of which few are ever touched."""
    size = x.shape[2] * gap
    assert x.shape[0] * x.shape[1] * x.shape[3] <= gap
    if x.is_cuda:
        room = torch.zeros(size, dtype=x.dtype, device=x.device)
    else:  # numpy leaves the memory alone: pages that nobody touches do not exist
        room = torch.from_numpy(numpy.empty(size, numpy.int16)).view(x.dtype)
    strides = (x.shape[1] * x.shape[3], x.shape[3], gap, 1)
    return room.as_strided(x.shape, strides).copy_(x)


def dense_masked(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float | None = None) -> Tensor:
    """Plain torch on the same masked problem, in the dtype of v."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=token_mask(lists, q.shape[2], k.shape[2]), scale=scale)


def exact_output(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float) -> Tensor:
    """The reference in float64."""
    return reference_attention(q, k, v, lists, scale, dtype=torch.float64)


def exact_logsumexp(q: Tensor, k: Tensor, lists: BlockLists, scale: float) -> Tensor:
    """Natural logarithm of the sum of exp(scale * q . k) over the keys that a query sees, in float64."""
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    return scores.masked_fill(~token_mask(lists, q.shape[2], k.shape[2]), float("-inf")).logsumexp(-1)


def assert_as_exact_as_torch(given: Tensor, plain: Tensor, exact: Tensor, more: float = 0.0) -> None:
    """Error against float64 at most twice that of plain torch in the same dtype, plus one rounded addition.

    `more` is allowed on top.
    """
    assert given.dtype == plain.dtype
    error = (given.double() - exact).abs().max()
    allowed = 2 * (plain.double() - exact).abs().max() + torch.finfo(given.dtype).eps * exact.abs().max() + more
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"
