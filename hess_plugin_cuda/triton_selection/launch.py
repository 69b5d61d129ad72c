"""Starts the kernels: what each one needs, on plain tensors. Nothing here waits for the device."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .counts import count_kernel
from .emission import choose_kernel, emit_kernel
from .scores import pool_kernel, score_kernel
from .shapes import emission_shape, power_of_two, row_shape, row_stride
from .thresholds import spread_kernel, threshold_kernel

SCORE_TILE = {"ROWS": 64, "COLUMNS": 128, "DEPTH": 16}
SCORE_WARPS = 4
SCORE_STAGES = 3


@dataclass(frozen=True)
class Thresholds:
    """What separates the kept scores of each row from the rest, in the order of `keys_of`.

    A row keeps the columns of larger keys, and those of this key up to the cut.

    Attributes:
        keys: int32 `[rows]`.
        cuts: int32 `[rows]`.
        gains: float32 `[rows]`, log-probability of the last that is kept, or -inf where there is none.
    """

    keys: Tensor
    cuts: Tensor
    gains: Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> Thresholds:
        """Room for so many rows."""
        keys, cuts = torch.empty(2, rows, dtype=torch.int32, device=device)
        return cls(keys, cuts, torch.empty(rows, dtype=torch.float32, device=device))


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
    """Start a kernel on the device of its tensors, which need not be the current one."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **options)


def pool(x: Tensor, block: int, scale: float = 1.0) -> Tensor:
    """Average runs of `block` tokens, the last maybe shorter, times a factor.

    Args:
        x: floating `[B, H, N, d]`, any strides.
        block: tokens of a block.
        scale: the factor.

    Returns:
        float32 `[B * H, T, d]`.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, tokens, width = x.shape
    blocks = -(-tokens // block)
    out = torch.empty(batch * heads, blocks, width, dtype=torch.float32, device=x.device)
    grid = (blocks, batch * heads)
    strides = x.stride()[:3]
    options = pool_options(block, width)
    launch(pool_kernel, grid, x.device, x, out, *strides, heads, tokens, blocks, float(scale), **options)
    return out


def pool_options(block: int, width: int) -> dict[str, int]:
    """Constants of `pool_kernel`, and its warps."""
    sizes = {"BLOCK": block, "WIDTH": width, "PADDED": power_of_two(width), "STEP": min(32, power_of_two(block))}
    return {**sizes, "num_warps": 4}


def score(q: Tensor, k: Tensor) -> Tensor:
    """Scores of some pooled queries with all keys of their heads.

    Args:
        q: float32 `[h, r, d]`, contiguous within a head.
        k: float32 `[h, T_k, d]`, contiguous within a head.

    Returns:
        float32 `[h * r, stride]`, of which the first T_k columns count.
    """
    heads, rows, width = q.shape
    columns = k.shape[1]
    stride = row_stride(columns)
    scores = torch.empty(heads * rows, stride, dtype=torch.float32, device=q.device)
    grid = (-(-stride // SCORE_TILE["COLUMNS"]), -(-rows // SCORE_TILE["ROWS"]), heads)
    launch(
        score_kernel, grid, q.device, q, k, scores, q.stride(0), k.stride(0), rows, columns, stride, WIDTH=width,
        **SCORE_TILE, num_warps=SCORE_WARPS, num_stages=SCORE_STAGES,
    )  # fmt: skip
    return scores


def find_thresholds(scores: Tensor, columns: int, first: int, budgets: Tensor, rows: int, found: Thresholds) -> None:
    """Separate one block more than the even share of its head's budget from the rest of each row.

    Args:
        scores: of `score`.
        columns: T_k.
        first: number of the first of these rows among those of all heads.
        budgets: int64 `[B * H]`.
        rows: T_q, rows of a head.
        found: filled for these rows.
    """
    shape = row_shape(columns)
    launch(
        threshold_kernel, (scores.shape[0],), scores.device, scores, budgets, found.keys, found.cuts, found.gains,
        first, columns, scores.stride(0), rows, SIZE=shape.size, WHOLE=shape.whole, TILE=shape.tile,
        **shape.options,
    )  # fmt: skip


def spread(budgets: Tensor, columns: int, rows: int, found: Thresholds) -> Tensor:
    """Divide each head's budget over its rows by what they gain, and cut them accordingly.

    Args:
        budgets: int64 `[B * H]`.
        columns: T_k.
        rows: T_q.
        found: of `find_thresholds` for all rows; its cuts are moved to the counts.

    Returns:
        int64 `[B * H, T_q]`.
    """
    heads, shape = budgets.numel(), row_shape(rows)
    counts = torch.empty(heads, rows, dtype=torch.int64, device=budgets.device)
    launch(
        spread_kernel, (heads,), budgets.device, found.gains, budgets, found.cuts, counts, columns, rows,
        SIZE=shape.size, WHOLE=shape.whole, TILE=shape.tile, **shape.options,
    )  # fmt: skip
    return counts


def emit(scores: Tensor, columns: int, first: int, found: Thresholds, row_ptr: Tensor, col: Tensor) -> None:
    """Write the lists of rows whose thresholds are known.

    Args:
        scores: of `score`.
        columns: T_k.
        first: number of the first of these rows among those of all heads.
        found: of all rows.
        row_ptr: int64 `[all rows + 1]`, where each list starts; its length must be what the threshold keeps.
        col: int32, filled for these rows.
    """
    shape = emission_shape(columns)
    launch(
        emit_kernel, (scores.shape[0],), scores.device, scores, found.keys, found.cuts, row_ptr, col, first, columns,
        scores.stride(0), TILE=shape.tile, **shape.options,
    )  # fmt: skip


def choose(scores: Tensor, columns: int, first: int, row_ptr: Tensor, col: Tensor) -> None:
    """Write the lists of rows whose lengths are known.

    Args:
        scores: of `score`.
        columns: T_k.
        first: number of the first of these rows among those of all heads.
        row_ptr: int64 `[all rows + 1]`, where each list starts; 1..T_k blocks a row.
        col: int32, filled for these rows.
    """
    shape = row_shape(columns)
    launch(
        choose_kernel, (scores.shape[0],), scores.device, scores, row_ptr, col, first, columns, scores.stride(0),
        SIZE=shape.size, WHOLE=shape.whole, TILE=shape.tile, **shape.options,
    )  # fmt: skip


def count(scores: Tensor, columns: int, first: int, counts: Tensor, share: float, least: int) -> None:
    """Count the leading blocks of each row whose cumulative probability stays within a share.

    Args:
        scores: of `score`.
        columns: T_k.
        first: number of the first of these rows among those of all heads.
        counts: int64 `[all rows]`, filled for these rows.
        share: of the probability.
        least: what a row keeps at least.
    """
    shape = row_shape(columns)
    launch(
        count_kernel, (scores.shape[0],), scores.device, scores, counts, first, columns, scores.stride(0), share,
        least, SIZE=shape.size, WHOLE=shape.whole, TILE=shape.tile, **shape.options,
    )  # fmt: skip
