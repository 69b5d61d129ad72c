"""The backend that torch compiles itself: FlexAttention over padded block lists, for what the own kernels refuse."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .dense import dense_attention
from .lists import BlockLists, block_count

if TYPE_CHECKING:
    from .backends import Problem

_ENTRIES = 2**28
"""Entries of a padded list of one call: 1 GiB, and twice that while it is made."""
_HALVES = (torch.float16, torch.bfloat16)


class PaddedLists(NamedTuple):
    """Lists of some heads of one item as FlexAttention takes them.

    Keys are numbered as they lie in memory, special ones after the patch ones, in blocks from the first on. The block
    that holds the last patch keys may hold special ones too: rows that do not keep it still see those.

    Attributes:
        whole: int32 `[heads, 1, T_q, W]`, blocks all of whose keys are seen; entries past the row's count are zero.
        whole_counts: int32 `[heads, 1, T_q]`.
        part: int32 `[heads, 1, T_q, W or 1]`, first the block of which only special keys are seen.
        part_counts: int32 `[heads, 1, T_q]`, 1 where there is one.
        first_special: int32 `[]`, number of patch keys.
    """

    whole: Tensor
    whole_counts: Tensor
    part: Tensor
    part_counts: Tensor
    first_special: Tensor


def refusal(problem: Problem) -> str | None:
    """Say in a few words why FlexAttention cannot compute a problem, or is of no use for it; None if it can."""
    if problem.device.type != "cuda":
        return "it needs a CUDA device"
    if problem.dtype == torch.float64:
        return "it computes in float32 at most"
    if problem.head_dim < 16:
        return "it needs heads at least 16 wide"
    if problem.block_q % 16 or problem.block_k % 16:
        return "it needs blocks of a multiple of 16 tokens"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1" or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "torch.compile is switched off by the environment"
    if torch.cuda.get_device_capability(problem.device) < (8, 0):
        return "it needs compute capability 8.0"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, heads: tuple[int, ...] | None
) -> tuple[Tensor, Tensor | None]:
    """Attention over block lists, see `Backend`; special queries by a dense kernel.

    Compiles once for each dtype, head width, block size and scale, not for each number of views. Reads the lengths of
    the lists on the host, for which it waits for the GPU.

    Raises:
        RuntimeError: the lists of one head are too long for FlexAttention's padded form.
    """
    patches = lists.query_tokens
    out = torch.empty_like(q)
    with torch.no_grad():
        for item, some in head_runs(lists, k.shape[2], heads):
            padded = pad(lists, item, some, k.shape[2], full_length=q.device.type == "cpu")
            own_q, own_k, own_v = (x[item, some].unsqueeze(1) for x in (q, k, v))
            blocks = lists.block_q, lists.block_k
            found = _attend(own_q[:, :, :patches], own_k, own_v, padded, scale, blocks)
            out[item, some, :patches] = found.squeeze(1)
            if q.shape[2] > patches:
                out[item, some, patches:] = dense_attention(own_q[:, :, patches:], own_k, own_v, scale).squeeze(1)
    return out, None


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lists: BlockLists, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, by the backend "gather".

    FlexAttention's own backward pass takes no key blocks of 64 where its tiles are 128 wide, as for heads of 64 to 128
    on Hopper, and refuses other tiles unless it may search for them, minutes long.
    """
    from . import gather

    return gather.backward(grad, q, k, v, out, lse, lists, scale)


def head_runs(lists: BlockLists, keys: int, heads: tuple[int, ...] | None) -> Iterator[tuple[int, slice]]:
    """Yield `(item, heads)`: neighbouring heads whose padded lists are not too large together.

    Args:
        lists: the kept patch blocks.
        keys: N_k, special ones included.
        heads: those to compute; None is all.

    Raises:
        RuntimeError: one head alone is too large.
    """
    special = block_count(keys, lists.block_k) - lists.key_blocks
    widest = (lists.counts().amax(-1) + special).tolist()  # waits for the GPU
    for item, widths in enumerate(widest):
        run: list[int] = []
        for head in range(lists.heads) if heads is None else heads:
            width = max(widths[other] for other in (*run, head))
            if run and (head != run[-1] + 1 or _entries(lists, width) * (len(run) + 1) > _ENTRIES):
                yield item, slice(run[0], run[-1] + 1)
                run = []
            if _entries(lists, widths[head]) > _ENTRIES:
                raise RuntimeError(
                    f"Backend 'flex' pads the lists of a head to {lists.query_blocks} x {widths[head]} entries, more "
                    f"than the {_ENTRIES} that it holds at once; choose backend 'triton', or 'gather'."
                )
            run.append(head)
        if run:
            yield item, slice(run[0], run[-1] + 1)


