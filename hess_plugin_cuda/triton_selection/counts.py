"""The kernel of the uniform rule: how many blocks cover a share of a row's probability."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .rows import is_finite, load_scores, row_total, weights_of


@triton.jit
def _mass_from(weights, row, largest, bits, columns, stride, SIZE: tl.constexpr, WHOLE: tl.constexpr):
    """Sum and number of a row's weights whose bits are `>= bits`; whole, `weights` holds them all."""
    if WHOLE:
        chosen = weights.to(tl.int32, bitcast=True) >= bits
        mass, count = tl.sum(tl.where(chosen, weights, 0.0), 0), tl.sum(chosen.to(tl.int32), 0)
    else:
        masses, counts = tl.zeros([SIZE], tl.float32), tl.zeros([SIZE], tl.int32)
        for start in range(0, columns, SIZE):
            part = weights_of(load_scores(row, start, columns, stride, SIZE), largest)
            chosen = part.to(tl.int32, bitcast=True) >= bits
            masses += tl.where(chosen, part, 0.0)
            counts += chosen.to(tl.int32)
        mass, count = tl.sum(masses, 0), tl.sum(counts, 0)
    return mass, count


@triton.jit(do_not_specialize=["first", "columns", "least"])
def count_kernel(
    SCORES, COUNTS, first, columns, stride, share, least, SIZE: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr
):
    """Count the leading blocks of a row whose cumulative probability stays within `share`; `least` at least.

    Weights exp(score - largest) lie in 0..1, where the order of their bits is their own. A sum in a fixed order never
    falls when a term grows, so that bisection is sound although float32 sums are not exact.
    """
    row = first + tl.program_id(0)
    scores = SCORES + tl.program_id(0).to(tl.int64) * stride
    largest, total = row_total(scores, columns, stride, TILE)
    weights = weights_of(load_scores(scores, 0, columns, stride, SIZE), largest)
    limit = share * total
    # From `low` on the weights exceed the limit, from `high` on they do not: there are none from 2.0 on.
    low, high = tl.full([], 0, tl.int32), tl.full([], 0x40000000, tl.int32)
    while high - low > 1:
        middle = (low + high) // 2
        mass, _ = _mass_from(weights, scores, largest, middle, columns, stride, SIZE, WHOLE)
        low, high = tl.where(mass > limit, middle, low), tl.where(mass > limit, high, middle)
    mass, count = _mass_from(weights, scores, largest, high, columns, stride, SIZE, WHOLE)
    _, tied = _mass_from(weights, scores, largest, low, columns, stride, SIZE, WHOLE)
    # Of the weights equal to `low` as many as still fit, which is not all of them.
    room = tl.floor((limit - mass) / low.to(tl.float32, bitcast=True))
    count += tl.minimum(tl.maximum(room, 0.0), (tied - count - 1).to(tl.float32)).to(tl.int32)
    # A row that no softmax ranks (nothing but -inf, or an inf) has no probability to cover, and keeps everything.
    count = tl.where((total > limit) & is_finite(largest), tl.minimum(tl.maximum(count, least), columns), columns)
    tl.store(COUNTS + row, count.to(tl.int64))
