"""The rows of a block map, from which counts and lists are made: what every way to rank them offers, and the choice."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .pooling import PooledTokens
from .sorted_rows import SortedRows
from .triton_trial import uses_triton


class MapRows(Protocol):
    """Ranks the rows of one block map, chunk by chunk. A row of all heads has number `(b * H + h) * T_q + i`."""

    def uniform_counts(self, share: float, least: int) -> Tensor:
        """Leading blocks of each row whose cumulative probability stays within `share`, or `least` if that is more.

        Probabilities are those among patch blocks, also where sub-blocks count special keys in.

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
            col: int32, longer than the sum of the counts; what follows them is undefined afterwards.
        """


def rows_of(pooled: PooledTokens) -> MapRows:
    """The rows of the block map of pooled tokens: bisected in Triton on a GPU, else sorted in plain torch.

    Scores of sub-blocks are sorted on every device.
    """
    if pooled.parts == 1 and uses_triton(pooled.q.device):
        from .bisected_rows import BisectedRows

        return BisectedRows(pooled)
    return SortedRows(pooled)