def _entries(lists: BlockLists, width: int) -> int:
    return lists.query_blocks * width


def pad(lists: BlockLists, item: int, heads: slice, keys: int, *, full_length: bool = False) -> PaddedLists:
    """Pad the lists of neighbouring heads of one item to their longest row.

    Args:
        lists: the kept patch blocks.
        item: b of 0..B-1.
        heads: which of the item's.
        keys: N_k, special ones included.
        full_length: pad to as many entries as there are key blocks, which code compiled for a CPU reads.
    """
    first, count = item * lists.heads + heads.start, heads.stop - heads.start
    rows = slice(first * lists.query_blocks, (first + count) * lists.query_blocks)
    ends = lists.row_ptr[1:][rows, None]
    start = lists.row_ptr[:-1][rows, None]
    kept = ends - start
    every = block_count(keys, lists.block_k)
    special = every - lists.key_blocks
    width = every if full_length else int(kept.max()) + special
    place = torch.arange(width, device=lists.device)
    listed = lists.col[(start + place).clamp_(max=lists.col.numel() - 1)]
    whole = torch.where(place < kept, listed, lists.key_blocks + place - kept)
    whole = torch.where(place < kept + special, whole, 0).to(torch.int32)
    hides = torch.zeros_like(kept)
    if lists.key_tokens % lists.block_k and keys > lists.key_tokens:
        hides = (lists.col[ends - 1] != lists.key_blocks - 1).to(torch.int64)
    part = torch.zeros((kept.shape[0], every if full_length else 1), dtype=torch.int32, device=lists.device)
    part[:, 0] = lists.key_blocks - 1
    shape = (count, 1, lists.query_blocks)
    return PaddedLists(
        whole.view(*shape, -1),
        (kept + special).to(torch.int32).view(shape),
        part.view(*shape, -1),
        hides.to(torch.int32).view(shape),
        torch.full((), lists.key_tokens, dtype=torch.int32, device=lists.device),
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, padded: PaddedLists, scale: float, blocks: tuple[int, int]) -> Tensor:
    """Attention of q, k, v `[heads, 1, N, d]`; whatever changes with the number of views stays open when compiled."""
    import torch._dynamo as dynamo

    for tensor, dims in zip((q, k, v, *padded[:4]), [(0, 2)] * 3 + [(0, 2, 3), (0, 2)] * 2, strict=True):
        for dim in dims:
            dynamo.maybe_mark_dynamic(tensor, dim)
    # Numbers are constants of the compiled code (a scale or a tile that is none does not compile), and there may be
    # many: at the limit torch would run the uncompiled function, which knows nothing of lists.
    with dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=64):
        return _compiled()(q, k, v, *padded, scale, *blocks)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_flex, fullgraph=True)


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    whole: Tensor,
    whole_counts: Tensor,
    part: Tensor,
    part_counts: Tensor,
    first_special: Tensor,
    scale: float,
    block_q: int,
    block_k: int,
) -> Tensor:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def is_special(item: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key >= first_special

    # Its constructor: `from_kv_blocks` would make the transposed lists, dense and of the wrong width.
    mask = BlockMask(
        seq_lengths=(q.shape[2], k.shape[2]),
        kv_num_blocks=part_counts,
        kv_indices=part,
        full_kv_num_blocks=whole_counts,
        full_kv_indices=whole,
        q_num_blocks=None,
        q_indices=None,
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(block_q, block_k),
        mask_mod=is_special,
    )
    options: Any = tile(q.dtype, q.shape[3], block_q, block_k)
    return flex_attention(q, k, v, block_mask=mask, scale=scale, kernel_options=options)


def tile(dtype: torch.dtype, width: int, block_q: int, block_k: int) -> dict[str, int | bool]:
    """Options of the kernel: the largest tiles that divide the blocks and fit a processor's shared memory."""
    half = dtype in _HALVES
    tile_q = 128 if half and width <= 128 else 64
    tile_k = 64 if width <= (128 if half else 64) else 32
    return {
        "BLOCK_M": _power_of_two(block_q, tile_q),
        "BLOCK_N": _power_of_two(block_k, tile_k),
        "num_stages": 3 if half and width <= 128 else 2,
        "FORCE_USE_FLEX_ATTENTION": True,  # few queries would get another kernel with tiles of its own
    }


def _power_of_two(number: int, most: int) -> int:
    """The largest power of two that divides a number and is not above `most`."""
    return min(number & -number, most)
