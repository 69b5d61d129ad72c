"""Kernels that make scores: averages of blocks of tokens, and their products."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["heads", "tokens", "blocks"])
def pool_kernel(
    X, OUT, item_stride: tl.int64, head_stride: tl.int64, token_stride: tl.int64, heads, tokens, blocks, scale,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Average a block of tokens, the last block what it has, in float32, times a factor."""
    block, pair = tl.program_id(0), tl.program_id(1)
    first = block * BLOCK
    x = X + (pair // heads) * item_stride + (pair % heads) * head_stride + first * token_stride
    token, width = tl.arange(0, STEP), tl.arange(0, PADDED)
    sums = tl.zeros([STEP, PADDED], tl.float32)
    for start in range(0, BLOCK, STEP):
        inside = (start + token < BLOCK) & (first + start + token < tokens)
        at = (start + token)[:, None] * token_stride + width[None, :]
        sums += tl.load(x + at, mask=inside[:, None] & (width < WIDTH)[None, :], other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(sums, 0), tl.minimum(tokens - first, BLOCK).to(tl.float32))
    out = OUT + (pair.to(tl.int64) * blocks + block) * WIDTH + width
    tl.store(out, mean * scale, mask=width < WIDTH)


@triton.jit(do_not_specialize=["rows", "columns"])
def score_kernel(
    Q, K, SCORES, q_head: tl.int64, k_head: tl.int64, rows, columns, stride,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Scores q . k of pooled tokens, a tile a program.

    Every product and sum is a float32 one, in an order that depends on the width alone: a score is the same bits in
    whatever chunk it is made, so that a threshold found in one pass holds in the next. A matrix product of torch
    promises neither: the user's settings may allow it TF32.
    """
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    q = Q + head * q_head + row[:, None] * WIDTH + depth[None, :]
    k = K + head * k_head + column[None, :] * WIDTH + depth[:, None]
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, WIDTH, DEPTH):
        inside = depth < WIDTH - start
        left = tl.load(q + start, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        right = tl.load(k + start, mask=(column < columns)[None, :] & inside[:, None], other=0.0)
        sums = tl.dot(left, right, sums, input_precision="ieee")
    out = SCORES + (head * rows + row[:, None]) * stride + column[None, :]
    tl.store(out, sums, mask=(row < rows)[:, None] & (column < stride)[None, :])
