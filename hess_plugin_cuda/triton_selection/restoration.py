"""Starts the kernels of the selectors by drift: the largest drifts of a row, then swaps that let the rest cancel.

Rows are worked on in chunks. A chunk takes a launch for the drifts of its blocks, one that keeps the largest, four for
each round (what each block's return would do, the swap; what its loss would do, the swap) and one for the lists.
Between them 13 bytes are kept for a pair of blocks (with A x F sub-blocks 4 A F + 4 A + 5), 64 MiB at most for any
number of heads.

One launch for everything was weighed and left alone. Products with V want tiles of 64 queries: a tile of 16 reads V
from the cache four times as often. Choosing wants a warp to a row and many of them, to hide the waiting of its
bisection. With both in one program its 64 rows need 832 T_k bytes of their own, 230 MB for the programs of an H200 at
100 views and 2.3 GB at 1000.

Estimated, not measured, for H200 (132 multiprocessors, 3e13 instructions a second, 5.5 TB/s from the cache) at 100
views: H = 16, d = 64, 1070 x 2139 blocks, 3.7e7 pairs, 10 % kept, whole blocks. The attention that is fed takes 15 ms.

| step | instructions a pair | bytes a pair | TFLOP |
|---|---|---|---|
| attention of pooled queries | 80 | 8 | .009 |
| drifts | 155 | 28 | .009 |
| start | 125 | 36 | - |
| 10 x what each block would change | 10 x 88 | 10 x 20 | 10 x .005 |
| 10 x swap | 10 x 87 | 10 x 12 | - |
| lists | 15 | 2 | - |
| sum | 2100 | 390 | .065 |

Instructions are those of the machine code for sm_90, times the turns that their loops take. They need 2.6 ms if nothing
ever waits, bytes 2.6 ms, products (three of TF32 each) .7 ms; together 3 to 5 ms, or 20 to 35 % of the attention. All
of it grows with T_q T_k, as attention does at a fixed share of kept blocks: the share is the same at 1000 views. Tiles
take A F times as long with sub-blocks, where there are three rounds. `drift` alone, without rounds, takes some .6 ms,
or 4 %. Each round looks at every block twice, which costs 4 to 6 %: five of them cannot stay below 5 %, one or two come
close. Not in the table: with sub-blocks the remainder of a budget is spread over rows by torch, which sorts maps in
float64 and may take longer than all of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .drifts import change_kernel, drift_kernel
from .launch import launch
from .probabilities import attend_kernel
from .shapes import emission_shape, power_of_two, row_stride, swap_shape
from .swaps import list_kernel, swap_kernel
from .tokens import Attended, Tokens

SCRATCH_BYTES = 2**26
"""What a chunk may take; of one row at least."""

MOST_ROUNDS = 6
"""What becomes of a block, at the start and in each round, is told by the bits of a byte."""

START, RESTORE, DROP = range(3)

ATTEND_TILE = {"ROWS": 64, "COLUMNS": 32}
ATTEND_OPTIONS = {"num_warps": 4, "num_stages": 2}
TILE_ROWS, TILE_COLUMNS = 64, 64
TILE_OPTIONS = {"num_warps": 8, "num_stages": 2}
DEPTH = 32
DRIFT_DEPTH = 16  # with two products the registers of an RTX 50 do not hold more
TAKEN = 16


class Chunk:
    """Rows that are worked on at once: `r` rows of one head, or all rows of several heads.

    Attributes:
        tokens: of these rows, and of all keys.
        attended: of these rows.
        gram: float32 `[h, T_k, F, F]`, products of values.
        counts: int64 `[h, r]`, blocks to keep.
        starts: int64 `[h, r]`, where their lists start.
        col: int32, room for the lists.
        keys: int32 `[h, r, stride]`, of which the least are chosen.
        states: int8 `[h, r, stride]`; see `swap_kernel`.
        squares: float32 `[h, r * A, stride]`, |d|^2.
        probabilities: float32 `[h, r * A, pair_stride]`.
        residual: float32 `[h, r * A, e]`, g.
        lengths: float32 `[h, r * A]`, g . g.
        ahead: float32 `[h, r * A]`, v . g.
        kept: float32 `[h, r * A]`, K.
        drift: float32 `[h, r]`, least J.
        best: int32 `[h, r]`, after how many rounds that was.
    """

    def __init__(
        self, tokens: Tokens, attended: Attended, gram: Tensor, counts: Tensor, starts: Tensor, col: Tensor
    ) -> None:
        self.tokens, self.attended, self.gram = tokens, attended, gram
        self.counts, self.starts, self.col = counts, starts, col
        heads, queries, width = attended.out.shape
        blocks, parts = row_stride(tokens.columns), row_stride(tokens.columns * tokens.parts_k)

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=col.device)

        self.keys = new(heads, tokens.rows, blocks, dtype=torch.int32)
        self.states = new(heads, tokens.rows, blocks, dtype=torch.int8)
        self.squares, self.probabilities = new(heads, queries, blocks), new(heads, queries, parts)
        self.residual = new(heads, queries, width)
        self.lengths, self.ahead, self.kept = new(3, heads, queries)
        self.drift = new(heads, tokens.rows)
        self.best = new(heads, tokens.rows, dtype=torch.int32)

    @staticmethod
    def row_bytes(tokens: Tokens) -> int:
        """What the keys, states, squares and probabilities of a row take."""
        blocks, parts = row_stride(tokens.columns), row_stride(tokens.columns * tokens.parts_k)
        return 5 * blocks + 4 * tokens.parts_q * (blocks + parts)

    def find_drifts(self, refined: bool) -> None:
        """Fill probabilities and squares, if they are asked for, and key each block by its own drift."""
        tokens, attended = self.tokens, self.attended
        self._launch_tiles(
            drift_kernel, tokens.q, tokens.k, tokens.v, tokens.bias, attended.top, attended.inverse, attended.out,
            self.gram, tokens.weights, self.probabilities, self.squares, self.keys, tokens.rows, tokens.columns,
            self.probabilities.stride(-2), self.keys.stride(-2), WIDTH=tokens.q.shape[-1], DEPTH=DRIFT_DEPTH,
            REFINED=refined,
        )  # fmt: skip

    def find_changes(self, step: int) -> None:
        """Key each block by the drift of the row once it is restored, or dropped."""
        tokens = self.tokens
        self._launch_tiles(
            change_kernel, tokens.v, self.residual, self.lengths, self.ahead, self.kept, tokens.weights,
            self.probabilities, self.squares, self.keys, tokens.rows, tokens.columns,
            self.probabilities.stride(-2), self.keys.stride(-2), DROPS=step == DROP,
        )  # fmt: skip

    def _launch_tiles(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        tokens = self.tokens
        tile = tile_shape(tokens.parts_q, tokens.parts_k)
        heads, rows, stride = self.keys.shape
        launch(
            kernel, (-(-stride // tile["COLUMNS"]), -(-rows // tile["ROWS"]), heads), tokens.v.device, *arguments,
            VALUES=tokens.v.shape[-1], **{**tile, **constants}, **TILE_OPTIONS,
        )  # fmt: skip

    def choose(self, step: int, turn: int, refined: bool) -> None:
        """Keep, restore or drop the blocks of the least keys, and find what is left out then."""
        tokens, attended = self.tokens, self.attended
        heads, rows, stride = self.keys.shape
        shape = swap_shape(tokens.columns)
        launch(
            swap_kernel, (rows, heads), tokens.v.device, self.keys, self.states, self.counts,
            self.starts, self.col, self.probabilities, tokens.v, attended.out, attended.special_out,
            attended.special_share, tokens.weights, self.residual, self.lengths, self.ahead, self.kept, self.drift,
            self.best, tokens.columns, self.probabilities.stride(-2), stride, turn,
            **swap_constants(tokens.v.shape[-1], tokens.parts_q, tokens.parts_k), STEP=step, REFINED=refined,
            **shape.constants, **shape.options,
        )  # fmt: skip

    def write_best(self) -> None:
        """Write the lists of the best states."""
        heads, rows, stride = self.states.shape
        shape = emission_shape(self.tokens.columns)
        launch(
            list_kernel, (rows, heads), self.col.device, self.states, self.best, self.starts, self.col,
            self.tokens.columns, stride, TILE=shape.tile, **shape.options,
        )  # fmt: skip

    def run(self, rounds: int) -> None:
        """From attention to lists."""
        self.find_drifts(rounds > 0)
        self.choose(START, 0, rounds > 0)
        self.swap(rounds)

    def swap(self, rounds: int) -> None:
        """From what is kept at the start to lists."""
        for turn in range(rounds):
            for step in (RESTORE, DROP):
                self.find_changes(step)
                self.choose(step, turn, True)
        if rounds:  # else the start has listed what it keeps
            self.write_best()


def tile_shape(parts_q: int, parts_k: int) -> dict[str, int]:
    """Constants of the kernels that work on tiles."""
    rows, columns = max(1, TILE_ROWS // parts_q), max(16, TILE_COLUMNS // parts_k)
    return {"ROWS": rows, "COLUMNS": columns, "PARTS_Q": parts_q, "PARTS_K": parts_k, "DEPTH": DEPTH}


def swap_constants(values: int, parts_q: int, parts_k: int) -> dict[str, int]:
    """Constants of the kernel that swaps."""
    return {"VALUES": values, "PADDED": padded(values), "PARTS_Q": parts_q, "PARTS_K": parts_k, "TAKEN": TAKEN}


def padded(values: int) -> int:
    """Values in a vector of registers."""
    return max(16, power_of_two(values))


def attend(tokens: Tokens) -> Attended:
    """Attention of all queries to all pooled and special keys."""
    heads, queries, width = tokens.q.shape
    values = tokens.v.shape[-1]
    top, inverse, share = torch.empty(3, heads, queries, device=tokens.q.device, dtype=torch.float32)
    out, special_out = torch.empty(2, heads, queries, values, device=tokens.q.device, dtype=torch.float32)
    launch(
        attend_kernel, (-(-queries // ATTEND_TILE["ROWS"]), heads), tokens.q.device, tokens.q, tokens.k, tokens.v,
        tokens.special_k, tokens.special_v, tokens.bias, top, inverse, out, special_out, share, queries,
        tokens.k.shape[1], tokens.special_k.shape[1], WIDTH=width, VALUES=values, PADDED=padded(values), DEPTH=DEPTH,
        **ATTEND_TILE, **ATTEND_OPTIONS,
    )  # fmt: skip
    return Attended(top, inverse, out, special_out, share)


def fill(
    tokens: Tokens, counts: Tensor, starts: Tensor, col: Tensor, rounds: int, chunk_entries: int | None = None
) -> None:
    """Write the blocks of each row that keep its output closest to that of all blocks, ascending.

    Args:
        tokens: of some heads.
        counts: int64 `[h, T_q]`, blocks to keep, 1..T_k.
        starts: int64 `[h, T_q]`, where each row's blocks start.
        col: int32, filled for these rows.
        rounds: of swaps, `MOST_ROUNDS` at most; without any the blocks of the largest drifts are kept.
        chunk_entries: pairs of sub-blocks to work on at once; None is as many as `SCRATCH_BYTES` allow.

    Raises:
        ValueError: more rounds.
    """
    if rounds > MOST_ROUNDS:
        raise ValueError(f"There are {MOST_ROUNDS} rounds of swaps at most; got {rounds}.")
    attended, gram = attend(tokens), tokens.products()
    for heads, rows in _chunks(tokens, chunk_entries):
        queries = slice(rows.start * tokens.parts_q, rows.stop * tokens.parts_q)
        part = Tokens(
            tokens.q[heads, queries], tokens.k[heads], tokens.v[heads], tokens.special_k[heads],
            tokens.special_v[heads], tokens.bias, tokens.weights[queries], tokens.parts_q, tokens.parts_k,
        )  # fmt: skip
        own = counts[heads, rows], starts[heads, rows]
        Chunk(part, attended.part(heads, queries), gram[heads], *own, col).run(rounds)


def _chunks(tokens: Tokens, entries: int | None) -> Iterator[tuple[slice, slice]]:
    """Slices of heads and rows: several heads whole, or runs of rows of one."""
    if entries is None:
        most = SCRATCH_BYTES // Chunk.row_bytes(tokens)
    else:
        most = entries // (tokens.columns * tokens.parts_q * tokens.parts_k)
    # Within a head numbers are counted in 32 bits.
    longest = tokens.parts_q * row_stride(tokens.columns * tokens.parts_k)
    most, rows = max(1, min(most, (2**31 - 1) // longest)), tokens.rows
    step = max(1, most // rows)
    for head in range(0, tokens.q.shape[0], step):
        for first in range(0, rows, min(most, rows)):
            yield slice(head, head + step), slice(first, min(first + most, rows))
