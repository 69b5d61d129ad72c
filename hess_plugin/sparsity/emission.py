"""Marks of kept blocks written as lists."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def write_lists(keep: Tensor, starts: Tensor, col: Tensor) -> None:
    """Write the marked blocks of each row, ascending. On a GPU nothing is read back.

    Args:
        keep: `[h, r, T_k]`, truth values or 1 and 0, of rows whose lists follow each other.
        starts: int64 `[h, r]`, where each row's blocks start.
        col: int32; its last entry is for what no row keeps, and undefined afterwards.
    """
    if type(keep) is Tensor and keep.device.type == "cpu":
        found = np.flatnonzero(keep.numpy()) % keep.shape[-1]
        first = int(starts[0, 0])
        col[first : first + len(found)] = torch.from_numpy(found)
        return
    keep = keep.to(torch.bool)
    blocks = torch.arange(keep.shape[-1], dtype=torch.int32, device=col.device)
    place = keep.cumsum(-1).add_(starts.unsqueeze(-1) - 1)
    place.masked_fill_(~keep, col.numel() - 1)
    col.scatter_(0, place.flatten(), blocks.expand_as(place).flatten())
