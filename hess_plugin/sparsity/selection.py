"""Selectors: which blocks fill a budget, streamed so that no block map is ever held whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hess_plugin_cuda import BlockLists

from .checks import SparsityError
from .pooling import PooledTokens, pool
from .ranking import keep_largest, sort_rows
from .rows import rows_of

Selector = Callable[..., BlockLists]

UNKNOWN_LIMIT = 2**30
"""Bytes that lists of unknown length may take on a GPU to have room for every pair; beyond it the host waits for their
length."""


def select(
    q: Tensor,
    k: Tensor,
    *,
    block_q: int,
    block_k: int,
    counts: Tensor | None = None,
    budgets: Tensor | None = None,
    scale: float | None = None,
    selector: str = "mass",
    head_totals: Sequence[int] | None = None,
) -> BlockLists:
    """Choose the key blocks that each query block keeps.

    Scores are float32, of which NaN counts as -inf and -0.0 as 0.0; of equal scores the lower block comes first. The
    same scores give the same lists on every device, to the bit; only the gain by which `budgets` are spread is rounded
    as the device adds.

    The block map is only ever held in bounded chunks; what stays is the lists, four bytes for each kept pair.

    Args:
        q: patch queries `[B, H, N_q, d]`, after norm and RoPE.
        k: patch keys `[B, H, N_k, d]`.
        block_q: queries of a block.
        block_k: keys of a block.
        counts: int64 `[B, H, T_q]`, blocks each row keeps (1..T_k). Either these or `budgets`.
        budgets: int64 `[B, H]`, pairs each head keeps (T_q..T_q * T_k), spread evenly over its rows, the
            remainder to the rows whose next block is the most probable.
        scale: factor on q . k; None is d ** -0.5.
        selector: a name in `SELECTORS`. "mass" takes the most probable blocks of the block map.
        head_totals: pairs that each head keeps, `[H]`, the same for every item, if the host knows them, as it does
            for a fixed sparsity. Trusted on a GPU, where they decide what is allocated.

    Returns:
        Lists on the device of q, ascending in each row. Without totals a GPU's lists are not `exact`: they have room
        for every pair. Where that would take more than `UNKNOWN_LIMIT`, and on the CPU, their length is read back
        instead, the one wait for a GPU.

    Raises:
        SparsityError: shapes do not fit, neither or both of counts and budgets are given, the totals are not
            theirs, or there is no such selector.
    """
    if selector not in SELECTORS:
        raise SparsityError(f"There is no selector {selector!r}; choose one of {', '.join(SELECTORS)}.")
    pooled = pool(q, k, block_q, block_k, scale=scale)
    return SELECTORS[selector](pooled, counts=counts, budgets=budgets, head_totals=head_totals)


@torch.no_grad()
def select_mass(
    pooled: PooledTokens,
    *,
    counts: Tensor | None = None,
    budgets: Tensor | None = None,
    head_totals: Sequence[int] | None = None,
) -> BlockLists:
    """The selector "mass": the most probable blocks of each row; see `select`."""
    _check_amounts(pooled, counts, budgets)
    _check_totals(pooled, head_totals)
    rows = rows_of(pooled)
    if counts is not None:
        counts = counts.reshape(-1, pooled.rows).clamp(1, pooled.columns)
    else:
        assert budgets is not None  # one of the two was given
        counts = rows.spread(budgets.flatten())
    row_ptr = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts.flatten(), 0, out=row_ptr[1:])
    length, exact = _length(pooled, row_ptr, head_totals)
    col = torch.empty(length + 1, dtype=torch.int32, device=counts.device)
    rows.fill(counts, row_ptr, col)
    return BlockLists(
        row_ptr,
        col[:length],
        pooled.batch,
        pooled.heads,
        pooled.query_tokens,
        pooled.key_tokens,
        pooled.block_q,
        pooled.block_k,
        head_kept=None if head_totals is None else tuple(head_totals),
        exact=exact,
    )


def select_from_map(block_map: Tensor, counts: Tensor) -> Tensor:
    """The most probable blocks of each row of a whole block map, ties to the lower block.

    Args:
        block_map: `[..., T_q, T_k]`.
        counts: int64 `[..., T_q]`, 1..T_k.

    Returns:
        bool `[..., T_q, T_k]`.
    """
    return keep_largest(block_map, sort_rows(block_map), counts)


SELECTORS: dict[str, Selector] = {"mass": select_mass}
"""Rules that fill a budget: `(pooled, *, counts, budgets, head_totals) -> BlockLists`."""


def _length(pooled: PooledTokens, row_ptr: Tensor, head_totals: Sequence[int] | None) -> tuple[int, bool]:
    """Length of the lists, and whether that is exact or what they are at most."""
    total = None if head_totals is None else pooled.batch * sum(head_totals)
    if row_ptr.device.type == "cpu":
        kept = int(row_ptr[-1])
        if total is not None and total != kept:
            raise SparsityError(f"The heads keep {kept} pairs in all; the totals say {total}.")
        return kept, True
    if total is not None:
        return total, True
    most = (row_ptr.numel() - 1) * pooled.columns
    return (most, False) if most * torch.int32.itemsize <= UNKNOWN_LIMIT else (int(row_ptr[-1]), True)


def _check_totals(pooled: PooledTokens, head_totals: Sequence[int] | None) -> None:
    if head_totals is not None and len(head_totals) != pooled.heads:
        raise SparsityError(f"head_totals must be those of {pooled.heads} heads; got {len(head_totals)}.")


def _check_amounts(pooled: PooledTokens, counts: Tensor | None, budgets: Tensor | None) -> None:
    if (counts is None) == (budgets is None):
        raise SparsityError("select needs either counts [B, H, T_q] or budgets [B, H]; got both or neither.")
    name, given = ("counts", counts) if counts is not None else ("budgets", budgets)
    assert given is not None
    wanted = (pooled.batch, pooled.heads, pooled.rows)[: 3 if name == "counts" else 2]
    if tuple(given.shape) != wanted or given.dtype != torch.int64:
        raise SparsityError(f"{name} must be int64 {list(wanted)}; got {given.dtype} {list(given.shape)}.")
    if given.device != pooled.q.device:
        raise SparsityError(f"{name} must be on the device of q, {pooled.q.device}; they are on {given.device}.")
