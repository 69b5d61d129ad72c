"""Blocks chosen by what leaving them out changes: the largest drifts, then swaps that let what is left out cancel.

Source: ReSS, arXiv 2609.35593, sec. 3; with sub-blocks, J is the sum over the query sub-blocks of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .drift import ChunkDrift, HeadValues, head_values
from .emission import write_lists
from .pooled_values import PooledValues
from .pooling import PooledTokens
from .ranking import mark_smallest
from .sub_blocks import without_autocast
from .triton_restoration import restore_by_triton, restores_by_triton

ROUNDS = 5
"""Rounds of swaps, each of half as many blocks as the one before, as published."""

ROUNDS_OF_PARTS = 3
"""The same where blocks are pooled in parts: more cost as much each and change nothing; benchmarks/RESULTS.md."""

NEVER = 1e30
"""Added to the cost of a swap that cannot be made; no cost of values of size one comes near it."""

CHUNK_ENTRIES = 2**18
"""Pairs of sub-blocks worked on at once on a CPU."""

DEVICE_CHUNK_ENTRIES = 2**23
"""The same on a device, where a chunk costs some 150 launches whatever its size; about 60 bytes each."""


def usual_rounds(pooled: PooledTokens) -> int:
    """Rounds of swaps of the selector "restore"."""
    return ROUNDS if pooled.parts == 1 else ROUNDS_OF_PARTS


@torch.no_grad()
def restored_rows(
    pooled: PooledTokens, values: PooledValues, counts: Tensor, row_ptr: Tensor, col: Tensor, *, rounds: int = ROUNDS
) -> None:
    """Write the blocks of each row that keep its output closest to that of all blocks, ascending.

    Args:
        pooled: queries and keys.
        values: of the same keys.
        counts: int64 `[B * H, T_q]`, blocks to keep, 1..T_k.
        row_ptr: int64 `[B * H * T_q + 1]`, where each row's blocks start.
        col: int32, longer than the sum of the counts; what follows them is undefined afterwards.
        rounds: of swaps; without any the blocks of the largest drifts are kept.

    Raises:
        SparsityError: the values are not those of the keys.
    """
    values.check_beside(pooled)
    if restores_by_triton(pooled, rounds):
        restore_by_triton(pooled, values, counts, row_ptr, col, rounds)
        return
    starts = row_ptr[:-1].view_as(counts)
    entries = CHUNK_ENTRIES if pooled.q.device.type == "cpu" else DEVICE_CHUNK_ENTRIES
    prepared: tuple[slice, HeadValues] | None = None
    with without_autocast(pooled.q.device):
        for heads, rows in pooled.chunks(pooled.chunk_entries or entries):
            if prepared is None or prepared[0] != heads:
                prepared = heads, head_values(pooled, values, heads)
            drift = ChunkDrift(pooled, prepared[1], heads, rows)
            keep = restore(drift, counts[heads, rows], rounds)
            write_lists(keep, starts[heads, rows], col)


def restore(drift: ChunkDrift, counts: Tensor, rounds: int) -> Tensor:
    """Start from the largest drifts and swap; the best set seen, the first of equal ones.

    Args:
        drift: of a chunk.
        counts: int64 `[h, r]`.
        rounds: of swaps.

    Returns:
        `[h, r, T_k]`, 1 for as many blocks of a row as its count, else 0.
    """
    keep = best = mark_smallest(drift.alone().neg_(), counts)
    if not rounds:
        return best
    state = drift.state(keep)
    least = drift.objective(state)
    for turn in range(rounds):
        moves = swaps(counts, keep.shape[-1], turn)
        # The marks are numbers because arithmetic with them is several times faster than with truth values.
        keep = keep + mark_smallest(drift.after(state, 1).add_(keep, alpha=NEVER), moves)
        keep -= mark_smallest(drift.after(drift.state(keep), -1).add_(1 - keep, alpha=NEVER), moves)
        state = drift.state(keep)
        reached = drift.objective(state)
        best = torch.where((reached < least).unsqueeze(-1), keep, best)
        least = torch.minimum(reached, least)
    return best


def swaps(counts: Tensor, columns: int, turn: int) -> Tensor:
    """How many blocks a round restores and drops: a quarter of what a row keeps, and half of that each round on."""
    wanted = (counts.double() * 0.5 ** (turn + 2)).round_().to(torch.int64).clamp_(min=1)
    return torch.minimum(wanted, torch.minimum(counts, columns - counts))
