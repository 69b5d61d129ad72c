"""Block maps: how much attention each query block pays to each key block, estimated from pooled tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_patches
from .triton_trial import uses_triton


@torch.no_grad()
def pool_tokens(x: Tensor, block: int) -> Tensor:
    """Average runs of `block` tokens, the last maybe shorter: `[B, H, N, d]` -> float32 `[B, H, T, d]`, no graph."""
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        # One head at a time through one buffer, which stays in the cache: many times faster than torch's own mean of a
        # low-precision tensor.
        head = torch.empty(x.shape[2:], dtype=torch.float32)
        pooled = [_pool_float(head.copy_(x[i, j]), block) for i in range(x.shape[0]) for j in range(x.shape[1])]
        return torch.stack(pooled).unflatten(0, x.shape[:2])
    return _pool_float(x, block)


def _pool_float(x: Tensor, block: int) -> Tensor:
    """The same for `[..., N, d]`, summed in float32."""
    whole = x.shape[-2] // block
    parts = []
    if whole:
        blocks = x[..., : whole * block, :].unflatten(-2, (whole, block))
        parts.append(blocks.mean(-2, dtype=torch.float32))
    if whole * block < x.shape[-2]:
        parts.append(x[..., whole * block :, :].mean(-2, keepdim=True, dtype=torch.float32))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


@dataclass(frozen=True, eq=False)
class PooledTokens:
    """Pooled queries and keys, from which any part of the block map can be had without the whole of it.

    Attributes:
        q: pooled patch queries, float32 `[B * H, T_q, d]`, times the scale of the attention.
        k: pooled patch keys, float32 `[B * H, T_k, d]`.
        batch: items B.
        heads: heads H.
        query_tokens: patch queries that were pooled.
        key_tokens: patch keys that were pooled.
        block_q: queries of a block.
        block_k: keys of a block.
        chunk_entries: entries of the block map to hold at once; None leaves it to whoever ranks them.
    """

    q: Tensor
    k: Tensor
    batch: int
    heads: int
    query_tokens: int
    key_tokens: int
    block_q: int
    block_k: int
    chunk_entries: int | None = None

    @property
    def rows(self) -> int:
        """Query blocks T_q of a head."""
        return self.q.shape[1]

    @property
    def columns(self) -> int:
        """Key blocks T_k of a head."""
        return self.k.shape[1]

    def chunks(self, entries: int) -> Iterator[tuple[slice, slice]]:
        """Yield `(heads, rows)`, slices of B * H and T_q that tile the block map in chunks of so many entries.

        Several small heads come at once; a larger head comes in runs of rows, of one row at least.
        """
        size = self.rows * self.columns
        if size <= entries:
            step = max(1, entries // size)
            for start in range(0, self.q.shape[0], step):
                yield slice(start, start + step), slice(0, self.rows)
            return
        step = max(1, entries // self.columns)
        for head in range(self.q.shape[0]):
            for start in range(0, self.rows, step):
                yield slice(head, head + 1), slice(start, start + step)

    def scores(self, heads: slice, rows: slice) -> Tensor:
        """Part of the block map before the softmax: float32 `[h, r, T_k]`, with -inf for NaN, which has no order."""
        q, k = self.q[heads, rows], self.k[heads].mT
        with torch.autocast(q.device.type, enabled=False):
            # On a GPU a float32 product may be one of TF32, which is the user's choice for the model and not for this.
            scores = torch.bmm(q.double(), k.double()).float() if q.is_cuda else torch.bmm(q, k)
        return scores.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


@torch.no_grad()
def pool(
    q: Tensor,
    k: Tensor,
    block_q: int,
    block_k: int,
    *,
    scale: float | None = None,
    chunk_entries: int | None = None,
) -> PooledTokens:
    """Pool patch queries and keys `[B, H, N, d]` (after the layer's own norm and RoPE) by blocks.

    No gradient flows: which blocks are kept is a constant of the computation.

    Args:
        q: patch queries.
        k: patch keys.
        block_q: queries of a block.
        block_k: keys of a block.
        scale: factor on q . k; None is d ** -0.5.
        chunk_entries: entries of the block map to hold at once; None is what suits the device.

    Raises:
        SparsityError: the shapes do not fit, or a block is below one token.
    """
    check_patches(q, k, block_q, block_k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    pooled_q, pooled_k = _pool_heads(q, block_q, scale), _pool_heads(k, block_k, 1.0)
    batch, heads, query_tokens, _ = q.shape
    return PooledTokens(pooled_q, pooled_k, batch, heads, query_tokens, k.shape[2], block_q, block_k, chunk_entries)


def _pool_heads(x: Tensor, block: int, scale: float) -> Tensor:
    """`pool_tokens` times a factor, `[B * H, T, d]`."""
    if uses_triton(x.device):
        from hess_plugin_cuda.triton_selection import launch

        return launch.pool(x, block, scale)
    pooled = pool_tokens(x, block).flatten(0, 1)
    return pooled if scale == 1.0 else pooled * scale


def block_map(q: Tensor, k: Tensor, block_q: int, block_k: int, *, scale: float | None = None) -> Tensor:
    """The whole block map: softmax over key blocks of pooled q . pooled k (SparseVGGT, sec. 3).

    For small inputs, tests and plots: at 1000 views the map of one layer has 3.7e9 entries. `select` and
    `streamed_uniform_counts` never hold it.

    Args:
        q: patch queries `[B, H, N_q, d]`.
        k: patch keys `[B, H, N_k, d]`.
        block_q: queries of a block.
        block_k: keys of a block.
        scale: factor on q . k; None is d ** -0.5.

    Returns:
        float32 `[B, H, T_q, T_k]`, rows summing to 1. A NaN score has probability 0; a row with nothing but NaN, or
        with an infinite score, is all zeros.
    """
    pooled = pool(q, k, block_q, block_k, scale=scale)
    scores = pooled.scores(slice(None), slice(None))
    return scores.softmax(-1).nan_to_num_(0.0).unflatten(0, (pooled.batch, pooled.heads))
