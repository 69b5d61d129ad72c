"""Block lists transposed on their device: for each key block, the query blocks that keep it."""

from __future__ import annotations

import torch
from torch import Tensor

from hess_plugin_cuda.lists import BlockLists


def transposed(lists: BlockLists) -> tuple[Tensor, Tensor]:
    """Compressed columns of the lists, without reading a number on the host.

    One sort of 64-bit keys, which takes about 40 bytes of memory for every kept block.

    Args:
        lists: the kept patch blocks; where they are not `exact`, what lies past their end is ignored.

    Returns:
        int64 `[B * H * key_blocks + 1]`, starts of the columns, and int32 `[room of col]`, their query blocks,
        ascending in each; a column may be empty, and what lies past the last start is undefined.
    """
    device, pairs = lists.device, lists.batch * lists.heads
    entry = torch.arange(lists.col.numel(), device=device)
    row = torch.searchsorted(lists.row_ptr, entry, right=True) - 1
    column = row.div(lists.query_blocks, rounding_mode="floor") * lists.key_blocks + lists.col
    key = column * lists.query_blocks + row % lists.query_blocks
    if not lists.exact:
        key = torch.where(row < lists.rows, key, pairs * lists.key_blocks * lists.query_blocks)
    key = key.sort().values
    column_starts = torch.arange(pairs * lists.key_blocks + 1, device=device) * lists.query_blocks
    pointer = torch.searchsorted(key, column_starts)
    return pointer, (key % lists.query_blocks).to(torch.int32)
