"""Exact selection of the largest entries of each row, deterministic where entries tie."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def sort_rows(x: Tensor) -> Tensor:
    """Values of each row, largest first."""
    if type(x) is Tensor and x.device.type == "cpu" and x.dtype == torch.float32:
        # NumPy sorts values alone, in vector registers: many times faster than torch, which moves indices.
        values = torch.from_numpy(np.sort(x.detach().numpy(), axis=-1))
        return values.flip(-1)
    return torch.sort(x, dim=-1, descending=True).values


def keep_largest(x: Tensor, ranked: Tensor, counts: Tensor) -> Tensor:
    """Mark the `counts` largest entries of each row, ties to the lower column.

    Args:
        x: values `[..., T_k]`.
        ranked: `sort_rows(x)`.
        counts: int64 `[...]`, 1..T_k.

    Returns:
        bool `[..., T_k]` with exactly `counts` True in each row.
    """
    threshold = ranked.gather(-1, counts.unsqueeze(-1) - 1)
    above, tied = x > threshold, x == threshold
    missing = counts.unsqueeze(-1) - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= missing))


def covering_counts(probabilities: Tensor, share: float, least: int) -> Tensor:
    """Leading entries of each row whose sum stays within a share, largest first, or `least` if that is more.

    Args:
        probabilities: `[..., T_k]`.
        share: what the sum must not exceed.
        least: 1..T_k.

    Returns:
        int64 `[...]`.
    """
    # float64, so that the count does not depend on the order in which a device adds.
    mass = sort_rows(probabilities).to(torch.float64).cumsum(-1)
    return (mass <= share).sum(-1).clamp_(min=least)


def rank(x: Tensor) -> Tensor:
    """Rank of each entry of each row, 0 for the largest, ties to the lower index: int64, like x."""
    order = torch.sort(x, dim=-1, descending=True, stable=True).indices
    places = torch.arange(x.shape[-1], device=x.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)
