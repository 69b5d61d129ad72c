"""Drift: how far the output of a row moves when blocks are left out and the rest is renormalised.

A row is described by the probabilities p of its key sub-blocks s and special keys, by their values u, and by its
output v = sum of p u. Leaving out block j alone, of probability P_j, moves the output by d_j / (1 - P_j) with
d_j = P_j v - sum over the parts s of j of p_s u_s. Leaving out a set D moves it by g / K with g = sum of d_j and
K = 1 - sum of P_j over D (ReSS, arXiv 2609.35593). Rows with several query sub-blocks a add what each of them says,
weighted by its share of the tokens: what is left out is the same for all of them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .pooled_values import PooledValues
from .pooling import PooledTokens
from .sub_blocks import by_part, exact_dtype, key_parts, part_scores, probabilities, query_parts, query_weights

LEAST = 1e-4
"""What the share that is kept counts as at least, where drift is divided by it."""

NEARLY_ALL = {torch.float32: 2.0**-8, torch.float64: 2.0**-22}
"""Share of what a row keeps. The drift of a row left with less is a difference of numbers that agree in all digits of
their dtype: noise that may be zero, and would throw out the one block that matters."""

SURE = 1e20
"""What the loss of nearly all that a row keeps counts as, above every drift."""


class HeadValues(NamedTuple):
    """Keys and values of some heads, as the chunks of their rows need them.

    Attributes:
        keys: `[h, F * T_k + S, d]`, pooled and special.
        bias: `[F * T_k + S]`, added to their scores.
        u: `[h, F * T_k + S, d]`, values.
        gram: `[h, F, F, 1, T_k]`, products of the values of the parts of each block.
    """

    keys: Tensor
    bias: Tensor
    u: Tensor
    gram: Tensor


def head_values(pooled: PooledTokens, values: PooledValues, heads: slice) -> HeadValues:
    """Keys and values of some heads."""
    keys, bias = key_parts(pooled, heads, values.special_k)
    u = torch.cat([by_part(values.v[heads], pooled.parts_k), values.special_v[heads]], 1).to(exact_dtype(pooled.q))
    patches = pooled.columns * pooled.parts_k
    u = normalised(u, patches)
    parts = u[:, :patches].unflatten(1, (pooled.parts_k, 1, pooled.columns))
    gram = torch.stack([(parts * parts[:, f : f + 1]).sum(-1) for f in range(pooled.parts_k)], 1)
    return HeadValues(keys, bias, u, gram)


def normalised(u: Tensor, patches: int) -> Tensor:
    """Values around their mean and of size one at most, which moves no minimum; what is no number counts as zero.

    Products of drifts are differences of products of values, from which a mean far from zero would take all digits.
    """
    u = u.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    u = u / u.abs().amax((1, 2), keepdim=True).clamp_(min=torch.finfo(u.dtype).tiny)
    return u - u[:, :patches].mean(1, keepdim=True)


class State(NamedTuple):
    """What is left of rows once blocks are left out.

    Attributes:
        g: `[h, A * r, d]`, sum of the drifts of what is left out.
        kept: `[h, A * r, 1]`, K, the probability of what is kept.
    """

    g: Tensor
    kept: Tensor


class ChunkDrift:
    """Drifts of all blocks of a chunk of rows: `h` heads, `r` rows of each."""

    def __init__(self, pooled: PooledTokens, head: HeadValues, heads: slice, rows: slice) -> None:
        self._sub_rows = pooled.parts_q, -1
        self._sub_blocks = pooled.parts_k, pooled.columns
        self._weights = query_weights(pooled, rows)
        scores = part_scores(query_parts(pooled, heads, rows), head.keys, head.bias)
        p = probabilities(scores)
        patches = pooled.columns * pooled.parts_k
        self._u, self._p = head.u[:, :patches], p[..., :patches]
        self._parts = self._p.unflatten(-1, self._sub_blocks).unbind(-2)
        self._v = torch.bmm(p, head.u)
        self._special = torch.bmm(p[..., patches:], head.u[:, patches:])
        self._special_share = p[..., patches:].sum(-1, keepdim=True)
        self._blocks = functools.reduce(torch.add, self._parts)
        self._squares = self._squared(head.gram)
        self._nearly = NEARLY_ALL[self._p.dtype]

    def _squared(self, gram: Tensor) -> Tensor:
        """|d_j|^2 times the weight of the sub-row, `[h, A * r, T_k]`."""
        toward = torch.bmm(self._v, self._u.mT).unflatten(-1, self._sub_blocks).unbind(-2)
        squares = self._blocks.square().mul_(self._v.square().sum(-1, keepdim=True))
        for f, p in enumerate(self._parts):
            products = gram[:, f, f] * p
            for other in range(f + 1, len(self._parts)):
                products.addcmul_(gram[:, f, other], self._parts[other], value=2)
            squares.addcmul_(p, products.addcmul_(self._blocks, toward[f], value=-2))
        return squares.clamp_(min=0.0).mul_(self._weights)

    def alone(self) -> Tensor:
        """Squared drift of the output when a block is left out alone, `[h, r, T_k]`."""
        left = 1 - self._blocks
        drift = self._squares / left.clamp(min=LEAST).square_()
        return self._of_rows(torch.where(left < self._nearly, SURE * self._weights, drift))

    def state(self, keep: Tensor) -> State:
        """What is left when only some blocks are kept, marked by 1 among 0 in `[h, r, T_k]`."""
        p = self._p.unflatten(-1, self._sub_blocks).unflatten(1, self._sub_rows)
        p = (p * keep[:, None, :, None]).flatten(3, 4).flatten(1, 2)
        kept = p.sum(-1, keepdim=True).add_(self._special_share)
        return State(torch.baddbmm(self._special, p, self._u).addcmul_(kept, self._v, value=-1), kept)

    def objective(self, state: State) -> Tensor:
        """J, squared drift of the output at a state, `[h, r]`."""
        drift = state.g.square().sum(-1, keepdim=True) / state.kept.clamp(min=LEAST).square_()
        return self._of_rows(drift * self._weights).squeeze(-1)

    def after(self, state: State, sign: int) -> Tensor:
        """J after one more block is restored (sign 1) or left out (sign -1), for each block: `[h, r, T_k]`."""
        g = state.g * self._weights
        length = (g * state.g).sum(-1, keepdim=True)
        g.mul_(2 * sign)
        ahead = torch.bmm(g, self._u.mT).sub_((g * self._v).sum(-1, keepdim=True))
        moved = self._squares + length
        for p, product in zip(self._parts, ahead.unflatten(-1, self._sub_blocks).unbind(-2), strict=True):
            moved.addcmul_(p, product)
        share = torch.add(state.kept, self._blocks, alpha=sign)
        lost = share < self._nearly * state.kept
        moved.div_(share.clamp_(min=LEAST).square_())
        return self._of_rows(torch.where(lost, SURE * self._weights, moved))

    def _of_rows(self, x: Tensor) -> Tensor:
        """Sums over the query sub-blocks of each row: `[h, A * r, n]` -> `[h, r, n]`."""
        return functools.reduce(torch.add, x.unflatten(1, self._sub_rows).unbind(1))
