"""Rows of a block map ranked by sorting, in plain torch: the way for a CPU, and for any device without Triton."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .budgets import spread
from .pooling import PooledTokens
from .ranking import covering_counts, keep_largest, sort_rows

CHUNK_ENTRIES = 2**20
"""Block-map entries worked on at once. A step holds about 26 bytes for each, so a chunk stays below 30 MB."""


class SortedRows:
    """See `MapRows`."""

    def __init__(self, pooled: PooledTokens) -> None:
        self._pooled = pooled
        self._entries = pooled.chunk_entries or CHUNK_ENTRIES
        self._only = pooled.q.shape[0] * pooled.rows * pooled.columns <= self._entries
        self._kept: tuple[slice, slice, Tensor, Tensor] | None = None

    def uniform_counts(self, share: float, least: int) -> Tensor:
        """See `MapRows`."""
        counts = torch.empty(self._pooled.q.shape[:2], dtype=torch.int64, device=self._pooled.q.device)
        for heads, rows, scores in self._scores():
            probabilities = scores.softmax(-1).nan_to_num_(0.0)
            counts[heads, rows] = covering_counts(probabilities, share, least)
        return counts

    def spread(self, budgets: Tensor) -> Tensor:
        """See `MapRows`."""
        pooled = self._pooled
        nth = (budgets.unsqueeze(-1) // pooled.rows).clamp(0, pooled.columns - 1)
        gains = torch.empty(pooled.q.shape[:2], dtype=torch.float32, device=pooled.q.device)
        for heads, rows, scores, ranked in self._ranked():
            at = nth[heads].unsqueeze(-1).expand(-1, ranked.shape[1], 1)
            top = ranked[..., :1]
            gains[heads, rows] = (ranked.gather(-1, at) - top).squeeze(-1) - (scores - top).exp_().sum(-1).log_()
        # Rows that no softmax ranks, of nothing but -inf or with an inf, gain nothing.
        gains.nan_to_num_(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
        return spread(budgets, pooled.rows, pooled.columns, gains).clamp_(1, pooled.columns)

    def fill(self, counts: Tensor, row_ptr: Tensor, col: Tensor) -> None:
        """See `MapRows`."""
        starts = row_ptr[:-1].view_as(counts)
        blocks = torch.arange(self._pooled.columns, dtype=torch.int32, device=col.device)
        last = col.numel() - 1  # into which every block that is not kept is written: nothing has to be read back
        for heads, rows, scores, ranked in self._ranked():
            keep = keep_largest(scores, ranked, counts[heads, rows])
            place = keep.cumsum(-1).add_(starts[heads, rows].unsqueeze(-1) - 1)
            place.masked_fill_(~keep, last)
            col.scatter_(0, place.flatten(), blocks.expand_as(place).flatten())

    def _ranked(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Scores and sorted scores; kept between two passes if there is only one chunk, else made again."""
        if self._kept is not None:
            yield self._kept
            return
        for heads, rows, scores in self._scores():
            made = heads, rows, scores, sort_rows(scores)
            if self._only:
                self._kept = made
            yield made

    def _scores(self) -> Iterator[tuple[slice, slice, Tensor]]:
        for heads, rows in self._pooled.chunks(self._entries):
            yield heads, rows, self._pooled.scores(heads, rows)
