"""A head-pruning baseline by name: the mask it gives at a sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hess_plugin.exceptions import CalibrationError
from hess_plugin.plugins import resolve_adapter
from hess_plugin.profiles import weights_fingerprint
from hess_plugin.scenes.image_set import ImageSet
from hess_plugin.scenes.scene import Scene

from .gradients import GateGradients
from .kwon import kwon_mask
from .michel import michel_mask
from .tuning import tuned_mask

METHODS = ("michel", "kwon", "kwon-tuned")


def pruning_mask(
    method: str,
    gradients: GateGradients,
    sparsity: float,
    camera_weight: float,
    *,
    model: nn.Module | None = None,
    scenes: Sequence[Scene | ImageSet] | None = None,
    **tuning: Any,
) -> Tensor:
    """Choose the heads to prune at a sparsity.

    Args:
        method: ``michel`` (gate-gradient importance), ``kwon`` (Fisher-based search and rearrangement) or
            ``kwon-tuned`` (the same with real-valued masks).
        gradients: of the model's gates, on calibration scenes.
        sparsity: share of heads to prune, 0 to below 1; the nearest number of heads is pruned.
        camera_weight: lambda of HeSS, 0 to 1.
        model: to tune masks on; ``kwon-tuned`` only.
        scenes: calibration scenes to tune masks on; ``kwon-tuned`` only.
        tuning: further arguments of `tuned_mask`.

    Returns:
        float64 ``[L, H]`` for `prune_heads`.

    Raises:
        CalibrationError: an unknown method, a value out of range, or no model and scenes to tune on.
        ProfileMismatch: the gradients are another model's.
    """
    if method not in METHODS:
        raise CalibrationError(f"method is {method!r}, wanted one of {', '.join(METHODS)}.")
    if method == "michel":
        return michel_mask(gradients, sparsity, camera_weight)
    mask = kwon_mask(gradients, sparsity, camera_weight)
    if method == "kwon":
        return mask
    if model is None or scenes is None:
        raise CalibrationError("method 'kwon-tuned' fits masks on scenes; give model and scenes.")
    sites = resolve_adapter(model, tuning.get("adapter"), tuning.get("manager")).sites(model)
    gradients.check(sites, weights_fingerprint(sites))
    return tuned_mask(model, scenes, mask, **tuning)
