"""Fisher-based choice of heads (Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers").

The loss is expanded to second order in the gates, with the empirical Fisher matrix ``F`` of the gates for the Hessian:
pruning costs ``(1 - m)^T F (1 - m)``. Two steps choose the heads: a search with the diagonal of F over the whole model,
then a rearrangement within each layer, with that layer's block of F. The third, real-valued masks, is in `tuning`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gradients import GateGradients
from .mixing import mix, pruned_count, without_least


def gate_fisher(gradients: GateGradients, camera_weight: float) -> Tensor:
    """Compute the empirical Fisher information of the gates, layer by layer: the mean over scenes of ``g g^T``.

    The matrices of the two errors are divided by their traces over all layers and mixed (see `mixing.mix`).

    Returns:
        float64 ``[L, H, H]``, positive semi-definite.

    Raises:
        CalibrationError: see `mixing.mix`.
    """
    camera, points = (_outer(gradients.present(error)) for error in ("camera", "points"))
    return mix(camera, points, camera_weight, lambda fisher: fisher.diagonal(dim1=1, dim2=2).sum())


def _outer(gradient: Tensor) -> Tensor:
    """Mean of outer products within layers: ``[n, L, H]`` to ``[L, H, H]``; NaN for n = 0."""
    return torch.einsum("nlh,nlk->lhk", gradient, gradient) / (len(gradient) or torch.nan)


def search(fisher: Tensor, count: int) -> Tensor:
    """Prune the `count` heads with the least sum of diagonal Fisher information: ``[L, H, H]`` to a mask ``[L, H]``.

    With one cost for every head, the best set under a limit on cost is the lowest ones.
    """
    return without_least(fisher.diagonal(dim1=1, dim2=2), count)


def rearrange(mask: Tensor, fisher: Tensor) -> Tensor:
    """Swap pruned and kept heads of each layer so that they matter less together, their numbers staying.

    Greedily, one round: each kept head in turn, least Fisher information first, joins the pruned ones, and the one
    without which the rest costs least leaves them.

    Args:
        mask: ``[L, H]`` of 0 and 1.
        fisher: ``[L, H, H]``.

    Returns:
        A mask ``[L, H]``; ``(1 - m)^T F (1 - m)`` of no layer has grown.
    """
    result = torch.ones_like(mask)
    for layer, (kept, block) in enumerate(zip(mask, fisher, strict=True)):
        order = block.diagonal().argsort(stable=True).tolist()
        pruned = [head for head in order if kept[head] == 0]
        for head in [head for head in order if kept[head] != 0] if pruned else []:
            trial = [*pruned, head]
            among = block[trial][:, trial]
            # Cost of the trial set without each of its members in turn.
            cost = among.sum() - 2 * among.sum(1) + among.diagonal()
            leaves = int(cost.argmin())
            if cost[leaves] < cost[-1]:
                del trial[leaves]
                pruned = trial
        result[layer, pruned] = 0.0
    return result


def kwon_mask(gradients: GateGradients, sparsity: float, camera_weight: float) -> Tensor:
    """Mask ``[L, H]`` float64 of 0 and 1: search, then rearrangement.

    Raises:
        CalibrationError: a value is out of range, or no error that the weight selects has a gradient.
    """
    fisher = gate_fisher(gradients, camera_weight)
    return rearrange(search(fisher, pruned_count(sparsity, *fisher.shape[:2])), fisher)
