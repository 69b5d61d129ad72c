"""What a change of one head's output does to the output of its layer: the metric in which selectors compare blocks."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from .sites import Site


@dataclass(frozen=True)
class _Made:
    """A root and what it was made of: the weight, not kept alive, and which of its values."""

    weight: weakref.ref[Tensor]
    state: tuple[int | None, int]
    root: Tensor


class OutputMetric:
    """The metric ``M_h = W_O^h' W_O^h`` of every head of a site (ReSS, arXiv 2609.35593).

    An approximation where a scale follows the projection (LayerScale), which is left out.

    Args:
        site: whose W_O; where it has none to read, heads' outputs are compared as they are.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._made: _Made | None = None

    @torch.no_grad()
    def root(self, device: torch.device) -> Tensor | None:
        """Roots ``R_h`` with ``R_h R_h' = M_h``, float32 ``[H, d, r]``; None for the identity.

        Made when first asked for, and again where the weight is another one or was written to. What goes around
        autograd's count of writes (``weight.data.mul_()``, any write to an inference tensor) is not seen; roots are
        then those of the earlier values, which is a question of which blocks are kept and of nothing else.
        """
        try:
            weight = self._site.output_weight()
        except ReferenceError:  # a copy of the model whose original is gone: as it was last seen
            return None if self._made is None else self._made.root.to(device)
        if weight is None:
            return None
        state = (None if weight.is_inference() else weight._version, weight.data_ptr())
        made = self._made
        if made is None or made.weight() is not weight or made.state != state or made.root.device != device:
            made = self._made = _Made(weakref.ref(weight), state, self._root(weight.detach()).to(device))
        return made.root

    def _root(self, weight: Tensor) -> Tensor:
        """A triangular factor: unlike Cholesky's, one of a singular metric as well."""
        # See Layouts.order: not inference tensors, and whatever the caller's autocast is.
        with torch.inference_mode(False), torch.autocast(weight.device.type, enabled=False):
            heads = weight.to(torch.float32, copy=True).unflatten(1, (self._site.num_heads, -1)).movedim(1, 0)
            return torch.linalg.qr(heads, mode="r").R.mT.contiguous()
