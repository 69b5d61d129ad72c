"""Pooled values: what each key block would add to the output of an attention, in the coordinates of a metric."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import SparsityError, check_parts, check_special
from .pooling import PooledTokens, pool_heads
from .sub_blocks import exact_dtype, without_autocast


@dataclass(frozen=True, eq=False)
class PooledValues:
    """Values of key sub-blocks and of special keys, and the special keys themselves.

    Attributes:
        v: pooled patch values, float32 `[B * H, T_k * F, d]`, in the order of `PooledTokens.k`; zeros where a
            sub-block has no tokens. Squared lengths are those of the metric: values are times the head's root.
        special_k: special keys, float32 `[B * H, S, d]`.
        special_v: special values, float32 `[B * H, S, d]`, times the root.
    """

    v: Tensor
    special_k: Tensor
    special_v: Tensor

    def check_beside(self, pooled: PooledTokens) -> None:
        """Refuse values that are not those of the pooled keys.

        Raises:
            SparsityError: naming the shapes.
        """
        heads, keys, _ = pooled.k.shape
        special = self.special_k.shape[:2]
        if self.v.shape[:2] != (heads, keys) or special[0] != heads or self.special_v.shape[:2] != special:
            raise SparsityError(
                f"values must be those of the pooled keys {list(pooled.k.shape)} and of special keys; got "
                f"{list(self.v.shape)} beside special keys {list(self.special_k.shape)} and special values "
                f"{list(self.special_v.shape)}. Pool them by the same block_k and pool_k."
            )


@torch.no_grad()
def pool_values(
    k: Tensor, v: Tensor, patches: int, block_k: int, *, pool_k: int | None = None, root: Tensor | None = None
) -> PooledValues:
    """Pool the values of patch keys by blocks, or by parts of them, and take those of special keys as they are.

    Args:
        k: keys `[B, H, N, d]`, patches first, special keys after them.
        v: values `[B, H, N, d]`, likewise.
        patches: how many keys are patches.
        block_k: keys of a block.
        pool_k: keys to pool together, a divisor of block_k; None is block_k.
        root: `[H, d, r]`, root of each head's metric: a change x of the head's output weighs `|x @ root|^2`. None
            counts every component alike. The metric of what follows an output projection W_O is W_O^h' W_O^h.

    Raises:
        SparsityError: the shapes do not fit, or sub-blocks do not divide a block.
    """
    pool_k = block_k if pool_k is None else pool_k
    check_parts(1, block_k, 1, pool_k)
    check_special(k, v)
    if k.shape[2] != v.shape[2] or not 1 <= patches <= k.shape[2]:
        raise SparsityError(
            f"k and v must hold {patches} patches, one at least, and the special tokens after them; got "
            f"{list(k.shape)} and {list(v.shape)}."
        )
    if root is not None and (root.dim() != 3 or tuple(root.shape[:2]) != (v.shape[1], v.shape[3])):
        raise SparsityError(f"root must be [H, d, r] of {v.shape[1]} heads of {v.shape[3]}; got {list(root.shape)}.")
    pooled = pool_heads(v[:, :, :patches], block_k, pool_k)
    special_k, special_v = (x[:, :, patches:].flatten(0, 1).float() for x in (k, v))
    if root is None:
        return PooledValues(pooled, special_k, special_v)
    return PooledValues(_times(pooled, root), special_k, _times(special_v, root))


def _times(values: Tensor, root: Tensor) -> Tensor:
    """Values `[B * H, n, d]` times the root of their head."""
    dtype = exact_dtype(values)
    with without_autocast(values.device):
        heads = values.unflatten(0, (-1, root.shape[0])).to(dtype)
        return (heads @ root.to(values.device, dtype)).flatten(0, 1).float()
