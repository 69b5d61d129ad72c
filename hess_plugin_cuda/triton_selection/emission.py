"""Kernels that write the lists."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .rows import load_keys, nth_largest


@triton.jit
def _emit(scores, out, key, cut, columns, stride, TILE: tl.constexpr):
    """Write the columns of larger keys than `key`, and of that key up to `cut`, ascending, to `out` and onwards.

    Reads the row piece by piece, from the cache mostly: to number the kept ones of 32768 columns at once takes more
    registers than there are.
    """
    done = tl.full([], 0, tl.int32)
    for start in range(0, columns, TILE):
        places = start + tl.arange(0, TILE)
        keys = load_keys(scores, start, columns, stride, TILE)
        keep = ((keys > key) | ((keys == key) & (places <= cut))).to(tl.int32)
        tl.store(out + done + tl.cumsum(keep, 0) - 1, places, mask=keep != 0)
        done += tl.sum(keep, 0)


@triton.jit(do_not_specialize=["first", "columns"])
def emit_kernel(SCORES, KEYS, CUTS, STARTS, COL, first, columns, stride, TILE: tl.constexpr):
    """Write the list of a row whose threshold is known."""
    row = first + tl.program_id(0)
    scores = SCORES + tl.program_id(0).to(tl.int64) * stride
    out = COL + tl.load(STARTS + row)
    _emit(scores, out, tl.load(KEYS + row), tl.load(CUTS + row), columns, stride, TILE)


@triton.jit(do_not_specialize=["first", "columns"])
def choose_kernel(
    SCORES, STARTS, COL, first, columns, stride, SIZE: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr
):
    """Find the threshold of a row whose length is known, and write its list."""
    row = first + tl.program_id(0)
    scores = SCORES + tl.program_id(0).to(tl.int64) * stride
    start = tl.load(STARTS + row)
    n = (tl.load(STARTS + row + 1) - start).to(tl.int32)
    keys = load_keys(scores, 0, columns, stride, SIZE)
    key, cut = nth_largest(keys, scores, n, columns, stride, SIZE, WHOLE, TILE)
    _emit(scores, COL + start, key, cut, columns, stride, TILE)
