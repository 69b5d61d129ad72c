"""Rows of scores that are hard to cut, and what sorting on the CPU says of them."""

from __future__ import annotations

import torch
from torch import Tensor

from hess_plugin.sparsity.ranking import keep_largest, sort_rows

INFINITY = float("inf")
NAN = float("nan")
TINY = 1e-45  # the least denormal number


def hard_rows(columns: int, seed: int = 0) -> Tensor:
    """Scores `[11, columns]`: real ones, and rows of ties, zeros of both signs, denormals, infinities, NaN."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*values: float) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (columns,), generator=generator)]

    real = torch.randn(columns, generator=generator)
    some_nan = torch.where(torch.rand(columns, generator=generator) < 0.3, NAN, real)
    return torch.stack(
        [
            real * 3,
            real * 1e30,
            real.abs() * 1e-39,  # denormals
            (real * 2).round(),  # ties
            torch.full((columns,), -0.37),
            draw(0.0, -0.0, TINY, -TINY),
            draw(-INFINITY, 1.0, 3e38, -3e38),
            draw(INFINITY, -INFINITY, 0.0, NAN),
            torch.full((columns,), -INFINITY),
            torch.full((columns,), NAN),
            some_nan,
        ]
    )


def padded(scores: Tensor, device: torch.device) -> Tensor:
    """The same rows as `launch.score` lays them out, with something that must not be read as a score after them."""
    from hess_plugin_cuda.triton_selection.shapes import row_stride

    rows, columns = scores.shape
    wide = torch.full((rows, row_stride(columns)), INFINITY)
    wide[:, :columns] = scores
    return wide.to(device)


def cleaned(scores: Tensor) -> Tensor:
    """NaN as -inf, as `PooledTokens.scores` has them."""
    return scores.nan_to_num(nan=-INFINITY, posinf=INFINITY, neginf=-INFINITY)


def sorted_choice(scores: Tensor, counts: Tensor) -> list[list[int]]:
    """The columns that the CPU keeps of each row."""
    clean = cleaned(scores)
    keep = keep_largest(clean, sort_rows(clean), counts)
    return [row.nonzero().flatten().tolist() for row in keep]


def slow_choice(scores: Tensor, counts: Tensor) -> list[list[int]]:
    """The same by comparing Python's floats."""
    rows = zip(cleaned(scores).tolist(), counts.tolist(), strict=True)
    return [sorted(sorted(range(len(row)), key=lambda j: (-row[j], j))[:n]) for row, n in rows]


def row_pointer(counts: Tensor) -> Tensor:
    """Where each row's list starts."""
    return torch.cat([counts.new_zeros(1), counts.flatten().cumsum(0)])


def lists_of(row_ptr: Tensor, col: Tensor) -> list[list[int]]:
    """Lists as Python's."""
    return [part.tolist() for part in col[: int(row_ptr[-1])].split(row_ptr.diff().tolist())]
