"""Head pruning at the attention cost of block sparsity: the baselines that HeSS compares with (sec. 4.4, Fig. 7).

    gradients = gate_gradients(model, calibration_scenes)
    mask = pruning_mask("kwon", gradients, sparsity=0.5, camera_weight=0.5)
    with prune_heads(model, mask) as pruned:
        predictions = model(images)
    pruned.report()

The pruned share of global-attention heads is the dropped share of query-key pairs, so an equal sparsity is an equal
cost of attention. HeSS names the two papers and neither the loss nor the data that the baselines were given: here they
get the errors, the scenes and the mixing of errors of HeSS itself, and they prune the heads of global attention alone.
"""

from .gradients import GateGradients, gate_gradients
from .kwon import kwon_mask
from .masks import METHODS, pruning_mask
from .michel import michel_mask
from .pruned import Pruned, prune_heads
from .tuning import tuned_mask

__all__ = [
    "METHODS",
    "GateGradients",
    "Pruned",
    "gate_gradients",
    "kwon_mask",
    "michel_mask",
    "prune_heads",
    "pruning_mask",
    "tuned_mask",
]
