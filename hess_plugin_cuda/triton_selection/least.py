"""The least keys of a row: which can be chosen, what separates the n least from the rest, and their list.

Keys are integers that are not negative. A STEP of 0 chooses among all columns of a row, 1 among those that are not
kept, 2 among those that are.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .drifts import NONE


@triton.jit
def load_keys(keys, states, start, columns, stride, STEP: tl.constexpr, SIZE: tl.constexpr):
    """Keys of a row's columns `start..start + SIZE`, NONE for those that cannot be chosen."""
    places = start + tl.arange(0, SIZE)
    # The bound is the stride, of which Triton knows that it is a multiple of 16: loads of 16 bytes.
    found = tl.load(keys + places, mask=places < stride, other=NONE)
    can = places < columns
    if STEP != 0:
        kept = tl.load(states + places, mask=places < stride, other=0) < 0
        can &= kept == (STEP == 2)
    return tl.where(can, found, NONE)


@triton.jit
def count_up_to(
    first, rest, limit, keys, states, columns, stride, STEP: tl.constexpr,
    SIZE: tl.constexpr, REST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """How many keys of a row are `<= limit`.

    Here and below: where the row is `WHOLE`, `first` and, if there are more, `rest` hold all of it; else it is read in
    pieces of `SIZE`.
    """
    if WHOLE:
        count = tl.sum((first <= limit).to(tl.int32), 0)
        if REST > 0:
            count += tl.sum((rest <= limit).to(tl.int32), 0)
    else:
        counts = tl.zeros([SIZE], tl.int32)
        for start in range(0, columns, SIZE):
            counts += (load_keys(keys, states, start, columns, stride, STEP, SIZE) <= limit).to(tl.int32)
        count = tl.sum(counts, 0)
    return count


@triton.jit
def bounds(
    first, rest, n, keys, states, columns, stride, STEP: tl.constexpr,
    SIZE: tl.constexpr, REST: tl.constexpr, WHOLE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The least key of a row, and one that n keys at least do not exceed.

    The n-th least of the minima of groups of keys is one, and close to the n-th least key where n is small.
    """
    if WHOLE:
        minima = tl.min(tl.reshape(first, [SIZE // GROUPS, GROUPS]), 0)
        high = tl.max(tl.where(first < NONE, first, -1), 0)
        least = tl.min(minima, 0)
        if REST > 0:
            high = tl.maximum(high, tl.max(tl.where(rest < NONE, rest, -1), 0))
            least = tl.minimum(least, tl.min(rest, 0))
    else:
        minima, highs = tl.full([GROUPS], NONE, tl.int32), tl.full([SIZE], -1, tl.int32)
        for start in range(0, columns, SIZE):
            part = load_keys(keys, states, start, columns, stride, STEP, SIZE)
            minima = tl.minimum(minima, tl.min(tl.reshape(part, [SIZE // GROUPS, GROUPS]), 0))
            highs = tl.maximum(highs, tl.where(part < NONE, part, -1))
        least, high = tl.min(minima, 0), tl.max(highs, 0)
    low, from_high = least - 1, tl.sum((minima <= high).to(tl.int32), 0)
    if from_high >= n:
        while (from_high != n) & (high - low > 1):
            middle = low + (high - low) // 2
            count = tl.sum((minima <= middle).to(tl.int32), 0)
            enough = count >= n
            low, high = tl.where(enough, low, middle), tl.where(enough, middle, high)
            from_high = tl.where(enough, count, from_high)
    return least, high


@triton.jit
def ties_up_to(keys, states, key, column, columns, stride, STEP: tl.constexpr, TILE: tl.constexpr):
    """How many columns of a row up to `column`, that one included, have the key `key`. Reads the row again."""
    counts = tl.zeros([TILE], tl.int32)
    for start in range(0, column + 1, TILE):
        tied = load_keys(keys, states, start, columns, stride, STEP, TILE) == key
        counts += (tied & (start + tl.arange(0, TILE) <= column)).to(tl.int32)
    return tl.sum(counts, 0)


@triton.jit
def nth_least(
    first, rest, n, keys, states, columns, stride, STEP: tl.constexpr,
    SIZE: tl.constexpr, REST: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Find what separates the n least keys of a row from the rest, ties to the lower column, by bisection.

    Args:
        first: keys of the first columns.
        rest: keys of the others, if there are.
        n: 1 and up to the number of keys that are not NONE.
        keys: pointer to the keys of the row.
        states: pointer to its states.
        columns: of the row.
        stride: up to which it may be read.
        STEP: of the round.
        SIZE: keys at once.
        REST: keys beside them, where the row is longer; 0 for none.
        WHOLE: whether that is all of the row.
        TILE: columns at once where it is read again.
        GROUPS: of which minima are found.

    Returns:
        key: the n least are the columns of smaller keys, and those of this key up to the cut.
        cut: a column, or `columns` where all are.
    """
    least, high = bounds(first, rest, n, keys, states, columns, stride, STEP, SIZE, REST, WHOLE, GROUPS)
    # Fewer than n keys are <= low, at least n are <= high. Over once a bound separates exactly n: half as many steps
    # for real drifts as for the last bit.
    low, from_low = least - 1, tl.full([], 0, tl.int32)
    from_high = count_up_to(first, rest, high, keys, states, columns, stride, STEP, SIZE, REST, WHOLE)
    while (from_high != n) & (high - low > 1):
        middle = low + (high - low) // 2
        count = count_up_to(first, rest, middle, keys, states, columns, stride, STEP, SIZE, REST, WHOLE)
        enough = count >= n
        low, from_low = tl.where(enough, low, middle), tl.where(enough, from_low, count)
        high, from_high = tl.where(enough, middle, high), tl.where(enough, count, from_high)
    left, right = tl.full([], 0, tl.int32), columns
    if from_high != n:
        right = columns - 1
        while left < right:
            middle = (left + right) // 2
            tied = ties_up_to(keys, states, high, middle, columns, stride, STEP, TILE)
            enough = tied >= n - from_low
            left, right = tl.where(enough, left, middle + 1), tl.where(enough, middle, right)
    return high, right


@triton.jit
def mark(
    keys, states, listed, key, cut, columns, stride, STEP: tl.constexpr, REFINED: tl.constexpr, TILE: tl.constexpr
):
    """List the columns that have a smaller key, or this one up to the cut; a start with swaps writes all states.

    Reads the row again, from the cache mostly: to number all its columns at once takes more registers than there are.
    """
    done = tl.full([], 0, tl.int32)
    for start in range(0, columns, TILE):
        places = start + tl.arange(0, TILE)
        found = load_keys(keys, states, start, columns, stride, STEP, TILE)
        chosen = (found < tl.where(places <= cut, key + 1, key)).to(tl.int32)
        number = tl.sum(chosen, 0)
        if number > 0:
            tl.store(listed + done + tl.cumsum(chosen, 0) - 1, places, mask=chosen != 0)
            done += number
        if REFINED and STEP == 0:
            tl.store(states + places, (chosen * -127).to(tl.int8), mask=places < stride)
