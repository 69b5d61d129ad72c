"""The demo model as something the command line can load: ``--model demo``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hess_plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    import torch
    from torch import nn


@hookimpl
def hess_load_model(name: str, weights: str, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
    """Load the shipped demo model (``--weights shipped``), or build it with random or other weights.

    It is built like VGGT, and the ``vggt`` adapter claims it.
    """
    if name != "demo":
        return None
    from hess_plugin.loading import load_weights

    from .model import TinyVGGT, load_demo_model

    if weights in ("", "shipped"):
        return load_demo_model(device).to(dtype)
    return load_weights(TinyVGGT, weights, device=device, dtype=dtype)
