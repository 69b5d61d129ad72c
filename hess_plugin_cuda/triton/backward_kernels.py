"""The backward kernels: gradients of queries along the lists, gradients of keys and values along the transposed ones.

Both compute the probabilities again from the log-sum-exp. Neither adds to memory that another program writes, so two
runs give the same bits.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments of kernels are described in words: to a type checker, the language of Triton has no types.

from __future__ import annotations

import triton
import triton.language as tl

from .entries import last_step, row_entries, step_start


@triton.jit
def query_step(q, k, v, flow, lse, delta, ok, sums, scale, MASKED: tl.constexpr, UPCAST: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """Add to the gradient of queries q `[M, d]`, but for the scale, what keys k `[N, d]` contribute."""
    if UPCAST:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = tl.exp2(scores * scale - lse[:, None])
    if MASKED:
        p = tl.where(ok[None, :], p, 0.0)
    slope = tl.dot(flow, tl.trans(v), input_precision=PRECISION)
    slope = p * (slope - delta[:, None])
    if not UPCAST:
        slope = slope.to(k.dtype)
    return tl.dot(slope, k, sums, input_precision=PRECISION)


@triton.jit
def key_step(k, v, q, flow, lse, delta, ok, k_sums, v_sums, scale, MASKED: tl.constexpr, UPCAST: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """Add to the gradients of keys k `[N, d]`, but for the scale, and of values what queries q `[M, d]` contribute."""
    kind = q.dtype
    if UPCAST:
        q = q.to(tl.float32)
        flow = flow.to(tl.float32)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    p = tl.exp2(scores * scale - lse[None, :])
    if MASKED:
        p = tl.where(ok[None, :], p, 0.0)
    rounded = p.to(kind)
    if UPCAST:
        rounded = rounded.to(tl.float32)
    v_sums = tl.dot(rounded, flow, v_sums, input_precision=PRECISION)
    slope = tl.dot(v, tl.trans(flow), input_precision=PRECISION)
    slope = p * (slope - delta[None, :])
    if not UPCAST:
        slope = slope.to(kind)
    return tl.dot(slope, q, k_sums, input_precision=PRECISION), v_sums


@triton.jit(
    do_not_specialize=["heads", "row_blocks", "per_head", "query_patches", "queries", "key_patches", "keys"],
)
def query_kernel(
    Q, K, V, OUT, FLOW, LSE, DELTA, Q_GRAD, POINTER, COLUMNS, ORDER, scale, factor,
    q_item: tl.int64, q_head: tl.int64, q_token: tl.int32,
    k_item: tl.int64, k_head: tl.int64, k_token: tl.int32,
    v_item: tl.int64, v_head: tl.int64, v_token: tl.int32,
    out_item: tl.int64, out_head: tl.int64, out_token: tl.int32,
    flow_item: tl.int64, flow_head: tl.int64, flow_token: tl.int32,
    grad_item: tl.int64, grad_head: tl.int64, grad_token: tl.int32,
    heads: tl.int32, row_blocks: tl.int32, per_head: tl.int32, query_patches: tl.int32, queries: tl.int32,
    key_patches: tl.int32, keys: tl.int32,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write one tile of the gradient of q, and of DELTA, which `key_kernel` reads.

    Args:
        FLOW: gradient of the output, `[B, H, queries, WIDTH]`.
        DELTA: float32 `[B, H, queries]`, contiguous: for each query the product of OUT and FLOW.
        Q_GRAD: gradient of q, by strides `grad_*`.
        scale: from q . k to the exponent of 2.
        factor: from q . k to the score.
        (the others as in `forward_kernel`)
    """
    work = tl.load(ORDER + tl.program_id(0))
    pair = work // per_head
    block = work % per_head
    item = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    pair = pair.to(tl.int64)
    K += item * k_item + head * k_head
    V += item * v_item + head * v_head
    is_listed = block < row_blocks
    first, listed, full, entries, base, ragged = row_entries(
        POINTER, COLUMNS, pair * row_blocks + block, is_listed, key_patches, keys, BLOCK
    )
    first_query = tl.where(is_listed, block * ROWS, query_patches + (block - row_blocks) * ROWS)
    rows = tl.arange(0, ROWS)
    width = tl.arange(0, WIDTH)
    inside = first_query + rows < tl.where(is_listed, query_patches, queries)
    first_query = first_query.to(tl.int64)
    Q += item * q_item + head * q_head + first_query * q_token
    q = tl.load(Q + rows[:, None] * q_token + width[None, :], mask=inside[:, None], other=0.0)
    OUT += item * out_item + head * out_head + first_query * out_token
    out = tl.load(OUT + rows[:, None] * out_token + width[None, :], mask=inside[:, None], other=0.0)
    FLOW += item * flow_item + head * flow_head + first_query * flow_token
    flow = tl.load(FLOW + rows[:, None] * flow_token + width[None, :], mask=inside[:, None], other=0.0)
    delta = tl.sum(out.to(tl.float32) * flow.to(tl.float32), 1)
    tl.store(DELTA + pair * queries + first_query + rows, delta, mask=inside)
    lse = tl.load(LSE + pair * queries + first_query + rows, mask=inside, other=0.0) * 1.4426950408889634
    if UPCAST:
        q = q.to(tl.float32)
        flow = flow.to(tl.float32)

    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    SPLIT: tl.constexpr = BLOCK // STEP
    steps = full * SPLIT
    places = tl.arange(0, STEP)
    k_inner = places[:, None] * k_token + width[None, :]
    v_inner = places[:, None] * v_token + width[None, :]
    start = step_start(COLUMNS, 0, first, listed, base, BLOCK, STEP).to(tl.int64)
    for step in range(0, steps):  # see forward_kernel
        k = tl.load(K + start * k_token + k_inner)
        v = tl.load(V + start * v_token + v_inner)
        start = step_start(COLUMNS, step + 1, first, listed, base, BLOCK, STEP).to(tl.int64)
        sums = query_step(q, k, v, flow, lse, delta, None, sums, scale, False, UPCAST, PRECISION)
    for step in tl.range(steps, entries * SPLIT, num_stages=1):
        start, end = last_step(COLUMNS, step, first, listed, full, base, ragged, key_patches, keys, BLOCK, STEP)
        ok = places < end - start
        start = start.to(tl.int64)
        k = tl.load(K + start * k_token + k_inner, mask=ok[:, None], other=0.0)
        v = tl.load(V + start * v_token + v_inner, mask=ok[:, None], other=0.0)
        sums = query_step(q, k, v, flow, lse, delta, ok, sums, scale, True, UPCAST, PRECISION)

    Q_GRAD += item * grad_item + head * grad_head + first_query * grad_token
    grad = (sums * factor).to(Q_GRAD.dtype.element_ty)
    tl.store(Q_GRAD + rows[:, None] * grad_token + width[None, :], grad, mask=inside[:, None])


