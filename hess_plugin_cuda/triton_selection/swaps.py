"""Kernels that choose the blocks of the least keys of a row, one program a row, and say what its output then is."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .drifts import LEAST
from .least import load_keys, mark, nth_least


@triton.jit
def swapped(count, columns, turn):
    """How many blocks a round restores and drops: count * 2^-(turn + 2) rounded half to even, one at least."""
    half = tl.full([], 1, tl.int32) << (turn + 1)
    number, rest = count >> (turn + 2), count & (2 * half - 1)
    number += ((rest > half) | ((rest == half) & ((number & 1) == 1))).to(tl.int32)
    return tl.minimum(tl.maximum(number, 1), tl.minimum(count, columns - count))


@triton.jit
def toggle(listed, number, states, turn, N: tl.constexpr):
    """Turn the states of the listed columns: the sign says what is kept now, bit t + 1 what round t has turned."""
    for start in range(0, number, N):
        places = start + tl.arange(0, N)
        at = states + tl.load(listed + places, mask=places < number, other=0)
        state = tl.load(at, mask=places < number, other=0).to(tl.int32)
        tl.store(at, (state ^ (0x80 | (2 << turn))).to(tl.int8), mask=places < number)


@triton.jit
def gather(
    listed, number, p, v,
    VALUES: tl.constexpr, PADDED: tl.constexpr, PARTS_K: tl.constexpr, TAKEN: tl.constexpr,
):  # fmt: skip
    """Sums of p u and of p over the listed columns, `[PADDED]` and a number."""
    width = tl.arange(0, PADDED)
    sums, shares = tl.zeros([TAKEN, PADDED], tl.float32), tl.zeros([TAKEN], tl.float32)
    for start in range(0, number * PARTS_K, TAKEN):
        places = start + tl.arange(0, TAKEN)
        inside = places < number * PARTS_K
        part = tl.load(listed + places // PARTS_K, mask=inside, other=0) * PARTS_K + places % PARTS_K
        weights = tl.load(p + part, mask=inside, other=0.0)
        at = v + (part * VALUES)[:, None] + width[None, :]
        u = tl.load(at, mask=inside[:, None] & (width < VALUES)[None, :], other=0.0)
        sums += weights[:, None] * u
        shares += weights
    return tl.sum(sums, 0), tl.sum(shares, 0)


@triton.jit(
    do_not_specialize=["columns", "turn"],
    do_not_specialize_on_alignment=["COUNTS", "STARTS", "SPECIAL_SHARE", "WEIGHTS", "LENGTHS", "AHEAD", "KEPT"],
)
def swap_kernel(
    KEYS, STATES, COUNTS, STARTS, COL, PROBABILITIES, V, OUT, SPECIAL_OUT, SPECIAL_SHARE, WEIGHTS,
    RESIDUAL, LENGTHS, AHEAD, KEPT, DRIFT, BEST, columns, pair_stride, stride, turn,
    VALUES: tl.constexpr, PADDED: tl.constexpr, PARTS_Q: tl.constexpr, PARTS_K: tl.constexpr, TAKEN: tl.constexpr,
    STEP: tl.constexpr, REFINED: tl.constexpr,
    SIZE: tl.constexpr, REST: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Keep, restore or drop the blocks of the least keys of a row; then find its residual and its drift.

    Args:
        KEYS: int32 `[h, rows, stride]`, not negative.
        STATES: int8 `[h, rows, stride]`: bit 0 says what is kept at the start, bit t + 1 whether round t has turned
            that, and the sign what is kept now.
        COUNTS: int64 `[h, rows]`, blocks that each row keeps.
        STARTS: int64 `[h, rows]`, where the row's list will start in COL: until then the room is used for others.
        COL: int32, room for the lists.
        PROBABILITIES: float32 `[h, rows * PARTS_Q, pair_stride]`.
        V: float32 `[h, T_k * PARTS_K, VALUES]`.
        OUT: of `attend_kernel`, for the queries of the chunk; so are the next two.
        SPECIAL_OUT: see there.
        SPECIAL_SHARE: see there.
        WEIGHTS: float32 `[rows * PARTS_Q]`, what each query sub-block counts.
        RESIDUAL: float32 `[h, rows * PARTS_Q, VALUES]`, g.
        LENGTHS: float32 `[h, rows * PARTS_Q]`, g . g.
        AHEAD: float32 `[h, rows * PARTS_Q]`, v . g.
        KEPT: float32 `[h, rows * PARTS_Q]`, K.
        DRIFT: float32 `[h, rows]`, least J so far.
        BEST: int32 `[h, rows]`, after how many rounds that was.
        columns: T_k.
        pair_stride: of the probabilities.
        stride: of keys and states.
        turn: number of the round.
        VALUES: width of values.
        PADDED: the next power of two.
        PARTS_Q: sub-blocks of a query block.
        PARTS_K: sub-blocks of a key block.
        TAKEN: key sub-blocks that are added at once.
        STEP: 0 keeps the blocks of a start, 1 restores, 2 drops.
        REFINED: whether swaps follow a start; the list of one without them is the result.
        SIZE: see `nth_least`; so are the others.
        REST: see there.
        WHOLE: see there.
        TILE: see there.
        GROUPS: see there.
    """
    head, rows = tl.program_id(1).to(tl.int64), tl.num_programs(0)
    row, line = tl.program_id(0), head * rows + tl.program_id(0)
    count = tl.load(COUNTS + line).to(tl.int32)
    number = count if STEP == 0 else swapped(count, columns, turn)
    if number > 0:
        keys, states, listed = KEYS + line * stride, STATES + line * stride, COL + tl.load(STARTS + line)
        first = load_keys(keys, states, 0, columns, stride, STEP, SIZE)
        rest = load_keys(keys, states, SIZE, columns, stride, STEP, REST) if REST > 0 else first
        key, cut = nth_least(first, rest, number, keys, states, columns, stride, STEP, SIZE, REST, WHOLE, TILE, GROUPS)
        mark(keys, states, listed, key, cut, columns, stride, STEP, REFINED, TILE)
        if REFINED:
            tl.debug_barrier()  # what some threads have listed others read
            if STEP != 0:
                toggle(listed, number, states, turn, 32)
            drift = tl.full([], 0.0, tl.float32)
            for part in range(PARTS_Q):
                drift += _settle(
                    listed, number, PROBABILITIES, V + head * columns * PARTS_K * VALUES, OUT, SPECIAL_OUT,
                    SPECIAL_SHARE, RESIDUAL, LENGTHS, AHEAD, KEPT, tl.load(WEIGHTS + row * PARTS_Q + part),
                    line * PARTS_Q + part, pair_stride, VALUES, PADDED, PARTS_K, TAKEN, STEP,
                )  # fmt: skip
            if STEP == 0:
                tl.store(DRIFT + line, drift)
                tl.store(BEST + line, 0)
            if STEP == 2:
                least = tl.load(DRIFT + line)
                tl.debug_barrier()  # none may write it before all have read it
                if drift < least:
                    tl.store(DRIFT + line, drift)
                    tl.store(BEST + line, turn + 1)


