"""Selectors: which blocks fill a budget, streamed so that no block map is ever held whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hess_plugin_cuda import BlockLists

from .budgets import spread
from .checks import SparsityError
from .pooling import PooledTokens, pool
from .ranking import keep_largest, sort_rows

Selector = Callable[..., BlockLists]


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
    total: int | None = None,
) -> BlockLists:
    """Choose the key blocks that each query block keeps.

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
        total: sum of the counts or budgets, if the host knows it, as it does for a fixed sparsity; otherwise
            it is read back, the one wait for a GPU.

    Returns:
        Lists on the device of q, ascending in each row; exact, deterministic, ties to the lower block.

    Raises:
        SparsityError: shapes do not fit, neither or both of counts and budgets are given, or no such
            selector.
    """
    if selector not in SELECTORS:
        raise SparsityError(f"There is no selector {selector!r}; choose one of {', '.join(SELECTORS)}.")
    pooled = pool(q, k, block_q, block_k, scale=scale)
    return SELECTORS[selector](pooled, counts=counts, budgets=budgets, total=total)


@torch.no_grad()
def select_mass(
    pooled: PooledTokens,
    *,
    counts: Tensor | None = None,
    budgets: Tensor | None = None,
    total: int | None = None,
) -> BlockLists:
    """The selector "mass": the most probable blocks of each row; see `select`."""
    _check_amounts(pooled, counts, budgets)
    chunks = _Chunks(pooled)
    if budgets is not None:
        counts = _spread_by_gain(pooled, chunks, budgets)
    assert counts is not None  # one of the two was given
    counts = counts.reshape(-1, pooled.rows).clamp(1, pooled.columns)
    return _emit(pooled, chunks, counts, total)


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
"""Rules that fill a budget: `(pooled, *, counts, budgets, total) -> BlockLists`."""


class _Chunks:
    """The sorted parts of a block map; kept between two passes if there is only one, else made again."""

    def __init__(self, pooled: PooledTokens) -> None:
        self.pooled = pooled
        self.kept: tuple[slice, slice, Tensor, Tensor] | None = None
        self.single = pooled.q.shape[0] * pooled.rows * pooled.columns <= pooled.chunk_entries

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        if self.kept is not None:
            yield self.kept
            return
        for heads, rows, part in self.pooled.chunks():
            made = heads, rows, part, sort_rows(part)
            if self.single:
                self.kept = made
            yield made


def _spread_by_gain(pooled: PooledTokens, chunks: _Chunks, budgets: Tensor) -> Tensor:
    """Counts `[B, H, T_q]` of budgets `[B, H]`; a row's gain is what its next block adds."""
    nth = (budgets.reshape(-1, 1) // pooled.rows).clamp(0, pooled.columns - 1)
    gains = torch.empty(pooled.q.shape[:2], device=pooled.q.device)
    for heads, rows, _, ranked in chunks:
        at = nth[heads].unsqueeze(-1).expand(-1, ranked.shape[1], 1)
        gains[heads, rows] = ranked.gather(-1, at).squeeze(-1)
    return spread(budgets, pooled.rows, pooled.columns, gains.view(*budgets.shape, pooled.rows))


def _emit(pooled: PooledTokens, chunks: _Chunks, counts: Tensor, total: int | None) -> BlockLists:
    """Lists with `counts` `[B * H, T_q]` blocks a row."""
    device = pooled.q.device
    total = int(counts.sum()) if total is None else total
    row_ptr = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=device)
    torch.cumsum(counts.flatten(), 0, out=row_ptr[1:])
    starts = row_ptr[:-1].view_as(counts)
    # One entry more, into which every block that is not kept is written: no length has to be read back from a
    # device.
    col = torch.empty(total + 1, dtype=torch.int32, device=device)
    blocks = torch.arange(pooled.columns, dtype=torch.int32, device=device)
    for heads, rows, part, ranked in chunks:
        keep = keep_largest(part, ranked, counts[heads, rows])
        place = keep.cumsum(-1).add_(starts[heads, rows].unsqueeze(-1) - 1)
        place.masked_fill_(~keep, total)
        col.scatter_(0, place.flatten(), blocks.expand_as(place).flatten())
    sizes = (
        pooled.batch,
        pooled.heads,
        pooled.query_tokens,
        pooled.key_tokens,
        pooled.block_q,
        pooled.block_k,
    )
    return BlockLists(row_ptr, col[:total], *sizes)


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
