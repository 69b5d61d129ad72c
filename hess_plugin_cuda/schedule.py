"""In which order a kernel takes up its work, so that its last programs do not run alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .lists import BlockLists


def work_order(lists: BlockLists, special_tiles: int, heads: tuple[int, ...] | None = None) -> Tensor:
    """Work items of a forward pass, in the order in which programs should start.

    The pairs of an item and a head come one after the other, the one with most to do first, so that programs that
    run at the same time read the keys of the same head; inside a pair the longest row comes first, so that what is
    left at the end is short. Equal rows and equal pairs keep their order.

    Only tensors of the lists' device are used, none is read by the host.

    Args:
        lists: the kept patch blocks.
        special_tiles: tiles of special queries of one item and head. They see every key, and so count as longer than
            any row of the lists.
        heads: only these heads of every item; None is all of them.

    Returns:
        int32 `[work]`, ids `(b * heads + h) * (query_blocks + special_tiles) + tile`, where tiles from
        `query_blocks` on are those of the special queries.
    """
    cost = lists.row_ptr.diff().view(lists.batch, lists.heads, lists.query_blocks)
    return order_of(cost, special_tiles, lists.key_blocks, heads)


def order_of(cost: Tensor, special_tiles: int, longest: int, heads: tuple[int, ...] | None = None) -> Tensor:
    """Work items by the cost of every row; see `work_order`.

    Args:
        cost: int64 `[B, H, R]`, entries of each row.
        special_tiles: rows that follow these in every pair, each of them costlier than any.
        longest: upper bound of `cost`.
        heads: only these heads of every item; None is all of them.

    Returns:
        int32 `[work]`, ids in `[B, H, R + special_tiles]`.
    """
    total = cost.sum(-1)
    if special_tiles:
        special = cost.new_full((*total.shape, special_tiles), longest + 1)
        cost = torch.cat([cost, special], -1)
    ids = None
    if heads is not None:
        # Slices, where an index tensor would have to be copied from the host, which waits for the device.
        ids = torch.arange(cost.numel(), dtype=torch.int32, device=cost.device).view(cost.shape)
        cost, ids, total = (torch.stack([x[:, head] for head in heads], 1) for x in (cost, ids, total))
    rank = total.flatten().argsort(descending=True, stable=True).argsort()
    # One key for both criteria; 2^31 pairs of 2^31 blocks each would still fit.
    key = (rank * (longest + 2)).unsqueeze(-1) - cost.flatten(0, 1)
    order = key.flatten().argsort(stable=True)
    return order.to(torch.int32) if ids is None else ids.flatten()[order]
