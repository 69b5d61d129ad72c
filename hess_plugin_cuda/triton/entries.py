"""Where the tokens that a row reads are: the order in which every kernel walks a list.

One side of an attention, its queries or its keys, is cut into blocks of patch tokens, which lists name, and special
tokens after them, which everybody sees. Who walks over a side takes its *entries* in this order:

1. the full blocks of the list,
2. full blocks of special tokens, of the same size, from the first special token on,
3. the ragged last block of patch tokens, if it is listed (it is then the last of its list),
4. the ragged last block of special tokens.

Only the last two need a mask, so a kernel masks the end of a row and nothing before it. A special row has no list and
sees everything: it walks over the whole side as if all its tokens were special. An entry is read in one step or, where
a block is larger than a tile should be, in several.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments of kernels are described in words: to a type checker, the language of Triton has no types.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_entries(POINTER, COLUMNS, row, is_listed, patches, tokens, BLOCK: tl.constexpr):
    """Count the entries of a row.

    Args:
        POINTER: int64, starts of the lists.
        COLUMNS: int32, blocks of the lists.
        row: int64, list to walk; ignored where `is_listed` is False.
        is_listed: whether the row has a list; a special row has none.
        patches: patch tokens of the side that is walked over.
        tokens: all its tokens.
        BLOCK: tokens of a block.

    Returns:
        first: int64 position of the list in `COLUMNS`.
        listed: full blocks in the list.
        full: entries without a mask, `listed` among them.
        entries: all entries.
        base: first of the tokens that count as special.
        ragged: 1 where the ragged patch block is listed, else 0.
    """
    first = tl.full([], 0, tl.int64)
    listed = tl.full([], 0, tl.int32)
    ragged = tl.full([], 0, tl.int32)
    base = tl.full([], 0, tl.int32)
    if is_listed:
        first = tl.load(POINTER + row)
        end = tl.load(POINTER + row + 1)
        base = patches
        listed = (end - first).to(tl.int32)
        if (patches % BLOCK != 0) & (listed > 0):
            ragged = (tl.load(COLUMNS + end - 1) == patches // BLOCK).to(tl.int32)
        listed -= ragged
    full = listed + (tokens - base) // BLOCK
    entries = full + ragged + ((tokens - base) % BLOCK != 0).to(tl.int32)
    return first, listed, full, entries, base, ragged


@triton.jit
def step_start(COLUMNS, step, first, listed, base, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """First token of a step of STEP tokens that needs no mask; past the last of these, some harmless number."""
    entry = step // (BLOCK // STEP)
    column = tl.load(COLUMNS + first + entry, mask=entry < listed, other=0)
    start = tl.where(entry < listed, column * BLOCK, base + (entry - listed) * BLOCK)
    return start + step % (BLOCK // STEP) * STEP


@triton.jit
def last_step(
    COLUMNS, step, first, listed, full, base, ragged, patches, tokens, BLOCK: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """First token of any step, and the end of the tokens of its entry."""
    entry = step // (BLOCK // STEP)
    start = step_start(COLUMNS, entry, first, listed, base, BLOCK, BLOCK)
    is_patches = (entry == full) & (ragged != 0)
    # The ragged patch block pushes the ragged special block back by one.
    is_special = (entry >= full) & (entry == full + ragged)
    start = tl.where(is_patches, patches // BLOCK * BLOCK, start)
    start = tl.where(is_special, base + (tokens - base) // BLOCK * BLOCK, start)
    return start + step % (BLOCK // STEP) * STEP, tl.where(is_patches, patches, tokens)
