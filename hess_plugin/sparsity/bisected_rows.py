"""Rows of a block map ranked by bisection, in Triton: the way for a GPU. See `hess_plugin_cuda.triton_selection`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hess_plugin_cuda.triton_selection import launch
from hess_plugin_cuda.triton_selection.shapes import row_stride

from .pooling import PooledTokens

CHUNK_ENTRIES = 2**23
"""Scores made at once where they are made again for every pass: 32 MiB, which stay in the cache of a GPU."""

KEPT_ENTRIES = 2**26
"""Scores that are kept between two passes: up to 256 MiB it takes less time to read them than to make them."""


class BisectedRows:
    """See `MapRows`."""

    def __init__(self, pooled: PooledTokens) -> None:
        self._pooled = pooled
        self._columns = pooled.columns
        everything = pooled.q.shape[0] * pooled.rows * row_stride(pooled.columns)
        self._keeps = everything <= (pooled.chunk_entries or KEPT_ENTRIES)
        self._kept: Tensor | None = None
        self._found: launch.Thresholds | None = None

    def uniform_counts(self, share: float, least: int) -> Tensor:
        """See `MapRows`."""
        counts = torch.empty(self._pooled.q.shape[:2], dtype=torch.int64, device=self._pooled.q.device)
        for first, scores in self._scores():
            launch.count(scores, self._columns, first, counts, share, least)
        return counts

    def spread(self, budgets: Tensor) -> Tensor:
        """See `MapRows`."""
        pooled, budgets = self._pooled, budgets.contiguous()
        self._found = launch.Thresholds.empty(pooled.q.shape[0] * pooled.rows, pooled.q.device)
        for first, scores in self._scores():
            launch.find_thresholds(scores, self._columns, first, budgets, pooled.rows, self._found)
        return launch.spread(budgets, self._columns, pooled.rows, self._found)

    def fill(self, counts: Tensor, row_ptr: Tensor, col: Tensor) -> None:
        """See `MapRows`."""
        for first, scores in self._scores():
            if self._found is None:
                launch.choose(scores, self._columns, first, row_ptr, col)
            else:
                launch.emit(scores, self._columns, first, self._found, row_ptr, col)

    def _scores(self) -> Iterator[tuple[int, Tensor]]:
        """Number of the first row of a chunk and its scores; kept between passes if they are few, else made again."""
        pooled = self._pooled
        if self._keeps:
            if self._kept is None:
                self._kept = launch.score(pooled.q, pooled.k)
            yield 0, self._kept
            return
        for heads, rows in pooled.chunks(pooled.chunk_entries or CHUNK_ENTRIES):
            scores = launch.score(pooled.q[heads, rows], pooled.k[heads])
            yield heads.start * pooled.rows + rows.start, scores
