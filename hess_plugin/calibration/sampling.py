"""Seeded subsampling, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def subsample(points: Tensor, limit: int | None, seed: int) -> Tensor:
    """At most `limit` rows of `points [n, ...]`, drawn with `seed` and kept in their own order."""
    count = points.shape[0]
    if limit is None or count <= limit:
        return points
    # A CPU generator: the same rows whether the points live on a GPU or not.
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(count, generator=generator)[:limit].sort().values
    return points[rows.to(points.device)]
