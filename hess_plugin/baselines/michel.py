"""Head importance by gate gradients (Michel, Levy and Neubig 2019, "Are Sixteen Heads Really Better than One?")."""

from __future__ import annotations

import torch
from torch import Tensor

from .gradients import GateGradients
from .mixing import mix, pruned_count, without_least


def head_importance(gradients: GateGradients, camera_weight: float) -> Tensor:
    """Compute the expected sensitivity of the error to each gate, ``E |dL / dgate|``, comparable between layers.

    The absolute value is taken scene by scene, as in the paper's formula, so that gradients of opposite sign do not
    cancel (the authors' BERT program takes it token by token, where heads have no gate). Both errors are
    mixed (see `mixing.mix`), then each layer is divided by its l2 norm, as the paper does for comparing layers; a
    layer without any gradient is of no importance.

    Args:
        gradients: of L sites with H heads.
        camera_weight: lambda of HeSS, 0 to 1.

    Returns:
        float64 ``[L, H]``, each row of norm 1 or 0.

    Raises:
        CalibrationError: see `mixing.mix`.
    """
    camera, points = (gradients.present(error).abs().mean(0) for error in ("camera", "points"))
    importance = mix(camera, points, camera_weight, torch.sum)
    norm = importance.norm(dim=1, keepdim=True)
    return torch.where(norm > 0, importance / norm, 0.0)


def michel_mask(gradients: GateGradients, sparsity: float, camera_weight: float) -> Tensor:
    """Mask ``[L, H]`` float64 of 0 and 1 that prunes the least important heads of the whole model.

    All are chosen from one estimate of importance, as the paper does; a layer may lose all of its heads.

    Raises:
        CalibrationError: a value is out of range, or no error that the weight selects has a gradient.
    """
    count = pruned_count(sparsity, len(gradients.sites), gradients.num_heads)
    return without_least(head_importance(gradients, camera_weight), count)
