"""Rows of scores as the kernels of this package see them: in integer keys, held in registers or read again.

A key is the float's bits as an int32 whose order is that of the floats: -0.0 and 0.0 are one key, NaN counts as -inf.
Everything that decides is an integer comparison, so that no device's rounding, flushing or fast mathematics has a say.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

INFINITY = tl.constexpr(0x7F800000)
"""Key of inf; its negative is the lowest key of a score."""

PAST = tl.constexpr(-0x7FFFFFFF)
"""Key of what is no column, below every score's."""

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def keys_of(scores):
    """Keys of float32 scores."""
    bits = scores.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    keys = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(magnitude > INFINITY, -INFINITY, keys)


@triton.jit
def scores_of(keys):
    """The float32 scores of keys."""
    bits = tl.where(keys < 0, -keys | -0x80000000, keys)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def load_keys(row, start, columns, stride, SIZE: tl.constexpr):
    """Keys of a row's columns `start..start + SIZE`; the row may be read up to `stride`."""
    places = start + tl.arange(0, SIZE)
    # The bound is the stride, of which Triton knows that it is a multiple of 16: loads of 16 bytes.
    scores = tl.load(row + places, mask=places < stride, other=0.0)
    return tl.where(places < columns, keys_of(scores), PAST)


@triton.jit
def load_scores(row, start, columns, stride, SIZE: tl.constexpr):
    """Scores of a row's columns `start..start + SIZE`: -inf for NaN, and for what is no column."""
    keys = load_keys(row, start, columns, stride, SIZE)
    return scores_of(tl.maximum(keys, -INFINITY))


@triton.jit
def count_from(keys, row, key, columns, stride, SIZE: tl.constexpr, WHOLE: tl.constexpr):
    """How many keys of a row are `>= key`.

    Here and below: where the row is `WHOLE`, `keys` holds all of it; else it is read in pieces of `SIZE`.
    """
    if WHOLE:
        count = tl.sum((keys >= key).to(tl.int32), 0)
    else:
        counts = tl.zeros([SIZE], tl.int32)
        for start in range(0, columns, SIZE):
            counts += (load_keys(row, start, columns, stride, SIZE) >= key).to(tl.int32)
        count = tl.sum(counts, 0)
    return count


@triton.jit
def neighbours(keys, row, low, high, columns, stride, SIZE: tl.constexpr, WHOLE: tl.constexpr):
    """The smallest key `>= low` and the largest `< high` of a row."""
    if WHOLE:
        above = tl.min(tl.where(keys >= low, keys, INFINITY), 0)
        below = tl.max(tl.where(keys < high, keys, PAST), 0)
    else:
        least, most = tl.full([SIZE], INFINITY, tl.int32), tl.full([SIZE], PAST, tl.int32)
        for start in range(0, columns, SIZE):
            part = load_keys(row, start, columns, stride, SIZE)
            least = tl.minimum(least, tl.where(part >= low, part, INFINITY))
            most = tl.maximum(most, tl.where(part < high, part, PAST))
        above, below = tl.min(least, 0), tl.max(most, 0)
    return above, below


@triton.jit
def last_tie(row, key, columns, stride, TILE: tl.constexpr):
    """The highest column of a row whose key is `key`. Reads the row again: columns beside keys are many registers."""
    most = tl.zeros([TILE], tl.int32)
    for start in range(0, columns, TILE):
        tied = load_keys(row, start, columns, stride, TILE) == key
        most = tl.maximum(most, tl.where(tied, start + tl.arange(0, TILE), 0))
    return tl.max(most, 0)


@triton.jit
def ties_up_to(row, key, column, columns, stride, TILE: tl.constexpr):
    """How many columns of a row up to `column`, that one included, have the key `key`. Reads the row again."""
    counts = tl.zeros([TILE], tl.int32)
    for start in range(0, column + 1, TILE):
        tied = load_keys(row, start, columns, stride, TILE) == key
        counts += (tied & (start + tl.arange(0, TILE) <= column)).to(tl.int32)
    return tl.sum(counts, 0)


@triton.jit
def row_total(row, columns, stride, TILE: tl.constexpr):
    """Largest score m of a row, and the sum of exp(score - m), which is finite if m is."""
    most = tl.full([TILE], float("-inf"), tl.float32)
    for start in range(0, columns, TILE):
        most = tl.maximum(most, load_scores(row, start, columns, stride, TILE))
    largest = tl.max(most, 0)
    totals = tl.zeros([TILE], tl.float32)
    for start in range(0, columns, TILE):
        totals += weights_of(load_scores(row, start, columns, stride, TILE), largest)
    return largest, tl.sum(totals, 0)


@triton.jit
def weights_of(scores, largest):
    """exp(score - largest), in 0..1 where the largest score is finite."""
    return tl.exp2((scores - largest) * LOG2_E)


@triton.jit
def is_finite(score):
    """Whether a float32 is neither infinite nor NaN."""
    return (score.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < INFINITY


@triton.jit
def nth_largest(keys, row, n, columns, stride, SIZE: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr):
    """Find what separates the n largest of a row from the rest, ties to the lower column, by bisection.

    Args:
        keys: of the whole row, or anything where it is read in pieces.
        row: pointer to the row's scores.
        n: 1..columns.
        columns: of the row.
        stride: of the rows of scores.
        SIZE: keys at once, at least `columns` where the row is whole.
        WHOLE: whether `keys` holds the row.
        TILE: columns at once where it is read again.

    Returns:
        key: of the n-th largest score.
        cut: its column. The n largest are the columns of larger keys, and those of this key up to the cut; so the
            n - 1 largest are the same with `cut - 1`.
    """
    # At least n keys are >= low, fewer are >= high.
    low, high = tl.full([], -INFINITY, tl.int32), tl.full([], INFINITY + 1, tl.int32)
    from_low, from_high = columns, tl.full([], 0, tl.int32)
    middle = (low & high) + ((low ^ high) >> 1)  # rounded down, where low + high would overflow
    # Over once a bound separates exactly n or n - 1 keys: half as many steps for real scores as for the last bit.
    while (from_low > n) & (from_high < n - 1) & (middle > low):
        count = count_from(keys, row, middle, columns, stride, SIZE, WHOLE)
        enough = count >= n
        low, from_low = tl.where(enough, middle, low), tl.where(enough, count, from_low)
        high, from_high = tl.where(enough, high, middle), tl.where(enough, from_high, count)
        middle = (low & high) + ((low ^ high) >> 1)
    above, below = neighbours(keys, row, low, high, columns, stride, SIZE, WHOLE)
    key = tl.where(from_low == n, above, below)
    above = count_from(keys, row, key + 1, columns, stride, SIZE, WHOLE)
    tied = count_from(keys, row, key, columns, stride, SIZE, WHOLE) - above
    right = last_tie(row, key, columns, stride, TILE)
    left = tl.where(above + tied == n, right, 0)
    while left < right:
        middle = (left + right) // 2
        enough = ties_up_to(row, key, middle, columns, stride, TILE) >= n - above
        left, right = tl.where(enough, left, middle + 1), tl.where(enough, middle, right)
    return key, right
