"""The forward kernel: one program computes one tile of queries against the entries of its row."""

# mypy: disable-error-code="no-untyped-def"
# Arguments of kernels are described in words: to a type checker, the language of Triton has no types.

from __future__ import annotations

import triton
import triton.language as tl

from .entries import last_step, row_entries, step_start


@triton.jit
def attend(q, k, v, ok, top, total, sums, scale, MASKED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax over keys k `[N, d]`.

    Args:
        q: queries `[M, d]`.
        k: keys.
        v: values.
        ok: bool `[N]`, keys that count; unused unless MASKED.
        top: float32 `[M]`, largest score so far, in units of the exponent of 2.
        total: float32 `[M]`, sum of the exponentials so far.
        sums: float32 `[M, d]`, values weighted by them.
        scale: from q . k to the exponent of 2, not negative.
        MASKED: whether some keys do not count.
        UPCAST: multiply in float32.
        PRECISION: of products of float32.

    Returns:
        top, total and sums with these keys.
    """
    if UPCAST:
        k = k.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:  # after the scale, because -inf times a scale of 0 is not a number
        scores = tl.where(ok[None, :], scores * scale, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new[:, None])
    else:  # the largest score first: one multiplication fewer for each of them
        new = tl.maximum(top, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - new[:, None])
    shrink = tl.exp2(top - new)
    total = total * shrink + tl.sum(p, 1)
    sums = sums * shrink[:, None]
    p = p.to(v.dtype)
    if UPCAST:
        p = p.to(tl.float32)
        v = v.to(tl.float32)
    return new, total, tl.dot(p, v, sums, input_precision=PRECISION)


# The counts differ from input to input and must not compile the kernel anew. Strides do where they stop being
# multiples of 16: then loads are narrower.
@triton.jit(
    do_not_specialize=["heads", "row_blocks", "per_head", "query_patches", "queries", "key_patches", "keys"],
)
def forward_kernel(
    Q, K, V, OUT, LSE, POINTER, COLUMNS, ORDER, scale,
    q_item: tl.int64, q_head: tl.int64, q_token: tl.int32,
    k_item: tl.int64, k_head: tl.int64, k_token: tl.int32,
    v_item: tl.int64, v_head: tl.int64, v_token: tl.int32,
    out_item: tl.int64, out_head: tl.int64, out_token: tl.int32,
    heads: tl.int32, row_blocks: tl.int32, per_head: tl.int32, query_patches: tl.int32, queries: tl.int32,
    key_patches: tl.int32, keys: tl.int32,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    NEGATE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write one tile of outputs and of their log-sum-exp.

    Args:
        Q: queries `[B, H, queries, WIDTH]`; every tensor of tokens by its strides, the last one 1.
        K: keys `[B, H, keys, WIDTH]`.
        V: values, like K.
        OUT: outputs, like Q.
        LSE: float32 `[B, H, queries]`, contiguous, natural logarithm.
        POINTER: int64, starts of the lists.
        COLUMNS: int32, their blocks.
        ORDER: int32 `[programs]`, the work item of each program, see `work_order`.
        scale: from q . k to the exponent of 2, not negative.
        ROWS: queries of a tile and of a query block.
        BLOCK: keys of a key block.
        STEP: keys of a step, at most BLOCK.
        GROUP: steps that are computed at once, 1 or 2; 2 only where STEP is BLOCK.
        NEGATE: multiply q by -1, which makes up for the sign of `scale`.
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
    if UPCAST:
        q = q.to(tl.float32)
    if NEGATE:
        q = -q

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    SPLIT: tl.constexpr = BLOCK // STEP
    tiles = full * SPLIT // GROUP
    places = tl.arange(0, GROUP * STEP)
    k_inner = (places % STEP)[:, None] * k_token + width[None, :]
    v_inner = (places % STEP)[:, None] * v_token + width[None, :]
    start = step_start(COLUMNS, 0, first, listed, base, BLOCK, STEP).to(tl.int64)
    if GROUP == 2:
        is_second = (places >= STEP)[:, None]
        second = step_start(COLUMNS, 1, first, listed, base, BLOCK, STEP).to(tl.int64)
    # Without a number of stages of its own: Triton then pipelines the loads of keys and values alone. It would turn
    # the loads from the list into asynchronous copies too, and wait for them and all others in every step.
    for tile in range(0, tiles):
        if GROUP == 1:
            k = tl.load(K + start * k_token + k_inner)
            v = tl.load(V + start * v_token + v_inner)
        else:
            k = tl.load(K + tl.where(is_second, second * k_token, start * k_token) + k_inner)
            v = tl.load(V + tl.where(is_second, second * v_token, start * v_token) + v_inner)
            second = step_start(COLUMNS, tile * GROUP + 3, first, listed, base, BLOCK, STEP).to(tl.int64)
        start = step_start(COLUMNS, tile * GROUP + GROUP, first, listed, base, BLOCK, STEP).to(tl.int64)
        top, total, sums = attend(q, k, v, None, top, total, sums, scale, False, UPCAST, PRECISION)
    if GROUP == 2:
        places = tl.arange(0, STEP)
        k_inner = places[:, None] * k_token + width[None, :]
        v_inner = places[:, None] * v_token + width[None, :]
    for step in tl.range(tiles * GROUP, entries * SPLIT, num_stages=1):
        start, end = last_step(COLUMNS, step, first, listed, full, base, ragged, key_patches, keys, BLOCK, STEP)
        ok = places < end - start
        start = start.to(tl.int64)
        k = tl.load(K + start * k_token + k_inner, mask=ok[:, None], other=0.0)
        v = tl.load(V + start * v_token + v_inner, mask=ok[:, None], other=0.0)
        top, total, sums = attend(q, k, v, ok, top, total, sums, scale, True, UPCAST, PRECISION)

    OUT += item * out_item + head * out_head + first_query * out_token
    out = (sums / total[:, None]).to(OUT.dtype.element_ty)
    tl.store(OUT + rows[:, None] * out_token + width[None, :], out, mask=inside[:, None])
    lse = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(LSE + pair * queries + first_query + rows, lse, mask=inside)
