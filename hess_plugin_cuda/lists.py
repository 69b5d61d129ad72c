"""Block lists: which key blocks each query block keeps, as one compressed sparse row table per head."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


def block_count(tokens: int, block: int) -> int:
    """Number of blocks of `block` tokens that cover `tokens` tokens, the last one possibly ragged."""
    return -(-tokens // block)


@dataclass(frozen=True, eq=False)
class BlockLists:
    """The kept key blocks of every query block of every head of every batch item.

    Rows run head-major: row `(b * heads + h) * query_blocks + i` is query block `i` of head `h` of item `b`,
    and its key blocks are `col[row_ptr[row]:row_ptr[row + 1]]`, ascending. Blocks tile the *patch* tokens
    only, in order; the last block on either side may be ragged. Special tokens (camera, registers) are in no
    list: they follow the patch tokens in q, k and v, special queries attend to every key, and special keys
    are visible to every query.

    Construction checks types and sizes and costs nothing on the device; `check()` also reads the contents.

    Attributes:
        row_ptr: int64 `[batch * heads * query_blocks + 1]`, ascending from 0 to the length of `col`.
        col: int32 `[kept]`, kept patch key blocks.
        batch: number of batch items B.
        heads: number of heads H.
        query_tokens: patch queries of one item; tokens after them are special.
        key_tokens: patch keys of one item; tokens after them are special.
        block_q: patch queries of a query block.
        block_k: patch keys of a key block.
        head_kept: pairs that each head keeps, the same for every item, if the host knows them; `[H]`.
        exact: whether `col` is as long as the lists. Where it is not, no host knows their length: `col` has room for
            every pair, and what follows entry `row_ptr[-1]` is undefined.

    Raises:
        TypeError: `row_ptr` or `col` is not an integer tensor of the stated type.
        ValueError: a size is not positive, or the tensors do not fit the sizes.
    """

    row_ptr: Tensor
    col: Tensor
    batch: int
    heads: int
    query_tokens: int
    key_tokens: int
    block_q: int
    block_k: int
    head_kept: tuple[int, ...] | None = None
    exact: bool = True

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "query_tokens", "key_tokens", "block_q", "block_k"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"BlockLists needs {name} >= 1, an int; got {value!r}.")
        for name, dtype in (("row_ptr", torch.int64), ("col", torch.int32)):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dtype != dtype or value.dim() != 1:
                raise TypeError(f"BlockLists needs {name} as a one-dimensional {dtype} tensor; got {_told(value)}.")
        if self.row_ptr.device != self.col.device:
            raise ValueError(
                f"BlockLists needs row_ptr and col on one device; got {self.row_ptr.device} and {self.col.device}."
            )
        if self.row_ptr.numel() != self.rows + 1:
            raise ValueError(
                f"BlockLists needs row_ptr of {self.rows + 1} entries, one more than "
                f"{self.batch} items x {self.heads} heads x {self.query_blocks} query "
                f"blocks; got {self.row_ptr.numel()}."
            )
        if not self.rows <= self.col.numel() <= self.rows * self.key_blocks:
            raise ValueError(
                f"BlockLists needs 1 to {self.key_blocks} key blocks for each of its {self.rows} rows; "
                f"got {self.col.numel()} in all."
            )
        if self.head_kept is not None:
            self._check_head_kept(self.head_kept)

    def _check_head_kept(self, kept: tuple[int, ...]) -> None:
        least, most = self.query_blocks, self.query_blocks * self.key_blocks
        if len(kept) != self.heads or not all(least <= n <= most for n in kept):
            raise ValueError(
                f"BlockLists needs head_kept of {self.heads} heads, {least} to {most} pairs each; got {kept}."
            )
        if self.exact and sum(kept) * self.batch != self.col.numel():
            raise ValueError(
                f"BlockLists needs head_kept to sum to the {self.col.numel()} pairs of its {self.batch} items; "
                f"{kept} sum to {sum(kept)} an item."
            )

    @property
    def query_blocks(self) -> int:
        """Query blocks T_q of one head."""
        return block_count(self.query_tokens, self.block_q)

    @property
    def key_blocks(self) -> int:
        """Patch key blocks T_k of one head."""
        return block_count(self.key_tokens, self.block_k)

    @property
    def rows(self) -> int:
        """Rows of the table: batch * heads * query_blocks."""
        return self.batch * self.heads * self.query_blocks

    @property
    def kept(self) -> int:
        """Kept (query block, key block) pairs over all items and heads; read from the device unless `exact`."""
        return self.col.numel() if self.exact else int(self.row_ptr[-1])

    @property
    def device(self) -> torch.device:
        """Where the table lives."""
        return self.col.device

    @property
    def is_full(self) -> bool:
        """Whether every pair is kept, so that the attention is dense; False where only the device could tell."""
        return self.exact and self.kept == self.rows * self.key_blocks

    def counts(self) -> Tensor:
        """Kept key blocks of each row: int64 `[B, H, T_q]`."""
        return self.row_ptr.diff().view(self.batch, self.heads, self.query_blocks)

    def sparsity(self, special_keys: int = 0) -> float:
        """Dropped share of the block pairs, averaged over items and heads; 0 is dense.

        Args:
            special_keys: count these always-kept special keys too, as key blocks of their own. Without them
                the share is over patch blocks alone.
        """
        special = block_count(special_keys, self.block_k)
        return 1.0 - (self.kept + self.rows * special) / (self.rows * (self.key_blocks + special))

    def to_mask(self) -> Tensor:
        """The lists as a table: bool `[B, H, T_q, T_k]`, True where a block is kept."""
        mask = torch.zeros(self.rows, self.key_blocks, dtype=torch.bool, device=self.device)
        kept = self.kept
        row = torch.repeat_interleave(self.row_ptr.diff(), output_size=kept)
        mask[row, self.col[:kept].long()] = True
        return mask.view(self.batch, self.heads, self.query_blocks, self.key_blocks)

    @classmethod
    def from_mask(cls, mask: Tensor, query_tokens: int, key_tokens: int, block_q: int, block_k: int) -> BlockLists:
        """Lists from a bool table `[B, H, T_q, T_k]`, True where a block is kept.

        Raises:
            ValueError: the table is not bool, does not fit the token counts, or has a row without a block.
        """
        wanted = (block_count(query_tokens, block_q), block_count(key_tokens, block_k))
        if mask.dtype != torch.bool or mask.dim() != 4 or tuple(mask.shape[2:]) != wanted:
            raise ValueError(
                f"from_mask needs a bool mask [B, H, {wanted[0]}, {wanted[1]}] for "
                f"{query_tokens} x {key_tokens} tokens in blocks of {block_q} x {block_k}; got {_told(mask)}."
            )
        flat = mask.flatten(0, 2)
        counts = flat.sum(-1)
        if not bool((counts > 0).all()):
            raise ValueError("from_mask needs at least one kept key block in every row; the mask has an empty row.")
        row_ptr = torch.zeros(flat.shape[0] + 1, dtype=torch.int64, device=mask.device)
        row_ptr[1:] = counts.cumsum(0)
        col = flat.nonzero()[:, 1].to(torch.int32)
        return cls(row_ptr, col, mask.shape[0], mask.shape[1], query_tokens, key_tokens, block_q, block_k)

    @classmethod
    def full(
        cls,
        batch: int,
        heads: int,
        query_tokens: int,
        key_tokens: int,
        block_q: int,
        block_k: int,
        device: torch.device | str = "cpu",
    ) -> BlockLists:
        """Lists that keep everything: dense attention."""
        rows = batch * heads * block_count(query_tokens, block_q)
        columns = block_count(key_tokens, block_k)
        row_ptr = torch.arange(0, rows * columns + 1, columns, device=device)
        col = torch.arange(columns, dtype=torch.int32, device=device).repeat(rows)
        return cls(row_ptr, col, batch, heads, query_tokens, key_tokens, block_q, block_k)

    def to(self, device: torch.device | str) -> BlockLists:
        """The same lists on another device."""
        return replace(self, row_ptr=self.row_ptr.to(device), col=self.col.to(device))

    def of_heads(self, heads: Sequence[int]) -> BlockLists:
        """The lists of some heads of every item, in the order given, found without reading the device.

        Raises:
            ValueError: `head_kept` is unknown, or the lists are not `exact`.
        """
        kept = self.head_kept
        if kept is None or not self.exact:
            raise ValueError("of_heads needs lists that are exact and know head_kept.")
        starts = [0, *itertools.accumulate(kept)]
        row_ptr, col, before = [], [], 0
        for item in range(self.batch):
            for head in heads:
                start, row = item * starts[-1] + starts[head], (item * self.heads + head) * self.query_blocks
                row_ptr.append(self.row_ptr[row : row + self.query_blocks] + (before - start))
                col.append(self.col[start : start + kept[head]])
                before += kept[head]
        row_ptr.append(self.row_ptr[-1:] + (before - self.kept))
        own = tuple(kept[head] for head in heads)
        return replace(self, row_ptr=torch.cat(row_ptr), col=torch.cat(col), heads=len(own), head_kept=own)

    def check(self) -> BlockLists:
        """Read the contents and return self, or say which rule is broken. Synchronises a GPU.

        Raises:
            ValueError: row_ptr does not rise by one or more from 0 to `kept`, or a row's blocks are out of
                range, repeated or not ascending; the sentence names the first bad row.
        """
        kept = self.kept
        ends = (int(self.row_ptr[0]), int(self.row_ptr[-1]))
        if ends != (0, kept) or kept > self.col.numel():
            raise ValueError(
                f"row_ptr must run from 0 to {self.col.numel()}, the length of col; "
                f"it runs from {ends[0]} to {ends[1]}."
            )
        empty = (self.row_ptr.diff() < 1).nonzero()
        if empty.numel():
            raise ValueError(f"Every row must keep at least one key block; {self._row_name(int(empty[0]))} keeps none.")
        col = self.col[:kept]
        bad = ((col < 0) | (col >= self.key_blocks)).nonzero()
        if bad.numel():
            where = int(bad[0])
            raise ValueError(
                f"Key blocks must lie in 0..{self.key_blocks - 1}; {self._entry_name(where)} lists {int(col[where])}."
            )
        row = torch.repeat_interleave(self.row_ptr.diff(), output_size=kept)
        bad = ((col.diff() <= 0) & (row.diff() == 0)).nonzero()
        if bad.numel():
            where = int(bad[0])
            raise ValueError(
                f"Key blocks of a row must ascend without repeats; {self._entry_name(where)} lists "
                f"{int(col[where])} before {int(col[where + 1])}."
            )
        if self.head_kept is not None:
            counted = self.counts().sum(-1).cpu()
            if not bool((counted == torch.tensor(self.head_kept)).all()):
                raise ValueError(f"head_kept says {self.head_kept}; the heads of the items keep {counted.tolist()}.")
        return self

    def _entry_name(self, entry: int) -> str:
        wanted = torch.tensor(entry, device=self.device)
        return self._row_name(int(torch.searchsorted(self.row_ptr, wanted, right=True)) - 1)

    def _row_name(self, row: int) -> str:
        head, block = divmod(row, self.query_blocks)
        return f"query block {block} of head {head % self.heads} of item {head // self.heads}"


def _told(value: Any) -> str:
    """How an argument looks, for an error message."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__
