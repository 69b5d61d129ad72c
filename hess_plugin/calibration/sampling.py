"""Seeded subsampling, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def subsample(points: Tensor, limit: int | None, seed: int) -> Tensor:
    """At most `limit` rows of `points [n, ...]` in their own order, one drawn from each of `limit` even runs."""
    count = points.shape[0]
    if limit is None or count <= limit:
        return points
    # A CPU generator: the same rows whether the points live on a GPU or not. One row a run costs no permutation
    # of millions of rows, and covers all views evenly.
    generator = torch.Generator().manual_seed(seed)
    edges = torch.arange(limit + 1) * count // limit
    drawn = torch.rand(limit, generator=generator, dtype=torch.float64)
    rows = edges[:-1] + (drawn * (edges[1:] - edges[:-1])).long()
    return points[rows.to(points.device)]
