"""A depth map as another camera in another place sees it."""

from __future__ import annotations

import torch
from torch import Tensor


def reproject_depth(
    depth: Tensor, intrinsics: Tensor, target_intrinsics: Tensor, target_from_source: Tensor, size: tuple[int, int]
) -> Tensor:
    """Move every known pixel to the pixel of the target camera that it falls on; the nearest surface stays.

    One pixel becomes one pixel, so a target that magnifies is left with gaps, and gaps are "not known".

    Args:
        depth: z-depth `[H, W]`, 0 = not known.
        intrinsics: of its camera `[3, 3]`, pixels, integer coordinate = pixel centre.
        target_intrinsics: of the target camera `[3, 3]`.
        target_from_source: `[4, 4]`, from the frame of the depth's camera to the target's, in the unit of depth.
        size: rows and columns of the target.

    Returns:
        z-depth of the target camera, `size`, dtype of `depth`; 0 where nothing falls.
    """
    rows, columns = size
    v, u = depth.nonzero().unbind(-1)
    z = depth[v, u].double()
    rays = torch.stack([u, v, torch.ones_like(u)], -1).double() @ torch.linalg.inv(intrinsics.double()).T
    move = target_from_source.double()
    points = z[:, None] * rays @ move[:3, :3].T + move[:3, 3]
    points = points[points[:, 2] > 0]
    pixels = points @ target_intrinsics.double().T
    column = (pixels[:, 0] / pixels[:, 2] + 0.5).floor()
    row = (pixels[:, 1] / pixels[:, 2] + 0.5).floor()
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    index = row[inside].long() * columns + column[inside].long()
    nearest = torch.full((rows * columns,), torch.inf, dtype=torch.float64)
    nearest.scatter_reduce_(0, index, points[inside, 2], "amin")
    return torch.where(nearest.isinf(), 0.0, nearest).to(depth.dtype).view(rows, columns)
