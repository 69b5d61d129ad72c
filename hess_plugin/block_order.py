"""In which order the patches of a frame fill the blocks: raster, Hilbert curve or square tiles."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def raster(rows: int, columns: int, block: int) -> Tensor:
    """Row by row, as the tokens come (the default of SparseVGGT): index ``[rows * columns]`` int64."""
    return torch.arange(rows * columns)


def hilbert(rows: int, columns: int, block: int) -> Tensor:
    """Along a Hilbert curve, so that a run of patches is a compact region (an option of SparseVGGT).

    The curve covers the smallest square of side 2^k around the grid; cells outside the grid are passed over.
    """
    side = 1 << max(0, math.ceil(math.log2(max(rows, columns))))
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    x, y, place = x.flatten(), y.flatten(), torch.zeros(rows * columns, dtype=torch.int64)
    step = side // 2
    while step:
        right, lower = (x & step > 0).long(), (y & step > 0).long()
        place += step * step * ((3 * right) ^ lower)
        # Turn the quadrant so that its curve starts where the previous one ended.
        flip = (lower == 0) & (right == 1)
        x, y = torch.where(flip, side - 1 - x, x), torch.where(flip, side - 1 - y, y)
        x, y = torch.where(lower == 0, y, x), torch.where(lower == 0, x, y)
        step //= 2
    return place.argsort()


def tiles(rows: int, columns: int, block: int) -> Tensor:
    """Tile by tile, each about as square as a block of `block` patches allows, row by row inside a tile."""
    height = max(1, math.isqrt(block))
    width = max(1, block // height)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    y, x = y.flatten(), x.flatten()
    across = math.ceil(columns / width)
    tile = (y // height) * across + x // width
    return (tile * (height * width) + (y % height) * width + x % width).argsort()


BLOCK_ORDERS: dict[str, Callable[[int, int, int], Tensor]] = {"raster": raster, "hilbert": hilbert, "tiles": tiles}
