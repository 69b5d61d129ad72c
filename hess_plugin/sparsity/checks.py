"""What the functions of this package refuse, and how they say it."""

from __future__ import annotations

import math

from torch import Tensor

from hess_plugin.exceptions import HessError


class SparsityError(HessError, ValueError):
    """A sparsity rule or a budget was asked for that cannot be met."""


def check_patches(q: Tensor, k: Tensor, block_q: int, block_k: int) -> None:
    """Refuse patch q and k that are not `[B, H, N, d]` of one width, or blocks below one token.

    Raises:
        SparsityError: naming what is wrong.
    """
    for name, value in (("q", q), ("k", k)):
        if value.dim() != 4 or 0 in value.shape or not value.is_floating_point():
            raise SparsityError(
                f"{name} must be floating patch tokens [B, H, N, d], no size zero; "
                f"got {value.dtype} {list(value.shape)}."
            )
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise SparsityError(
            f"q and k must agree in items, heads and head width; got {list(q.shape)} and {list(k.shape)}."
        )
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size < 1:
            raise SparsityError(f"{name} must be at least one token; got {size}.")


def check_parts(block_q: int, block_k: int, pool_q: int, pool_k: int) -> None:
    """Refuse sub-blocks that do not divide their blocks.

    Raises:
        SparsityError: naming what is wrong.
    """
    for side, block, part in (("q", block_q, pool_q), ("k", block_k, pool_k)):
        if part < 1 or block % part:
            raise SparsityError(f"pool_{side} must divide block_{side}, {block} tokens; got {part}.")


def check_special(k: Tensor, special: Tensor | None) -> None:
    """Refuse special keys that are not `[B, H, S, d]` beside patch keys.

    Raises:
        SparsityError: naming the shapes.
    """
    if special is not None and (
        special.dim() != 4 or special.shape[:2] != k.shape[:2] or special.shape[3] != k.shape[3]
    ):
        raise SparsityError(
            f"special must hold keys [B, H, S, d] beside those of k, {list(k.shape)}; got {list(special.shape)}."
        )


def check_rule(sparse_ratio: float | None, cdf_threshold: float | None, minimum: int) -> None:
    """Refuse a uniform rule without a part, or a part outside [0, 1].

    Raises:
        SparsityError: naming what is wrong.
    """
    if sparse_ratio is None and cdf_threshold is None:
        raise SparsityError("The uniform rule needs sparse_ratio, cdf_threshold or both; got neither.")
    for name, value in (("sparse_ratio", sparse_ratio), ("cdf_threshold", cdf_threshold)):
        if value is not None and not 0.0 <= value <= 1.0:  # also refuses NaN
            raise SparsityError(f"{name} must lie in 0..1; got {value}.")
    check_minimum(minimum)


def check_minimum(minimum: int) -> None:
    """Refuse a floor that would let a row keep nothing.

    Raises:
        SparsityError: naming it.
    """
    if minimum < 1:
        raise SparsityError(f"minimum must be at least one key block a row; got {minimum}.")


def check_grid(rows: int, columns: int, minimum: int) -> None:
    """Refuse an empty block map.

    Raises:
        SparsityError: naming it.
    """
    if rows < 1 or columns < 1:
        raise SparsityError(f"A block map needs at least one row and one column; got {rows} x {columns}.")
    check_minimum(minimum)


def check_sparsity(sparsity: float) -> None:
    """Refuse a sparsity outside 0 (dense) to 1.

    Raises:
        SparsityError: naming it.
    """
    if not 0.0 <= sparsity <= 1.0 or math.isnan(sparsity):
        raise SparsityError(f"sparsity must lie in 0 (dense) to 1; got {sparsity}.")
