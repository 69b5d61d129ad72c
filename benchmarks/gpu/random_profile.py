"""A profile with random scores, for timing: what attention costs depends on how uneven budgets are, not on whose."""

from __future__ import annotations

import torch
from torch import nn

from hess_plugin.plugins import resolve_adapter
from hess_plugin.profiles import Profile
from hess_plugin.scoring import ERROR_NAMES
from hess_plugin.sites import PROJECTIONS


def random_profile(model: nn.Module, sigma: float = 1.5) -> Profile:
    """Log-normal traces for every site of a model; to be used with `strict=False`."""
    adapter = resolve_adapter(model)
    sites = adapter.sites(model)
    generator = torch.Generator().manual_seed(0)
    shape = (1, len(sites), sites[0].num_heads)
    traces = torch.randn(shape, generator=generator, dtype=torch.float64).mul(sigma).exp()
    return Profile(
        adapter=adapter.name,
        sites=tuple(site.name for site in sites),
        num_heads=sites[0].num_heads,
        scenes=("random",),
        traces={f"{error}.{projection}": traces for error in ERROR_NAMES for projection in PROJECTIONS},
        camera_weight=0.5,
        fingerprint="0" * 16,
        metadata={"weights": "random"},
    )
