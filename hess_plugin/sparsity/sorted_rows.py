"""Rows of a block map ranked by sorting, in plain torch: the way for a CPU, and for any device without Triton."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .budgets import spread
from .emission import write_lists
from .pooling import PooledTokens
from .ranking import covering_counts, keep_from, nth_largest, sort_rows

CHUNK_ENTRIES = 2**20
"""Block-map entries worked on at once. A step holds about 26 bytes for each, so a chunk stays below 30 MB."""


class SortedRows:
    """See `MapRows`."""

    def __init__(self, pooled: PooledTokens) -> None:
        self._pooled = pooled
        self._entries = pooled.chunk_entries or CHUNK_ENTRIES
        self._only = pooled.entries <= self._entries
        self._shape = pooled.q.shape[0], pooled.rows
        self._kept: tuple[slice, slice, Tensor, Tensor] | None = None

    def uniform_counts(self, share: float, least: int) -> Tensor:
        """See `MapRows`."""
        counts = torch.empty(self._shape, dtype=torch.int64, device=self._pooled.q.device)
        for heads, rows, scores in self._scores():
            probabilities = scores.softmax(-1).nan_to_num_(0.0)
            counts[heads, rows] = covering_counts(probabilities, share, least)
        return counts

    def spread(self, budgets: Tensor) -> Tensor:
        """See `MapRows`."""
        pooled = self._pooled
        nth = (budgets.unsqueeze(-1) // pooled.rows).clamp(0, pooled.columns - 1)
        gains = torch.empty(self._shape, dtype=torch.float32, device=pooled.q.device)
        for heads, rows, scores, ranked in self._ranked():
            at = nth[heads].unsqueeze(-1).expand(-1, scores.shape[1], 1)
            top = scores.amax(-1, keepdim=True)
            gains[heads, rows] = (_value(scores, ranked, at) - top).squeeze(-1) - (scores - top).exp_().sum(-1).log_()
        # Rows that no softmax ranks, of nothing but -inf or with an inf, gain nothing.
        gains.nan_to_num_(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
        return spread(budgets, pooled.rows, pooled.columns, gains).clamp_(1, pooled.columns)

    def fill(self, counts: Tensor, row_ptr: Tensor, col: Tensor) -> None:
        """See `MapRows`."""
        starts = row_ptr[:-1].view_as(counts)
        for heads, rows, scores, ranked in self._ranked():
            own = counts[heads, rows]
            keep = keep_from(scores, _value(scores, ranked, own.unsqueeze(-1) - 1), own)
            write_lists(keep, starts[heads, rows], col)

    def _ranked(self) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
        """Scores, and if there is only one chunk sorted scores; kept between two passes then, else made again."""
        if self._kept is not None:
            yield self._kept
            return
        for heads, rows, scores in self._scores():
            if self._only:
                self._kept = heads, rows, scores, sort_rows(scores)
            yield self._kept or (heads, rows, scores, None)

    def _scores(self) -> Iterator[tuple[slice, slice, Tensor]]:
        for heads, rows in self._pooled.chunks(self._entries):
            yield heads, rows, self._pooled.scores(heads, rows)


def _value(scores: Tensor, ranked: Tensor | None, rank: Tensor) -> Tensor:
    """Score of a rank `[..., 1]` in each row, 0 for the highest; by the sorted scores if there are any."""
    return nth_largest(scores, rank + 1) if ranked is None else ranked.gather(-1, rank)
