"""Kernels that divide the budget of a head among its rows, and separate what each row keeps from the rest."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .rows import is_finite, load_keys, nth_largest, row_total, scores_of


@triton.jit(do_not_specialize=["first", "columns", "rows"])
def threshold_kernel(
    SCORES, BUDGETS, KEYS, CUTS, GAINS, first, columns, stride, rows,
    SIZE: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Separate the best of a row, one more than the even share of its head's budget, and tell what the last one adds.

    What it adds is the logarithm of its probability.
    """
    row = first + tl.program_id(0)
    scores = SCORES + tl.program_id(0).to(tl.int64) * stride
    share = tl.load(BUDGETS + row // rows) // rows
    n = tl.minimum(tl.maximum(share, 0) + 1, columns).to(tl.int32)
    largest, total = row_total(scores, columns, stride, TILE)
    keys = load_keys(scores, 0, columns, stride, SIZE)
    key, cut = nth_largest(keys, scores, n, columns, stride, SIZE, WHOLE, TILE)
    gain = scores_of(key) - largest - tl.log(total)
    tl.store(KEYS + row, key)
    tl.store(CUTS + row, cut)
    tl.store(GAINS + row, tl.where(is_finite(largest), gain, float("-inf")))


@triton.jit(do_not_specialize=["columns", "rows"])
def spread_kernel(
    GAINS, BUDGETS, CUTS, COUNTS, columns, rows, SIZE: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr
):
    """Give each row of a head the even share; the remainder to the rows that gain most, ties to the lower row."""
    head = tl.program_id(0)
    start_row = head.to(tl.int64) * rows
    gains = GAINS + start_row
    budget = tl.minimum(tl.maximum(tl.load(BUDGETS + head), 0), rows.to(tl.int64) * columns)
    share, extra = (budget // rows).to(tl.int32), (budget % rows).to(tl.int32)
    keys = load_keys(gains, 0, rows, rows, SIZE)
    key, cut = nth_largest(keys, gains, tl.maximum(extra, 1), rows, rows, SIZE, WHOLE, TILE)
    for start in range(0, rows, TILE):
        places = start + tl.arange(0, TILE)
        inside = places < rows
        part = load_keys(gains, start, rows, rows, TILE)
        more = (extra > 0) & ((part > key) | ((part == key) & (places <= cut)))
        count = tl.maximum(share + more.to(tl.int32), 1)
        at = start_row + places
        # The threshold of a row separates one block more than the even share, if there are as many.
        beyond = tl.minimum(share + 1, columns) - count
        tl.store(CUTS + at, tl.load(CUTS + at, mask=inside, other=0) - beyond, mask=inside)
        tl.store(COUNTS + at, count.to(tl.int64), mask=inside)
