"""The uniform rule of SparseVGGT: how many key blocks each query block keeps, from its own block map row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import check_rule
from .pooling import PooledTokens, pool
from .ranking import covering_counts
from .rows import rows_of

CDF_SLACK = 1e-5


def ratio_count(columns: int, sparse_ratio: float) -> int:
    """floor(columns * (1 - sparse_ratio)), as it is meant in decimals.

    A product within 1e-6 below a whole number counts as that number: 10 * (1 - 0.9) is 0.9999999999999998 in
    floating point and keeps 1 block of 10, not 0.
    """
    return math.floor(columns * (1.0 - sparse_ratio) + 1e-6)


def uniform_counts(
    block_map: Tensor, sparse_ratio: float | None = None, cdf_threshold: float | None = None, minimum: int = 2
) -> Tensor:
    """Kept key blocks of each row by the uniform rule (SparseVGGT, sec. 3).

    The larger of two counts, either of which may be left out: the leading blocks, most probable first, whose
    cumulative probability stays <= cdf_threshold + 1e-5, and floor(T_k * (1 - sparse_ratio)). Never below
    min(minimum, T_k).

    Args:
        block_map: probabilities `[..., T_q, T_k]`.
        sparse_ratio: rho, the dropped share of blocks in 0..1, or None.
        cdf_threshold: tau, the probability to cover in 0..1, or None.
        minimum: floor of a row.

    Returns:
        int64 `[..., T_q]`.

    Raises:
        SparsityError: both rules are None, or a number is out of range.
    """
    check_rule(sparse_ratio, cdf_threshold, minimum)
    columns = block_map.shape[-1]
    least = _least(columns, sparse_ratio, minimum)
    if cdf_threshold is None:
        return torch.full(block_map.shape[:-1], least, dtype=torch.int64, device=block_map.device)
    return covering_counts(block_map, cdf_threshold + CDF_SLACK, least)


def streamed_uniform_counts(
    q: Tensor,
    k: Tensor,
    sparse_ratio: float | None = None,
    cdf_threshold: float | None = None,
    minimum: int = 2,
    *,
    block_q: int,
    block_k: int,
    scale: float | None = None,
) -> Tensor:
    """`uniform_counts` of patch q, k `[B, H, N, d]` without ever holding the block map of all heads.

    On a GPU the probabilities are added in float32 and without sorting: where a cumulative probability is within 2e-6
    of the threshold, a row may count a block more or less than on the CPU.

    Returns:
        int64 `[B, H, T_q]`. Waits for no device.

    Raises:
        SparsityError: the shapes do not fit, both rules are None, or a number is out of range.
    """
    check_rule(sparse_ratio, cdf_threshold, minimum)
    return pooled_uniform_counts(pool(q, k, block_q, block_k, scale=scale), sparse_ratio, cdf_threshold, minimum)


@torch.no_grad()
def pooled_uniform_counts(
    pooled: PooledTokens,
    sparse_ratio: float | None = None,
    cdf_threshold: float | None = None,
    minimum: int = 2,
) -> Tensor:
    """`streamed_uniform_counts` of tokens that are pooled already."""
    check_rule(sparse_ratio, cdf_threshold, minimum)
    least = _least(pooled.columns, sparse_ratio, minimum)
    if cdf_threshold is None:
        counts = torch.full((pooled.q.shape[0], pooled.rows), least, dtype=torch.int64, device=pooled.q.device)
    else:
        counts = rows_of(pooled).uniform_counts(cdf_threshold + CDF_SLACK, least)
    return counts.view(pooled.batch, pooled.heads, pooled.rows)


def _least(columns: int, sparse_ratio: float | None, minimum: int) -> int:
    """What a row keeps whatever its probabilities."""
    least = 0 if sparse_ratio is None else ratio_count(columns, sparse_ratio)
    return min(max(least, minimum), columns)
