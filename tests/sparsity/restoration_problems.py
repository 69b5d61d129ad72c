"""Small rows in float64 and their selection by loops, which recompute the attention of every set that is compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hess_plugin.sparsity import PooledTokens, PooledValues


@dataclass(frozen=True)
class Problem:
    """Pooled tokens of one item, and how their rows are cut: A x F sub-blocks of pool_q x pool_k tokens."""

    pooled: PooledTokens
    values: PooledValues

    def counts(self, seed: int) -> Tensor:
        """Blocks to keep in each row, 1..T_k: int64 `[H, T_q]`."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(1, self.pooled.columns + 1, (self.pooled.heads, self.pooled.rows), generator=generator)


def make(
    seed: int,
    *,
    heads: int = 1,
    query_tokens: int = 14,
    key_tokens: int = 21,
    pool: tuple[int, int] = (2, 2),
    parts: tuple[int, int] = (1, 1),
    special: int = 2,
    width: int = 4,
    chunk_entries: int | None = None,
) -> Problem:
    """Random pooled tokens, in float64 so that no rounding decides between two blocks."""
    generator = torch.Generator().manual_seed(seed)
    block = pool[0] * parts[0], pool[1] * parts[1]
    rows, columns = -(-query_tokens // block[0]), -(-key_tokens // block[1])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q, k, v = (normal(heads, n, width) for n in (rows * parts[0], columns * parts[1], columns * parts[1]))
    v += 3 * normal(heads, 1, width)
    for x, tokens, part in ((q, query_tokens, pool[0]), (k, key_tokens, pool[1]), (v, key_tokens, pool[1])):
        x[:, -(-tokens // part) :] = 0  # sub-blocks without tokens
    special_k, special_v = normal(heads, special, width), normal(heads, special, width)
    pooled = PooledTokens(
        q * 1.4 * width**-0.5, k, 1, heads, query_tokens, key_tokens, *block, chunk_entries, *pool, special_k=special_k
    )  # fmt: skip
    return Problem(pooled, PooledValues(v, special_k, special_v))


@dataclass(frozen=True)
class Row:
    """One row in plain numbers.

    Attributes:
        weights: of each query sub-block, `[A]`.
        p: probabilities, `[A][T_k][F]`.
        u: values, `[T_k][F]`.
        special_p: `[A][S]`.
        special_u: `[S]`.
    """

    weights: list[float]
    p: list[list[list[float]]]
    u: list[list[Tensor]]
    special_p: list[list[float]]
    special_u: list[Tensor]

    def output(self, sub: int, kept: Iterable[int]) -> tuple[Tensor, float]:
        """Sum of p u over some blocks and all special keys, and of p."""
        total, mass = torch.zeros_like(self.u[0][0]), 0.0
        pairs = [pair for j in kept for pair in zip(self.p[sub][j], self.u[j], strict=True)]
        for p, u in pairs + list(zip(self.special_p[sub], self.special_u, strict=True)):
            total, mass = total + p * u, mass + p
        return total, mass

    def drift(self, kept: Iterable[int]) -> float:
        """Weighted squared change of the outputs when only some blocks are kept and their attention renormalised."""
        kept, moved = set(kept), 0.0
        for sub, weight in enumerate(self.weights):
            if weight == 0:
                continue
            whole, mass = self.output(sub, range(len(self.u)))
            part, share = self.output(sub, kept)
            assert abs(mass - 1) < 1e-12
            change = part / share - whole if share >= 1e-4 else (part - share * whole) / 1e-4
            moved += weight * float(change @ change)
        return moved


def row_of(problem: Problem, head: int, row: int) -> Row:
    """Softmax of one row over the tokens that sub-blocks stand for, and special keys."""
    pooled, values = problem.pooled, problem.values
    a, f = pooled.block_q // pooled.pool_q, pooled.block_k // pooled.pool_k
    sizes = [min(max(pooled.key_tokens - s * pooled.pool_k, 0), pooled.pool_k) for s in range(pooled.columns * f)]
    weights, p, special_p = [], [], []
    for sub in range(row * a, (row + 1) * a):
        tokens = min(max(pooled.query_tokens - sub * pooled.pool_q, 0), pooled.pool_q)
        weights.append(tokens / pooled.block_q)
        query = pooled.q[head, sub]
        mass = [size * math.exp(float(query @ pooled.k[head, s])) for s, size in enumerate(sizes)]
        special = [math.exp(float(query @ key)) for key in values.special_k[head]]
        total = sum(mass) + sum(special)
        p.append([[mass[j * f + part] / total for part in range(f)] for j in range(pooled.columns)])
        special_p.append([each / total for each in special])
    u = [[values.v[head, j * f + part] for part in range(f)] for j in range(pooled.columns)]
    return Row(weights, p, u, special_p, list(values.special_v[head]))


def smallest(costs: dict[int, float], count: int) -> set[int]:
    """Blocks of the least costs, ties to the lower one."""
    return set(sorted(costs, key=lambda j: (costs[j], j))[:count])


def largest_drifts(row: Row, count: int) -> set[int]:
    """Blocks whose loss alone moves the output most."""
    blocks = set(range(len(row.u)))
    return smallest({j: -row.drift(blocks - {j}) for j in blocks}, count)


def restored(row: Row, count: int, rounds: int, each: Callable[[set[int]], None] = lambda kept: None) -> set[int]:
    """The best set that swaps of the blocks that lower the drift most come by."""
    blocks = set(range(len(row.u)))
    kept = best = largest_drifts(row, count)
    each(kept)
    for turn in range(rounds):
        moves = min(max(1, round(0.5 * 2.0 ** -(turn + 1) * count)), count, len(blocks) - count)
        kept = kept | smallest({j: row.drift(kept | {j}) for j in blocks - kept}, moves)
        kept = kept - smallest({j: row.drift(kept - {j}) for j in kept}, moves)
        each(kept)
        if row.drift(kept) < row.drift(best):
            best = kept
    return best
