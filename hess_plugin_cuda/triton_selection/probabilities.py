"""Kernels of the probabilities that queries give to pooled and special keys, and of what they say together."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .rows import LOG2_E, is_finite

LARGEST = tl.constexpr(3.4028234663852886e38)
"""The largest float32, as which an infinite score counts."""

PRECISION = tl.constexpr("tf32x3")
"""Of the products: three of TF32 for one of float32, an error of some 2^-21 for 2^-24. A plain product of TF32, or
three of bfloat16, would choose other blocks in some rows; products on the general cores take twice the time."""


@triton.jit
def products(
    left, right, left_inside, right_inside,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Products of vectors with vectors, `[ROWS, COLUMNS]`.

    Args:
        left: pointers `[ROWS]` to the first numbers of vectors.
        right: pointers `[COLUMNS]`, likewise.
        left_inside: bool `[ROWS]`; the others count as zeros.
        right_inside: bool `[COLUMNS]`, likewise.
        WIDTH: length of a vector.
        DEPTH: numbers at once.
        ROWS: vectors on the left.
        COLUMNS: vectors on the right.
    """
    depth = tl.arange(0, DEPTH)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, WIDTH, DEPTH):
        inside = start + depth < WIDTH
        a = tl.load(left[:, None] + (start + depth)[None, :], mask=left_inside[:, None] & inside[None, :], other=0.0)
        b = tl.load(right[None, :] + (start + depth)[:, None], mask=right_inside[None, :] & inside[:, None], other=0.0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    return sums


@triton.jit
def clean(scores, inside):
    """Scores with -inf for NaN and for what is not inside, and no inf."""
    scores = tl.where(inside & (scores == scores), scores, float("-inf"))
    return tl.minimum(scores, LARGEST)


@triton.jit
def _add(scores, v, inside, top, total, sums, PADDED_INSIDE):
    """One step of the online softmax: largest score, sum of the exponentials, and values weighted by them."""
    new = tl.maximum(top, tl.max(scores, 1))
    against = tl.where(new == float("-inf"), 0.0, new)
    shrink = tl.exp2((top - against) * LOG2_E)
    p = tl.exp2((scores - against[:, None]) * LOG2_E)
    values = tl.load(v, mask=inside[:, None] & PADDED_INSIDE[None, :], other=0.0)
    total = total * shrink + tl.sum(p, 1)
    sums = tl.dot(p, values, sums * shrink[:, None], input_precision=PRECISION)
    return new, shrink, total, sums


@triton.jit(
    do_not_specialize=["rows", "columns", "specials"],
    do_not_specialize_on_alignment=["SPECIAL_K", "SPECIAL_V", "TOP", "INVERSE", "SPECIAL_OUT", "SPECIAL_SHARE"],
)
def attend_kernel(
    Q, K, V, SPECIAL_K, SPECIAL_V, BIAS, TOP, INVERSE, OUT, SPECIAL_OUT, SPECIAL_SHARE, rows, columns, specials,
    WIDTH: tl.constexpr, VALUES: tl.constexpr, PADDED: tl.constexpr, DEPTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Attention of some queries of a head to all pooled and special keys.

    Args:
        Q: float32 `[h, rows, WIDTH]`, times the scale. All tensors are contiguous.
        K: float32 `[h, columns, WIDTH]`, pooled keys.
        V: float32 `[h, columns, VALUES]`, their values.
        SPECIAL_K: float32 `[h, specials, WIDTH]`.
        SPECIAL_V: float32 `[h, specials, VALUES]`.
        BIAS: float32 `[columns]`, added to the scores of pooled keys.
        TOP: float32 `[h, rows]`, for the largest score.
        INVERSE: float32 `[h, rows]`, for 1 / sum of exp(score - largest score), or 0 where no score is finite.
        OUT: float32 `[h, rows, VALUES]`, for the values weighted by the probabilities.
        SPECIAL_OUT: float32 `[h, rows, VALUES]`, for the part of the special keys in it.
        SPECIAL_SHARE: float32 `[h, rows]`, for the probability of the special keys.
        rows: queries of a head.
        columns: pooled keys of a head.
        specials: special keys of a head.
        WIDTH: of queries and keys.
        VALUES: width of values.
        PADDED: the next power of two.
        DEPTH: of a step of the products.
        ROWS: queries of a program.
        COLUMNS: keys of a step.
    """
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    width = tl.arange(0, PADDED)
    row_inside, width_inside = row < rows, width < VALUES
    q = Q + (head * rows + row) * WIDTH
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(0, specials, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < specials
        k = SPECIAL_K + (head * specials + column) * WIDTH
        v = SPECIAL_V + ((head * specials + column) * VALUES)[:, None] + width[None, :]
        scores = products(q, k, row_inside, inside, WIDTH, DEPTH, ROWS, COLUMNS)
        scores = clean(scores, inside[None, :])
        top, shrink, total, sums = _add(scores, v, inside, top, total, sums, width_inside)
    special, special_sums = total, sums
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < columns
        k = K + (head * columns + column) * WIDTH
        v = V + ((head * columns + column) * VALUES)[:, None] + width[None, :]
        bias = tl.load(BIAS + column, mask=inside, other=0.0)
        scores = products(q, k, row_inside, inside, WIDTH, DEPTH, ROWS, COLUMNS) + bias[None, :]
        scores = clean(scores, inside[None, :])
        top, shrink, total, sums = _add(scores, v, inside, top, total, sums, width_inside)
        special *= shrink
        special_sums *= shrink[:, None]
    everything = total + special
    # Nothing but -inf has no probabilities: zeros leave all blocks of the row equal.
    ranked = is_finite(top) & (everything > 0.0)
    inverse = tl.where(ranked, tl.div_rn(1.0, tl.where(ranked, everything, 1.0)), 0.0)
    at = head * rows + row
    tl.store(TOP + at, tl.where(ranked, top, 0.0), mask=row_inside)
    tl.store(INVERSE + at, inverse, mask=row_inside)
    tl.store(SPECIAL_SHARE + at, special * inverse, mask=row_inside)
    to = (at * VALUES)[:, None] + width[None, :]
    inside = row_inside[:, None] & width_inside[None, :]
    tl.store(OUT + to, (sums + special_sums) * inverse[:, None], mask=inside)
    tl.store(SPECIAL_OUT + to, special_sums * inverse[:, None], mask=inside)


@triton.jit
def probabilities(scores, top, inverse):
    """Probabilities of clean scores, by what `attend_kernel` says of their rows."""
    # Products of another depth are rounded otherwise: a score may be above the largest by far if all are huge.
    weights = tl.exp2(tl.minimum(scores - top[:, None], 0.0) * LOG2_E)
    # A row without probabilities has an inverse of 0, which would not silence an infinite weight.
    return tl.where(inverse[:, None] > 0.0, weights * inverse[:, None], 0.0)
