"""The rows of a block map, from which counts and lists are made: what any way to rank them offers, and which is used."""

from __future__ import annotations

import functools
import logging
from typing import Protocol

import torch
from torch import Tensor

from hess_plugin_cuda.backends import Problem

from .pooling import PooledTokens
from .sorted_rows import SortedRows

_log = logging.getLogger(__name__)


class MapRows(Protocol):
    """Ranks the rows of one block map, chunk by chunk. A row of all heads has number `(b * H + h) * T_q + i`."""

    def uniform_counts(self, share: float, least: int) -> Tensor:
        """Leading blocks of each row whose cumulative probability stays within `share`, or `least` if that is more.

        Returns:
            int64 `[B * H, T_q]`.
        """

    def spread(self, budgets: Tensor) -> Tensor:
        """Divide the budget of each head evenly over its rows, the remainder to those whose next block adds most.

        Args:
            budgets: int64 `[B * H]`.

        Returns:
            int64 `[B * H, T_q]`.
        """

    def fill(self, counts: Tensor, row_ptr: Tensor, col: Tensor) -> None:
        """Write the blocks of the highest scores of each row, ascending, ties to the lower block.

        Args:
            counts: int64 `[B * H, T_q]`, 1..T_k; what `spread` returned, if it was called.
            row_ptr: int64 `[B * H * T_q + 1]`, where each row's blocks start.
            col: int32, as long as all counts or longer.
        """


def rows_of(pooled: PooledTokens) -> MapRows:
    """The rows of the block map of pooled tokens: bisected in Triton on a GPU, else sorted in plain torch."""
    if uses_triton(pooled.q.device):
        from .bisected_rows import BisectedRows

        return BisectedRows(pooled)
    return SortedRows(pooled)


def uses_triton(device: torch.device) -> bool:
    """Whether blocks on this device are chosen by Triton kernels. The first answer for a GPU tries them out."""
    return device.type == "cuda" and _works(device)


@functools.cache
def _works(device: torch.device) -> bool:
    from hess_plugin_cuda.triton import refusal

    reason = refusal(Problem(device, torch.float32)) or _failure(device)
    if reason is not None:
        _log.warning("blocks on %s are chosen by sorting, which is slower than Triton: %s", device, reason)
    return reason is None


def _failure(device: torch.device) -> str | None:
    """What is wrong with the kernels on a device; None where they choose what sorting chooses."""
    # The caller's inference mode is none of the test's business.
    with torch.inference_mode(False), torch.no_grad():
        # Pooled tokens of whole numbers: their scores are the same bits everywhere, with many ties.
        generator = torch.Generator().manual_seed(0)
        q = torch.randint(-2, 3, (2, 20, 16), generator=generator).float()
        k = torch.randint(-2, 3, (2, 70, 16), generator=generator).float()
        budgets = torch.tensor([333, 1013])
        try:
            from .bisected_rows import BisectedRows

            tried = _chosen(BisectedRows(_as_pooled(q.to(device), k.to(device))), budgets.to(device))
        except Exception as error:  # a kernel that does not compile or launch may raise anything
            first = (str(error).strip() or "no reason given").splitlines()[0]
            return f"a trial failed with {type(error).__name__}: {first}"
        wanted = _chosen(SortedRows(_as_pooled(q, k)), budgets)
    if all(torch.equal(a.cpu(), b) for a, b in zip(tried, wanted, strict=True)):
        return None
    return "a trial chose other blocks"


def _as_pooled(q: Tensor, k: Tensor) -> PooledTokens:
    return PooledTokens(q, k, 1, q.shape[0], q.shape[1], k.shape[1], 1, 1)


def _chosen(rows: MapRows, budgets: Tensor) -> tuple[Tensor, Tensor]:
    counts = rows.spread(budgets)
    row_ptr = torch.cat([counts.new_zeros(1), counts.flatten().cumsum(0)])
    col = torch.zeros(1346, dtype=torch.int32, device=counts.device)
    rows.fill(counts, row_ptr, col)
    return counts, col
