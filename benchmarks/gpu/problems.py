"""The attention problems that are timed: tokens of so many views, and lists of every kind at one kept share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hess_plugin.sparsity import allocate, target_total
from hess_plugin_cuda import BlockLists, block_count

from .options import BLOCK_K, BLOCK_Q, SPECIAL_PER_VIEW, WIDTH, Options

SIGMA = 1.5
"""Of the log-normal weights of heads in ragged lists, as calibrated profiles have them."""


@dataclass(frozen=True)
class Size:
    """Tokens of an attention.

    Attributes:
        views: how many.
        patches: patch tokens.
        special: special tokens after them.
        heads: heads.
    """

    views: int
    patches: int
    special: int
    heads: int

    @classmethod
    def of(cls, options: Options, views: int, heads: int) -> Size:
        """So many views as the options have them."""
        return cls(views, views * options.patches_per_view, views * SPECIAL_PER_VIEW, heads)

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.patches + self.special

    @property
    def grid(self) -> tuple[int, int]:
        """Query blocks and key blocks of a head's patches."""
        return block_count(self.patches, BLOCK_Q), block_count(self.patches, BLOCK_K)

    @property
    def dense_flops(self) -> float:
        """Floating-point operations of dense attention."""
        return 4.0 * WIDTH * self.heads * self.tokens**2


def make_tokens(size: Size, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random normal q, k and v `[1, H, N, d]`; never zeros, which multiply faster."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (1, size.heads, size.tokens, WIDTH)
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3))
    return q, k, v


def head_shares(size: Size, share: float, spread: str) -> list[float]:
    """Kept share of each head: all the same, or ragged with one head as dense as the total allows."""
    if spread == "uniform" or share >= 1:
        return [share] * size.heads
    rows, columns = size.grid
    weights = torch.randn(size.heads, generator=torch.Generator().manual_seed(0)).mul(SIGMA).exp()
    weights[0] = weights.sum() * 1000  # takes all it can hold, as far as the others keep their minimum
    total = target_total(1.0 - share, size.heads, rows, columns)
    budgets = allocate(total, weights, rows=rows, columns=columns)
    if int(budgets[0]) < rows * columns:  # the whole total is less than one dense head: leave the others half
        weights[0] = weights[1:].sum()
        budgets = allocate(total, weights, rows=rows, columns=columns)
    return (budgets.double() / (rows * columns)).tolist()


def make_lists(
    size: Size, share: float, device: torch.device, *, spread: str = "uniform", kind: str = "random", seed: int = 0
) -> BlockLists:
    """Lists that keep about a share of all patch-block pairs, made head by head.

    Args:
        size: of the problem.
        share: kept.
        device: where the lists lie.
        spread: "uniform" or "ragged" over the heads.
        kind: "random" blocks, or "clustered" ones, 8 neighbouring rows and 16 neighbouring blocks at a time.
        seed: of the choice.
    """
    rows, columns = size.grid
    sizes = (1, size.heads, size.patches, size.patches, BLOCK_Q, BLOCK_K)
    generator = torch.Generator(device).manual_seed(seed)
    counts, cols, head_kept = [], [], []
    for own in head_shares(size, share, spread):
        mask = _mask(rows, columns, own, kind, generator)
        counts.append(mask.sum(-1))
        cols.append(mask.nonzero()[:, 1].to(torch.int32))
        head_kept.append(cols[-1].numel())
    row_ptr = torch.zeros(rows * size.heads + 1, dtype=torch.int64, device=device)
    torch.cumsum(torch.cat(counts), 0, out=row_ptr[1:])
    return BlockLists(row_ptr, torch.cat(cols), *sizes, head_kept=tuple(head_kept))


def _mask(rows: int, columns: int, share: float, kind: str, generator: torch.Generator) -> Tensor:
    device = generator.device
    if share >= 1:
        return torch.ones(rows, columns, dtype=torch.bool, device=device)
    if kind == "clustered":
        coarse = torch.rand(block_count(rows, 8), block_count(columns, 16), generator=generator, device=device) < share
        mask = coarse.repeat_interleave(8, 0)[:rows].repeat_interleave(16, 1)[:, :columns].contiguous()
    else:
        mask = torch.rand(rows, columns, generator=generator, device=device) < share
    mask[torch.arange(rows, device=device), torch.arange(rows, device=device) * columns // rows] = True
    return mask


def token_pairs(lists: BlockLists, queries: int, keys: int) -> int:
    """Pairs of a query and a key that attention over lists computes, special tokens included."""
    special_q, special_k = queries - lists.query_tokens, keys - lists.key_tokens
    counts = lists.counts().double()
    ragged = (lists.col[lists.row_ptr[1:] - 1] == lists.key_blocks - 1).view_as(counts).double()
    seen = counts * lists.block_k - ragged * (-lists.key_tokens % lists.block_k) + special_k
    in_row = torch.full((lists.query_blocks,), float(lists.block_q), dtype=torch.float64, device=lists.device)
    in_row[-1] -= -lists.query_tokens % lists.block_q
    return int((seen * in_row).sum().item()) + lists.batch * lists.heads * special_q * keys
