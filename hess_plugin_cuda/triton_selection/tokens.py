"""What the kernels of the selectors by drift are given, and what queries see: plain tensors, named."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Pooled tokens of some heads, contiguous. Sub-blocks of a block lie side by side.

    Attributes:
        q: queries times the scale, float32 `[h, T_q * A, d]`.
        k: keys, float32 `[h, T_k * F, d]`.
        v: their values, float32 `[h, T_k * F, e]`, in coordinates whose squared lengths count. They are best centred
            on zero, which changes no drift but its rounding.
        special_k: special keys, float32 `[h, S, d]`.
        special_v: their values, float32 `[h, S, e]`.
        bias: float32 `[T_k * F]`, added to the scores of pooled keys: the logarithm of their tokens.
        weights: float32 `[T_q * A]`, what each query sub-block counts.
        parts_q: A, sub-blocks of a query block: 1, 2, 4 or 8.
        parts_k: F, sub-blocks of a key block, likewise.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    special_k: Tensor
    special_v: Tensor
    bias: Tensor
    weights: Tensor
    parts_q: int
    parts_k: int

    @property
    def rows(self) -> int:
        """T_q."""
        return self.q.shape[1] // self.parts_q

    @property
    def columns(self) -> int:
        """T_k."""
        return self.k.shape[1] // self.parts_k

    def products(self) -> Tensor:
        """Products of the values of the parts of each block, float32 `[h, T_k, F, F]`."""
        parts = self.v.unflatten(1, (self.columns, self.parts_k))
        # Not a matrix product, which the user's settings may allow TF32.
        return torch.stack([(parts * parts[:, :, f : f + 1]).sum(-1) for f in range(self.parts_k)], -1)


@dataclass(frozen=True)
class Attended:
    """What queries see, float32 `[h, T_q * A]` or `[h, T_q * A, e]`.

    Attributes:
        top: largest score.
        inverse: 1 / sum of exp(score - top), or 0 where no score is finite.
        out: values weighted by the probabilities.
        special_out: the part of the special keys in it.
        special_share: their probability.
    """

    top: Tensor
    inverse: Tensor
    out: Tensor
    special_out: Tensor
    special_share: Tensor

    def part(self, heads: slice, queries: slice) -> Attended:
        """Of some of the queries; contiguous if it is those of one head, or all of several."""
        parts = (self.top, self.inverse, self.out, self.special_out, self.special_share)
        return Attended(*(x[heads, queries] for x in parts))
