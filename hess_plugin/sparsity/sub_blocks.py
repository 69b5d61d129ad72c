"""Parts of blocks: what the pooled queries and keys of sub-blocks weigh, and their scores in one order for all.

A row of the block map has A sub-blocks of queries and a column F sub-blocks of keys; both are 1 for whole blocks. In
chunks of the map queries run sub-block by sub-block (first sub-blocks of all rows, then the second ones), and so do
keys: sums over the parts of a block then add whole rows of numbers.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .pooling import PooledTokens


def part_sizes(tokens: int, part: int, parts: int, device: torch.device) -> Tensor:
    """Tokens of each of so many sub-blocks of `part` tokens: int64 `[parts]`; the last ones may be short or empty."""
    starts = torch.arange(parts, device=device) * part
    return (tokens - starts).clamp_(0, part)


def exact_dtype(x: Tensor) -> torch.dtype:
    """What to multiply in: on a GPU a float32 product may be one of TF32, the user's choice for the model alone."""
    return torch.float64 if x.is_cuda else x.dtype


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Products in the dtype of their factors, whatever the caller has set."""
    if not torch.amp.is_autocast_available(device.type):  # as on the meta device, which refuses to be asked
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def query_parts(pooled: PooledTokens, heads: slice, rows: slice) -> Tensor:
    """Pooled queries of some rows, `[h, A * r, d]`."""
    parts = pooled.q[heads].unflatten(1, (pooled.rows, pooled.parts_q))[:, rows]
    return parts.transpose(1, 2).flatten(1, 2).to(exact_dtype(pooled.q))


def query_weights(pooled: PooledTokens, rows: slice) -> Tensor:
    """Share of a whole block's tokens that each sub-block of queries has, `[A * r, 1]`."""
    sizes = part_sizes(pooled.query_tokens, pooled.pool_q, pooled.rows * pooled.parts_q, pooled.q.device)
    weights = sizes.to(exact_dtype(pooled.q)) / pooled.block_q
    return weights.view(pooled.rows, pooled.parts_q)[rows].T.reshape(-1, 1)


def by_part(x: Tensor, parts: int) -> Tensor:
    """`[h, T * F, d]`, the parts of a block side by side, as `[h, F * T, d]`, the first parts of all blocks first."""
    return x if parts == 1 else x.unflatten(1, (-1, parts)).transpose(1, 2).flatten(1, 2)


def key_parts(pooled: PooledTokens, heads: slice, special_k: Tensor | None) -> tuple[Tensor, Tensor]:
    """Pooled keys of some heads and the special keys after them, and what is added to their scores.

    A pooled key stands for its tokens: the logarithm of their number is added, which is -inf where there is none.

    Args:
        pooled: of all heads.
        heads: slice of B * H.
        special_k: `[B * H, S, d]` or None.

    Returns:
        `[h, F * T_k + S, d]` and `[F * T_k + S]`.
    """
    dtype = exact_dtype(pooled.q)
    sizes = part_sizes(pooled.key_tokens, pooled.pool_k, pooled.columns * pooled.parts_k, pooled.k.device)
    bias = sizes.to(dtype).log_().view(-1, pooled.parts_k).T.flatten()
    keys = by_part(pooled.k[heads], pooled.parts_k).to(dtype)
    if special_k is not None:
        keys = torch.cat([keys, special_k[heads].to(dtype)], 1)
        bias = torch.nn.functional.pad(bias, (0, special_k.shape[1]))
    return keys, bias


def part_scores(queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """Scores of sub-blocks before the softmax, `[h, A * r, F * T_k + S]`: NaN as -inf, and no inf."""
    with without_autocast(queries.device):
        scores = torch.baddbmm(bias, queries, keys.mT)
    largest = torch.finfo(scores.dtype).max
    return scores.nan_to_num_(nan=-torch.inf, posinf=largest, neginf=-torch.inf)


def probabilities(scores: Tensor) -> Tensor:
    """Softmax of `part_scores`. A row without any finite score has no probabilities: they are zeros."""
    return scores.softmax(-1).nan_to_num_(0.0)


def block_scores(pooled: PooledTokens, heads: slice, rows: slice) -> Tensor:
    """Logarithm of the mean over a row's queries of each block's probability, `[h, r, T_k]`; -inf where there is none.

    The probabilities of the sub-blocks of a block are added; special keys have the rest.
    """
    scores = part_scores(query_parts(pooled, heads, rows), *key_parts(pooled, heads, pooled.special_k))
    p = probabilities(scores)[..., : pooled.k.shape[1]]
    blocks = functools.reduce(torch.add, p.unflatten(-1, (pooled.parts_k, pooled.columns)).unbind(-2))
    blocks = blocks.unflatten(1, (pooled.parts_q, -1))
    weights = query_weights(pooled, rows).view(pooled.parts_q, -1, 1)
    mean = (blocks * (weights / weights.sum(0))).sum(1)
    return mean.log_().to(pooled.q.dtype)