@triton.jit
def _settle(
    listed, number, PROBABILITIES, v, OUT, SPECIAL_OUT, SPECIAL_SHARE, RESIDUAL, LENGTHS, AHEAD, KEPT, weight, at,
    pair_stride, VALUES: tl.constexpr, PADDED: tl.constexpr, PARTS_K: tl.constexpr, TAKEN: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Residual of a query sub-block once the listed blocks are kept, restored or dropped; returns its part of J."""
    sums, share = gather(listed, number, PROBABILITIES + at * pair_stride, v, VALUES, PADDED, PARTS_K, TAKEN)
    width = tl.arange(0, PADDED)
    to, inside = at * VALUES + width, width < VALUES
    out = tl.load(OUT + to, mask=inside, other=0.0)
    if STEP == 0:
        kept = tl.load(SPECIAL_SHARE + at) + share
        g = tl.load(SPECIAL_OUT + to, mask=inside, other=0.0) + sums - kept * out
    else:
        kept, g = tl.load(KEPT + at), tl.load(RESIDUAL + to, mask=inside, other=0.0)
        # Several threads may hold one number: none may write it before all have read it.
        tl.debug_barrier()
        moved = share * out - sums
        if STEP == 1:
            kept, g = kept + share, g - moved
        else:
            kept, g = kept - share, g + moved
    length = tl.sum(g * g, 0)
    tl.store(RESIDUAL + to, g, mask=inside)
    tl.store(KEPT + at, kept)
    tl.store(LENGTHS + at, length)
    tl.store(AHEAD + at, tl.sum(out * g, 0))
    share = tl.maximum(kept, LEAST)
    return weight * tl.div_rn(length, share * share)


@triton.jit(do_not_specialize=["columns"], do_not_specialize_on_alignment=["STARTS"])
def list_kernel(STATES, BEST, STARTS, COL, columns, stride, TILE: tl.constexpr):
    """Write the list of a row's best state: what the bits up to it, an odd number of them set, say is kept."""
    line = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    states, best = STATES + line * stride, tl.load(BEST + line)
    out = COL + tl.load(STARTS + line)
    done = tl.full([], 0, tl.int32)
    for start in range(0, columns, TILE):
        places = start + tl.arange(0, TILE)
        state = tl.load(states + places, mask=places < columns, other=0).to(tl.int32)
        state &= (2 << best) - 1
        state ^= state >> 4
        state ^= state >> 2
        keep = (state ^ (state >> 1)) & 1
        tl.store(out + done + tl.cumsum(keep, 0) - 1, places, mask=keep != 0)
        done += tl.sum(keep, 0)
