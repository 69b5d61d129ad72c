"""What a change of one head's output does to the output of its layer: the metric in which selectors compare blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from .sites import Site


class OutputMetric:
    """The metric ``M_h = W_O^h' W_O^h`` of every head of a site (ReSS, arXiv 2609.35593), made when first asked for.

    Args:
        site: whose W_O; where it has none to read, heads' outputs are compared as they are.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._made: tuple[tuple[object, ...], Tensor] | None = None

    @torch.no_grad()
    def root(self, device: torch.device) -> Tensor | None:
        """Roots ``R_h`` with ``R_h R_h' = M_h``, float32 ``[H, d, r]``; None for the identity.

        Made again only where the weight is another one or was written to since.
        """
        try:
            weight = self._site.output_weight()
        except ReferenceError:  # a copy of the model whose original is gone
            weight = None
        if weight is None:
            return self._made[1] if self._made is not None else None
        version = None if weight.is_inference() else weight._version
        key = (id(weight), version, device)
        if self._made is None or self._made[0] != key:
            self._made = key, self._root(weight.detach()).to(device)
        return self._made[1]

    def _root(self, weight: Tensor) -> Tensor:
        """A triangular factor: unlike Cholesky's, one of a singular metric as well."""
        # See Layouts.order: not inference tensors, and whatever the caller's default device and autocast are.
        with torch.inference_mode(False), torch.autocast(weight.device.type, enabled=False):
            heads = weight.to(torch.float32, copy=True).unflatten(1, (self._site.num_heads, -1)).movedim(1, 0)
            return torch.linalg.qr(heads, mode="r").R.mT.contiguous()
