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
    return keep_from(x, ranked.gather(-1, counts.unsqueeze(-1) - 1), counts)


def keep_from(x: Tensor, threshold: Tensor, counts: Tensor) -> Tensor:
    """`keep_largest`, given the value `[..., 1]` of that rank in each row."""
    above, tied = x > threshold, x == threshold
    missing = counts.unsqueeze(-1) - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= missing))


def mark_smallest(x: Tensor, counts: Tensor) -> Tensor:
    """Mark the `counts` smallest entries of each row, ties to the lower column.

    Args:
        x: values `[..., T_k]` without NaN.
        counts: int64 `[...]`, 0..T_k.

    Returns:
        Like x, 1 for exactly `counts` entries of each row, else 0.
    """
    threshold = nth_smallest(x, counts.clamp(min=1).unsqueeze(-1))
    threshold.masked_fill_((counts == 0).unsqueeze(-1), -torch.inf)
    marks = torch.le(x, threshold, out=torch.empty_like(x))
    if _is_plain(x) and torch.equal(marks.sum(-1), counts.to(x.dtype)):
        return marks  # no ties, as almost always: on a CPU it costs little to know
    tied = x == threshold
    spared = counts - (x < threshold).sum(-1)
    return marks.masked_fill_(tied & (tied.cumsum(-1, dtype=torch.int32) > spared.unsqueeze(-1)), 0.0)


def nth_smallest(x: Tensor, ranks: Tensor) -> Tensor:
    """Values of rank `ranks` in each row, 1 for the smallest: `[..., T_k]`, int64 `[..., n]` -> `[..., n]`."""
    if not _is_plain(x):
        return torch.sort(x, dim=-1).values.gather(-1, ranks - 1)
    values, most = x.detach().numpy(), int(ranks.max())
    if 2 * most <= x.shape[-1]:  # no more is sorted than is asked for, where that is the less
        values = np.partition(values, most - 1, axis=-1)[..., :most]
    return torch.from_numpy(np.sort(values, axis=-1)).gather(-1, ranks - 1)


def nth_largest(x: Tensor, ranks: Tensor) -> Tensor:
    """Values of rank `ranks` in each row, 1 for the largest: `[..., T_k]`, int64 `[..., n]` -> `[..., n]`."""
    return nth_smallest(-x, ranks).neg_()


def _is_plain(x: Tensor) -> bool:
    """Whether NumPy can work on the values: those of a plain tensor in the memory of this machine."""
    return type(x) is Tensor and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


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