@triton.jit(
    do_not_specialize=["heads", "row_blocks", "per_head", "query_patches", "queries", "key_patches", "keys"],
)
def key_kernel(
    Q, K, V, FLOW, LSE, DELTA, K_GRAD, V_GRAD, POINTER, ROWS_OF, ORDER, scale, factor,
    q_item: tl.int64, q_head: tl.int64, q_token: tl.int32,
    k_item: tl.int64, k_head: tl.int64, k_token: tl.int32,
    v_item: tl.int64, v_head: tl.int64, v_token: tl.int32,
    flow_item: tl.int64, flow_head: tl.int64, flow_token: tl.int32,
    k_grad_item: tl.int64, k_grad_head: tl.int64, k_grad_token: tl.int32,
    v_grad_item: tl.int64, v_grad_head: tl.int64, v_grad_token: tl.int32,
    heads: tl.int32, row_blocks: tl.int32, per_head: tl.int32, query_patches: tl.int32, queries: tl.int32,
    key_patches: tl.int32, keys: tl.int32,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write one tile of the gradients of k and v.

    Args:
        POINTER: int64, starts of the transposed lists: for each key block the query blocks that keep it.
        ROWS_OF: int32, those query blocks.
        ORDER: int32 `[programs]`, the work item of each program, tiles of keys.
        row_blocks: patch key blocks of one item and head, one transposed list each.
        ROWS: keys of a tile and of a key block.
        BLOCK: queries of a query block.
        STEP: queries of a step, at most BLOCK.
        (the others as in `query_kernel`)
    """
    work = tl.load(ORDER + tl.program_id(0))
    pair = work // per_head
    block = work % per_head
    item = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    pair = pair.to(tl.int64)
    Q += item * q_item + head * q_head
    FLOW += item * flow_item + head * flow_head
    LSE += pair * queries
    DELTA += pair * queries
    is_listed = block < row_blocks
    first, listed, full, entries, base, ragged = row_entries(
        POINTER, ROWS_OF, pair * row_blocks + block, is_listed, query_patches, queries, BLOCK
    )
    first_key = tl.where(is_listed, block * ROWS, key_patches + (block - row_blocks) * ROWS)
    rows = tl.arange(0, ROWS)
    width = tl.arange(0, WIDTH)
    inside = (first_key + rows < tl.where(is_listed, key_patches, keys))[:, None]
    first_key = first_key.to(tl.int64)
    K += item * k_item + head * k_head + first_key * k_token
    k = tl.load(K + rows[:, None] * k_token + width[None, :], mask=inside, other=0.0)
    V += item * v_item + head * v_head + first_key * v_token
    v = tl.load(V + rows[:, None] * v_token + width[None, :], mask=inside, other=0.0)
    if UPCAST:
        k = k.to(tl.float32)
        v = v.to(tl.float32)

    k_sums = tl.zeros([ROWS, WIDTH], tl.float32)
    v_sums = tl.zeros([ROWS, WIDTH], tl.float32)
    SPLIT: tl.constexpr = BLOCK // STEP
    steps = full * SPLIT
    places = tl.arange(0, STEP)
    q_inner = places[:, None] * q_token + width[None, :]
    flow_inner = places[:, None] * flow_token + width[None, :]
    start = step_start(ROWS_OF, 0, first, listed, base, BLOCK, STEP).to(tl.int64)
    for step in range(0, steps):  # see forward_kernel
        q = tl.load(Q + start * q_token + q_inner)
        flow = tl.load(FLOW + start * flow_token + flow_inner)
        lse = tl.load(LSE + start + places) * 1.4426950408889634
        delta = tl.load(DELTA + start + places)
        start = step_start(ROWS_OF, step + 1, first, listed, base, BLOCK, STEP).to(tl.int64)
        k_sums, v_sums = key_step(k, v, q, flow, lse, delta, None, k_sums, v_sums, scale, False, UPCAST, PRECISION)
    for step in tl.range(steps, entries * SPLIT, num_stages=1):
        start, end = last_step(ROWS_OF, step, first, listed, full, base, ragged, query_patches, queries, BLOCK, STEP)
        ok = places < end - start
        start = start.to(tl.int64)
        q = tl.load(Q + start * q_token + q_inner, mask=ok[:, None], other=0.0)
        flow = tl.load(FLOW + start * flow_token + flow_inner, mask=ok[:, None], other=0.0)
        lse = tl.load(LSE + start + places, mask=ok, other=0.0) * 1.4426950408889634
        delta = tl.load(DELTA + start + places, mask=ok, other=0.0)
        k_sums, v_sums = key_step(k, v, q, flow, lse, delta, ok, k_sums, v_sums, scale, True, UPCAST, PRECISION)

    K_GRAD += item * k_grad_item + head * k_grad_head + first_key * k_grad_token
    k_grad = (k_sums * factor).to(K_GRAD.dtype.element_ty)
    tl.store(K_GRAD + rows[:, None] * k_grad_token + width[None, :], k_grad, mask=inside)
    V_GRAD += item * v_grad_item + head * v_grad_head + first_key * v_grad_token
    tl.store(V_GRAD + rows[:, None] * v_grad_token + width[None, :], v_sums.to(V_GRAD.dtype.element_ty), mask=inside)
