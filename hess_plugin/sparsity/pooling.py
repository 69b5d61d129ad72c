"""Block maps: how much attention each query block pays to each key block, estimated from pooled tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_parts, check_patches, check_special
from .sub_blocks import block_scores, without_autocast
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
        q: pooled patch queries, float32 `[B * H, T_q * A, d]`, times the scale of the attention; the A sub-blocks of a
            block lie side by side, and those of the ragged last block that have no tokens are zeros.
        k: pooled patch keys, float32 `[B * H, T_k * F, d]`, likewise.
        batch: items B.
        heads: heads H.
        query_tokens: patch queries that were pooled.
        key_tokens: patch keys that were pooled.
        block_q: queries of a block.
        block_k: keys of a block.
        chunk_entries: entries of the map of sub-blocks to hold at once; None leaves it to whoever ranks them.
        pool_q: queries pooled together, a divisor of block_q; 0 stands for block_q.
        pool_k: keys pooled together, a divisor of block_k; 0 stands for block_k.
        special_k: special keys, float32 `[B * H, S, d]`, which take their share of the probability of sub-blocks. None
            for whole blocks, whose order they do not change.
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
    pool_q: int = 0
    pool_k: int = 0
    special_k: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool_q", self.pool_q or self.block_q)
        object.__setattr__(self, "pool_k", self.pool_k or self.block_k)

    @property
    def parts_q(self) -> int:
        """Sub-blocks A of a query block."""
        return self.block_q // self.pool_q

    @property
    def parts_k(self) -> int:
        """Sub-blocks F of a key block."""
        return self.block_k // self.pool_k

    @property
    def parts(self) -> int:
        """Pairs of sub-blocks of a pair of blocks; 1 for whole blocks."""
        return self.parts_q * self.parts_k

    @property
    def rows(self) -> int:
        """Query blocks T_q of a head."""
        return self.q.shape[1] // self.parts_q

    @property
    def columns(self) -> int:
        """Key blocks T_k of a head."""
        return self.k.shape[1] // self.parts_k

    @property
    def entries(self) -> int:
        """Pairs of sub-blocks of all heads."""
        return self.q.shape[0] * self.q.shape[1] * self.k.shape[1]

    def chunks(self, entries: int) -> Iterator[tuple[slice, slice]]:
        """Yield `(heads, rows)`, slices of B * H and T_q that tile the map in chunks of so many pairs of sub-blocks.

        Several small heads come at once; a larger head comes in runs of rows, of one row at least.
        """
        size = self.q.shape[1] * self.k.shape[1]
        if size <= entries:
            step = max(1, entries // size)
            for start in range(0, self.q.shape[0], step):
                yield slice(start, start + step), slice(0, self.rows)
            return
        step = max(1, entries // (self.columns * self.parts))
        for head in range(self.q.shape[0]):
            for start in range(0, self.rows, step):
                yield slice(head, head + 1), slice(start, start + step)

    def scores(self, heads: slice, rows: slice) -> Tensor:
        """Part of the block map before the softmax: float32 `[h, r, T_k]`, with -inf for NaN, which has no order.

        With sub-blocks these are logarithms of probabilities, which may sum to less than 1: special keys have the rest.
        """
        if self.parts > 1:
            return block_scores(self, heads, rows)
        q, k = self.q[heads, rows], self.k[heads].mT
        with without_autocast(q.device):
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
    pool_q: int | None = None,
    pool_k: int | None = None,
    special: Tensor | None = None,
) -> PooledTokens:
    """Pool patch queries and keys `[B, H, N, d]` (after the layer's own norm and RoPE) by blocks or parts of blocks.

    No gradient flows: which blocks are kept is a constant of the computation.

    Args:
        q: patch queries.
        k: patch keys.
        block_q: queries of a block.
        block_k: keys of a block.
        scale: factor on q . k; None is d ** -0.5.
        chunk_entries: entries of the map of sub-blocks to hold at once; None is what suits the device.
        pool_q: queries to pool together, a divisor of block_q; None is block_q.
        pool_k: keys to pool together, a divisor of block_k; None is block_k.
        special: special keys `[B, H, S, d]`, which the map of sub-blocks counts in.

    Raises:
        SparsityError: the shapes do not fit, a block is below one token, or sub-blocks do not divide it.
    """
    check_patches(q, k, block_q, block_k)
    pool_q, pool_k = block_q if pool_q is None else pool_q, block_k if pool_k is None else pool_k
    check_parts(block_q, block_k, pool_q, pool_k)
    check_special(k, special)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    pooled_q, pooled_k = pool_heads(q, block_q, pool_q, scale), pool_heads(k, block_k, pool_k)
    exact = None
    if special is not None and (pool_q, pool_k) != (block_q, block_k):
        exact = special.flatten(0, 1).float()
    batch, heads, query_tokens, _ = q.shape
    return PooledTokens(
        pooled_q, pooled_k, batch, heads, query_tokens, k.shape[2], block_q, block_k, chunk_entries, pool_q, pool_k,
        exact,
    )  # fmt: skip


def pool_heads(x: Tensor, block: int, part: int, scale: float = 1.0) -> Tensor:
    """Average runs of `part` tokens, times a factor: `[B * H, T * block / part, d]`; zeros where there are none."""
    if uses_triton(x.device):
        from hess_plugin_cuda.triton_selection import launch

        pooled = launch.pool(x, part, scale)
    else:
        pooled = pool_tokens(x, part).flatten(0, 1)
        pooled = pooled if scale == 1.0 else pooled * scale
    missing = -(-x.shape[2] // block) * (block // part) - pooled.shape[1]
    return torch.nn.functional.pad(pooled, (0, 0, 0, missing)) if missing else pooled


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
