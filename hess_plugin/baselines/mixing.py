"""What all head-pruning methods share: how many heads go, and how two errors become one objective."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable

import torch
from torch import Tensor

from hess_plugin.exceptions import CalibrationError


def pruned_count(sparsity: float, layers: int, heads: int) -> int:
    """Number of heads to prune: the one nearest to the sparsity, of which ``1 / (layers * heads)`` is the step.

    Every head costs the same, so the pruned share of heads is the dropped share of attention.

    Raises:
        CalibrationError: the sparsity is not in 0 to below 1.
    """
    if not isinstance(sparsity, numbers.Real) or isinstance(sparsity, bool) or not 0.0 <= sparsity < 1.0:
        raise CalibrationError(f"sparsity is {sparsity!r}, wanted a number from 0 (dense) to below 1.")
    return round(sparsity * layers * heads)


def without_least(importance: Tensor, count: int) -> Tensor:
    """Mask ``[L, H]`` float64: 0 for the `count` least important heads of all layers, else 1; first ones on a tie."""
    mask = torch.ones(importance.numel(), dtype=torch.float64)
    mask[importance.flatten().argsort(stable=True)[:count]] = 0.0
    return mask.view_as(importance)


def mix(camera: Tensor, points: Tensor, camera_weight: float, size: Callable[[Tensor], Tensor]) -> Tensor:
    """Mix what the two errors say about heads, each divided by its size over the whole model.

    HeSS does not say which loss its pruning baselines were given. Here they get both of its own errors, weighted as
    it weights them. Dividing by the size over all layers takes out units alone: how important layers are relative to
    each other, on which pruning depends, stays. An error that no scene has is left to the other.

    Args:
        camera: of the camera error, any shape; NaN throughout where no scene has it.
        points: of the point error.
        camera_weight: lambda of HeSS, eq. 9, 0 (points only) to 1 (camera only).
        size: a positive number for a tensor that is not zero throughout, linear in it.

    Raises:
        CalibrationError: the weight is out of range, or no error that it selects has a gradient.
    """
    if not 0.0 <= camera_weight <= 1.0:
        raise CalibrationError(f"camera_weight is {camera_weight}, wanted a number from 0 (points) to 1 (camera).")
    total = torch.zeros_like(camera)
    any_found = False
    for values, weight in ((camera, camera_weight), (points, 1.0 - camera_weight)):
        scale = float(size(values))
        if weight > 0.0 and not math.isnan(scale) and scale > 0.0:
            total = total + weight * values / scale
            any_found = True
    if not any_found:
        raise CalibrationError(
            f"with camera_weight {camera_weight} no gate has a gradient; measure scenes that have the missing error or "
            "change camera_weight."
        )
    return total
