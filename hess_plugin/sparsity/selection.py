"""Selectors: which blocks fill a budget, streamed so that no block map is ever held whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hess_plugin_cuda import BlockLists

from .checks import SparsityError
from .pooled_values import PooledValues, pool_values
from .pooling import PooledTokens, pool
from .ranking import keep_largest, sort_rows
from .restoration import restored_rows, usual_rounds
from .rows import MapRows, rows_of

Selector = Callable[..., BlockLists]
Values = Callable[[], PooledValues]

UNKNOWN_LIMIT = 2**30
"""Bytes that lists of unknown length may take on a GPU to have room for every pair; beyond it the host waits for their
length."""


def select(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    block_q: int,
    block_k: int,
    counts: Tensor | None = None,
    budgets: Tensor | None = None,
    scale: float | None = None,
    selector: str = "mass",
    head_totals: Sequence[int] | None = None,
    pool_q: int | None = None,
    pool_k: int | None = None,
    root: Tensor | None = None,
    patches: int | None = None,
) -> BlockLists:
    """Choose the key blocks that each query block keeps.

    Scores are float32, of which NaN counts as -inf and -0.0 as 0.0; of equal scores the lower block comes first. The
    same scores give the same lists on every device, to the bit; only the gain by which `budgets` are spread is rounded
    as the device adds.

    The block map is only ever held in bounded chunks; what stays is the lists, four bytes for each kept pair.

    Args:
        q: queries `[B, H, N_q, d]`, after norm and RoPE: of patches, and of special tokens after them, which are
            not looked at.
        k: keys `[B, H, N_k, d]`, likewise; special keys are always kept and take their share of the probability,
            except in the map of whole blocks by which "mass" goes, where they would change no order.
        v: values `[B, H, N_k, d]`, likewise, for selectors that look at them.
        block_q: queries of a block.
        block_k: keys of a block.
        counts: int64 `[B, H, T_q]`, blocks each row keeps (1..T_k). Either these or `budgets`.
        budgets: int64 `[B, H]`, pairs each head keeps (T_q..T_q * T_k), spread evenly over its rows, the
            remainder to the rows whose next block is the most probable.
        scale: factor on q . k; None is d ** -0.5.
        selector: a name in `SELECTORS`. "mass" takes the most probable blocks of the block map; "drift" those whose
            loss alone would move the output of the row most; "restore" improves on "drift" by swaps, so that the
            drifts of what is left out cancel.
        head_totals: pairs that each head keeps, `[H]`, the same for every item, if the host knows them, as it does
            for a fixed sparsity. Trusted on a GPU, where they decide what is allocated.
        pool_q: queries to pool together, a divisor of block_q; None is block_q.
        pool_k: keys to pool together, a divisor of block_k; None is block_k.
        root: `[H, d, d]`, root of the metric in which outputs are compared; see `pool_values`.
        patches: tokens of q and k that are patches; None says all.

    Returns:
        Lists on the device of q, ascending in each row. Without totals a GPU's lists are not `exact`: they have room
        for every pair. Where that would take more than `UNKNOWN_LIMIT`, and on the CPU, their length is read back
        instead, the one wait for a GPU.

    Raises:
        SparsityError: shapes do not fit, neither or both of counts and budgets are given, the totals are not
            theirs, there is no such selector, or it looks at values and none are given.
    """
    if selector not in SELECTORS:
        raise SparsityError(f"There is no selector {selector!r}; choose one of {', '.join(SELECTORS)}.")
    if patches is not None and not 0 <= patches <= min(q.shape[2], k.shape[2]):
        raise SparsityError(
            f"patches is {patches}, wanted at most the {min(q.shape[2], k.shape[2])} tokens of q and k."
        )
    special = None if patches is None else k[:, :, patches:]
    pooled = pool(
        q[:, :, :patches], k[:, :, :patches], block_q, block_k, scale=scale, pool_q=pool_q, pool_k=pool_k,
        special=special,
    )  # fmt: skip
    values = None
    if v is not None:
        own = v
        values = lambda: pool_values(k, own, pooled.key_tokens, block_k, pool_k=pool_k, root=root)  # noqa: E731
    return SELECTORS[selector](pooled, values=values, counts=counts, budgets=budgets, head_totals=head_totals)


@torch.no_grad()
def select_mass(
    pooled: PooledTokens,
    *,
    values: Values | None = None,
    counts: Tensor | None = None,
    budgets: Tensor | None = None,
    head_totals: Sequence[int] | None = None,
) -> BlockLists:
    """The selector "mass": the most probable blocks of each row; see `select`."""
    rows = rows_of(pooled)
    counts = _counts(pooled, rows, counts, budgets, head_totals)
    return _lists(pooled, counts, head_totals, lambda row_ptr, col: rows.fill(counts, row_ptr, col))


@torch.no_grad()
def select_drift(
    pooled: PooledTokens,
    *,
    values: Values | None = None,
    counts: Tensor | None = None,
    budgets: Tensor | None = None,
    head_totals: Sequence[int] | None = None,
) -> BlockLists:
    """The selector "drift": the blocks of each row whose loss alone would move its output most; see `select`."""
    return _by_drift(pooled, values, counts, budgets, head_totals, rounds=0)


@torch.no_grad()
def select_restore(
    pooled: PooledTokens,
    *,
    values: Values | None = None,
    counts: Tensor | None = None,
    budgets: Tensor | None = None,
    head_totals: Sequence[int] | None = None,
) -> BlockLists:
    """The selector "restore": blocks of which the rest moves the output of the row little, together; see `select`."""
    return _by_drift(pooled, values, counts, budgets, head_totals, rounds=usual_rounds(pooled))


def select_from_map(block_map: Tensor, counts: Tensor) -> Tensor:
    """The most probable blocks of each row of a whole block map, ties to the lower block.

    Args:
        block_map: `[..., T_q, T_k]`.
        counts: int64 `[..., T_q]`, 1..T_k.

    Returns:
        bool `[..., T_q, T_k]`.
    """
    return keep_largest(block_map, sort_rows(block_map), counts)


SELECTORS: dict[str, Selector] = {"mass": select_mass, "drift": select_drift, "restore": select_restore}
"""Rules that fill a budget: `(pooled, *, values, counts, budgets, head_totals) -> BlockLists`. Values are only made
for rules that look at them."""


def _by_drift(
    pooled: PooledTokens,
    values: Values | None,
    counts: Tensor | None,
    budgets: Tensor | None,
    head_totals: Sequence[int] | None,
    rounds: int,
) -> BlockLists:
    """Lists of the restoration, by so many rounds of swaps."""
    if values is None:
        raise SparsityError("Selectors by drift look at the values of the keys; give them, or select by mass.")
    counts = _counts(pooled, rows_of(pooled), counts, budgets, head_totals)
    given = values()
    return _lists(
        pooled, counts, head_totals,
        lambda row_ptr, col: restored_rows(pooled, given, counts, row_ptr, col, rounds=rounds),
    )  # fmt: skip


def _counts(
    pooled: PooledTokens,
    rows: MapRows,
    counts: Tensor | None,
    budgets: Tensor | None,
    head_totals: Sequence[int] | None,
) -> Tensor:
    """Blocks that each row keeps, int64 `[B * H, T_q]`."""
    _check_amounts(pooled, counts, budgets)
    _check_totals(pooled, head_totals)
    if counts is not None:
        return counts.reshape(-1, pooled.rows).clamp(1, pooled.columns)
    assert budgets is not None  # one of the two was given
    return rows.spread(budgets.flatten())


def _lists(
    pooled: PooledTokens, counts: Tensor, head_totals: Sequence[int] | None, fill: Callable[[Tensor, Tensor], None]
) -> BlockLists:
    """Lists of so many blocks a row, which `fill(row_ptr, col)` writes; col has an entry more than they need."""
    row_ptr = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts.flatten(), 0, out=row_ptr[1:])
    length, exact = _length(pooled, row_ptr, head_totals)
    col = torch.empty(length + 1, dtype=torch.int32, device=counts.device)
    fill(row_ptr, col)
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
