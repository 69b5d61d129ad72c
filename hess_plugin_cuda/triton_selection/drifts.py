"""Kernels that say of each block what leaving it out, or taking it back, does to the output of a row.

Each block gets a key, a drift's bits as an integer, of which the least are chosen. One program makes a tile of them
from all pairs of sub-blocks that they consist of; its products are matrix products.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .probabilities import clean, probabilities, products

LEAST = tl.constexpr(1e-4)
"""What a kept share counts as at least, where something is divided by it."""

NEARLY_ALL, SURE = tl.constexpr(2.0**-8), tl.constexpr(1e20)
"""See `hess_plugin.sparsity.drift`."""

NONE = tl.constexpr(0x7FFFFFFF)
"""Key of a block that is not to be chosen, above all others."""

WORST = tl.constexpr(0x7F800000)
"""Key of a block whose drift is no number."""


@triton.jit
def key_of(drifts):
    """Keys of drifts, the least first: bits of numbers that are not negative have their order.

    Rounding may leave a drift just below 0; it counts as 0.
    """
    keys = tl.maximum(drifts, 0.0).to(tl.int32, bitcast=True)
    return tl.where(drifts == drifts, tl.minimum(keys & 0x7FFFFFFF, WORST), WORST)


@triton.jit
def add_columns(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """Sums over the parts of each column, which lie side by side: `[ROWS, COLUMNS * PARTS]` -> `[ROWS, COLUMNS]`."""
    return x if PARTS == 1 else tl.sum(tl.reshape(x, [ROWS, COLUMNS, PARTS]), 2)


@triton.jit
def add_rows(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """Sums over the parts of each row: `[ROWS * PARTS, COLUMNS]` -> `[ROWS, COLUMNS]`."""
    return x if PARTS == 1 else tl.sum(tl.reshape(x, [ROWS, PARTS, COLUMNS]), 1)


@triton.jit
def part_of(x, part: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """One part of each column: `[ROWS, COLUMNS * PARTS]` -> `[ROWS, COLUMNS]`."""
    if PARTS == 1:
        return x
    parts = tl.arange(0, PARTS)[None, None, :]
    return tl.sum(tl.where(parts == part, tl.reshape(x, [ROWS, COLUMNS, PARTS]), 0.0), 2)


@triton.jit
def squared_lengths(p, gram, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """Squared length of the sum of p u over the parts of each column, from the products u . u of its parts.

    Args:
        p: `[ROWS, COLUMNS * PARTS]`.
        gram: pointers `[COLUMNS]` to PARTS * PARTS products each; there must be as many.
        ROWS: of p.
        COLUMNS: of the result.
        PARTS: of a column.
    """
    own = tl.zeros([ROWS, COLUMNS], tl.float32)
    for part in tl.static_range(PARTS):
        one = part_of(p, part, ROWS, COLUMNS, PARTS)
        own += one * one * tl.load(gram + part * PARTS + part)[None, :]
        for other in tl.static_range(part + 1, PARTS):
            two = part_of(p, other, ROWS, COLUMNS, PARTS)
            own += 2.0 * one * two * tl.load(gram + part * PARTS + other)[None, :]
    return own


# Numbers of single rows start anywhere: to compile kernels anew for their alignment would gain nothing.
@triton.jit(do_not_specialize=["rows", "columns"], do_not_specialize_on_alignment=["TOP", "INVERSE", "GRAM", "WEIGHTS"])
def drift_kernel(
    Q, K, V, BIAS, TOP, INVERSE, OUT, GRAM, WEIGHTS, PROBABILITIES, SQUARES, KEYS,
    rows, columns, pair_stride, stride,
    WIDTH: tl.constexpr, VALUES: tl.constexpr, DEPTH: tl.constexpr, PARTS_Q: tl.constexpr, PARTS_K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, REFINED: tl.constexpr,
):  # fmt: skip
    """Probabilities and drifts of a tile of a chunk of rows, and what each block's loss alone would do.

    Args:
        Q: float32 `[h, rows * PARTS_Q, WIDTH]`, queries of the chunk. All tensors are contiguous.
        K: float32 `[h, T_k * PARTS_K, WIDTH]`.
        V: float32 `[h, T_k * PARTS_K, VALUES]`.
        BIAS: float32 `[T_k * PARTS_K]`.
        TOP: of `attend_kernel`, for the queries of the chunk; so are INVERSE and OUT.
        INVERSE: see there.
        OUT: see there.
        GRAM: float32 `[h, T_k, PARTS_K, PARTS_K]`, products of the values of each block's parts.
        WEIGHTS: float32 `[rows * PARTS_Q]`, what each query sub-block counts.
        PROBABILITIES: float32 `[h, rows * PARTS_Q, pair_stride]`, for the probabilities of sub-blocks.
        SQUARES: float32 `[h, rows * PARTS_Q, stride]`, for |d|^2.
        KEYS: int32 `[h, rows, stride]`, for keys: the larger the drift of the row's output without the block, the
            less.
        rows: rows of the chunk in each head.
        columns: T_k.
        pair_stride: of the probabilities.
        stride: of squares and scores.
        WIDTH: of queries and keys.
        VALUES: width of values.
        DEPTH: of a step of the products.
        PARTS_Q: sub-blocks of a query block.
        PARTS_K: sub-blocks of a key block.
        ROWS: rows of a tile.
        COLUMNS: columns of a tile.
        REFINED: whether swaps follow, for which probabilities and squares are written.
    """
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * (ROWS * PARTS_Q) + tl.arange(0, ROWS * PARTS_Q)
    part = tl.program_id(0) * (COLUMNS * PARTS_K) + tl.arange(0, COLUMNS * PARTS_K)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, part_inside = row < rows * PARTS_Q, part < columns * PARTS_K
    line = head * rows * PARTS_Q + row
    q = Q + head * rows * PARTS_Q * WIDTH + row * WIDTH
    k = K + head * columns * PARTS_K * WIDTH + part * WIDTH
    scores = products(q, k, row_inside, part_inside, WIDTH, DEPTH, ROWS * PARTS_Q, COLUMNS * PARTS_K)
    scores = clean(scores + tl.load(BIAS + part, mask=part_inside, other=0.0)[None, :], part_inside[None, :])
    top = tl.load(TOP + line, mask=row_inside, other=0.0)
    inverse = tl.load(INVERSE + line, mask=row_inside, other=0.0)
    p = probabilities(scores, top, inverse)
    if REFINED:
        to = PROBABILITIES + head * rows * PARTS_Q * pair_stride + (row * pair_stride)[:, None] + part[None, :]
        tl.store(to, p, mask=row_inside[:, None] & (part < pair_stride)[None, :])
    out = OUT + head * rows * PARTS_Q * VALUES + row * VALUES
    v = V + head * columns * PARTS_K * VALUES + part * VALUES
    toward = products(out, v, row_inside, part_inside, VALUES, DEPTH, ROWS * PARTS_Q, COLUMNS * PARTS_K)
    toward = add_columns(p * toward, ROWS * PARTS_Q, COLUMNS, PARTS_K)
    blocks = add_columns(p, ROWS * PARTS_Q, COLUMNS, PARTS_K)
    # Past the last column p is 0, and any product will do.
    gram = GRAM + (head * columns + tl.minimum(column, columns - 1)) * (PARTS_K * PARTS_K)
    own = squared_lengths(p, gram, ROWS * PARTS_Q, COLUMNS, PARTS_K)
    length = _squared(out, row_inside, VALUES, ROWS * PARTS_Q)
    squares = tl.maximum(own - 2.0 * blocks * toward + blocks * blocks * length[:, None], 0.0)
    if REFINED:
        to = SQUARES + head * rows * PARTS_Q * stride + (row * stride)[:, None] + column[None, :]
        tl.store(to, squares, mask=row_inside[:, None] & (column < stride)[None, :])
    weight = tl.load(WEIGHTS + row, mask=row_inside, other=0.0)
    left = tl.maximum(1.0 - blocks, LEAST)
    drift = tl.where(left < NEARLY_ALL, SURE, squares / (left * left))
    alone = add_rows(weight[:, None] * drift, ROWS, COLUMNS, PARTS_Q)
    # What is no number comes last here too.
    keys = tl.where(alone == alone, WORST - key_of(alone), WORST)
    _store_keys(KEYS, keys, head, rows, stride, ROWS, COLUMNS)


@triton.jit
def _squared(x, inside, VALUES: tl.constexpr, ROWS: tl.constexpr):
    """Squared lengths of vectors, by pointers `[ROWS]` to them."""
    length = tl.zeros([ROWS], tl.float32)
    for at in range(0, VALUES, 16):
        width = at + tl.arange(0, 16)
        part = tl.load(x[:, None] + width[None, :], mask=inside[:, None] & (width < VALUES)[None, :], other=0.0)
        length += tl.sum(part * part, 1)
    return length


@triton.jit
def _store_keys(KEYS, keys, head, rows, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    to = KEYS + head * rows * stride + (row * stride)[:, None] + column[None, :]
    tl.store(to, keys, mask=(row < rows)[:, None] & (column < stride)[None, :])


@triton.jit(
    do_not_specialize=["rows", "columns"], do_not_specialize_on_alignment=["LENGTHS", "AHEAD", "KEPT", "WEIGHTS"]
)
def change_kernel(
    V, RESIDUAL, LENGTHS, AHEAD, KEPT, WEIGHTS, PROBABILITIES, SQUARES, KEYS, rows, columns, pair_stride, stride,
    VALUES: tl.constexpr, DEPTH: tl.constexpr, PARTS_Q: tl.constexpr, PARTS_K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """Find the drift of each row's output after one more block is restored, or dropped: the less, the less the key.

    Blocks that cannot be get keys too, which mean nothing: to tell them apart here takes more time than later.

    Args:
        V: float32 `[h, T_k * PARTS_K, VALUES]`.
        RESIDUAL: float32 `[h, rows * PARTS_Q, VALUES]`, g.
        LENGTHS: float32 `[h, rows * PARTS_Q]`, g . g.
        AHEAD: float32 `[h, rows * PARTS_Q]`, v . g.
        KEPT: float32 `[h, rows * PARTS_Q]`, K.
        WEIGHTS: float32 `[rows * PARTS_Q]`, what each query sub-block counts.
        PROBABILITIES: see `drift_kernel`, as all that follows.
        SQUARES: see there.
        KEYS: for the keys.
        rows: rows of the chunk in each head.
        columns: T_k.
        pair_stride: of the probabilities.
        stride: of squares and keys.
        VALUES: width of values.
        DEPTH: of a step of the products.
        PARTS_Q: sub-blocks of a query block.
        PARTS_K: sub-blocks of a key block.
        ROWS: rows of a tile.
        COLUMNS: columns of a tile.
        DROPS: whether kept blocks are dropped, or dropped ones restored.
    """
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * (ROWS * PARTS_Q) + tl.arange(0, ROWS * PARTS_Q)
    part = tl.program_id(0) * (COLUMNS * PARTS_K) + tl.arange(0, COLUMNS * PARTS_K)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, part_inside = row < rows * PARTS_Q, part < columns * PARTS_K
    line = head * rows * PARTS_Q + row
    residual = RESIDUAL + head * rows * PARTS_Q * VALUES + row * VALUES
    v = V + head * columns * PARTS_K * VALUES + part * VALUES
    toward = products(residual, v, row_inside, part_inside, VALUES, DEPTH, ROWS * PARTS_Q, COLUMNS * PARTS_K)
    # Bounds are strides, multiples of 16, so that several numbers are loaded at a time.
    p = PROBABILITIES + head * rows * PARTS_Q * pair_stride + (row * pair_stride)[:, None] + part[None, :]
    p = tl.load(p, mask=row_inside[:, None] & (part < pair_stride)[None, :], other=0.0)
    squares = SQUARES + head * rows * PARTS_Q * stride + (row * stride)[:, None] + column[None, :]
    squares = tl.load(squares, mask=row_inside[:, None] & (column < stride)[None, :], other=0.0)
    toward = add_columns(p * toward, ROWS * PARTS_Q, COLUMNS, PARTS_K)
    blocks = add_columns(p, ROWS * PARTS_Q, COLUMNS, PARTS_K)
    length = tl.load(LENGTHS + line, mask=row_inside, other=0.0)[:, None]
    ahead = tl.load(AHEAD + line, mask=row_inside, other=0.0)[:, None]
    kept = tl.load(KEPT + line, mask=row_inside, other=1.0)[:, None]
    weight = tl.load(WEIGHTS + row, mask=row_inside, other=0.0)[:, None]
    along = 2.0 * (blocks * ahead - toward)
    if DROPS:
        drift, share = length + (along + squares), tl.maximum(kept - blocks, LEAST)
    else:
        drift, share = length + (squares - along), tl.maximum(kept + blocks, LEAST)
    drift = drift / (share * share)
    if DROPS:
        drift = tl.where(kept - blocks < kept * NEARLY_ALL, SURE, drift)
    drift = add_rows(weight * drift, ROWS, COLUMNS, PARTS_Q)
    _store_keys(KEYS, key_of(drift), head, rows, stride, ROWS, COLUMNS)
