"""Small images, profiles made by hand, and all that a patch could leave behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hess_plugin import Profile
from hess_plugin.plugins import resolve_adapter
from hess_plugin.profiles import ERROR_NAMES, weights_fingerprint
from hess_plugin.sites import PROJECTIONS

BLOCKS: dict[str, Any] = {"block_q": 8, "block_k": 8}
SPECIALS = 5


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Everything a model predicts, as one vector."""
    with torch.no_grad():
        predicted = model(images)
    names = ("pose_enc", "depth", "depth_conf", "world_points", "world_points_conf")
    return torch.cat([predicted[name].flatten() for name in names])


def images_of(views: int, height: int = 60, width: int = 60, batch: int | None = None, seed: int = 0) -> Tensor:
    shape = (views, 3, height, width) if batch is None else (batch, views, 3, height, width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def profile_of(model: nn.Module, traces: Tensor | None = None, **changes: Any) -> Profile:
    """A profile made by hand: `traces` `[L, H]` for both errors and all projections."""
    sites = resolve_adapter(model).sites(model)
    heads = sites[0].num_heads
    if traces is None:
        traces = torch.arange(1.0, heads + 1).repeat(len(sites), 1)
    fields: dict[str, Any] = {
        "adapter": "vggt",
        "sites": tuple(site.name for site in sites),
        "num_heads": heads,
        "scenes": ("one",),
        "traces": {f"{e}.{p}": traces.double()[None] for e in ERROR_NAMES for p in PROJECTIONS},
        "camera_weight": 0.5,
        "fingerprint": weights_fingerprint(sites),
    }
    return Profile(**{**fields, **changes})


def trace_of(model: nn.Module) -> dict[str, object]:
    """All that a patch could leave behind in a model."""
    state: dict[str, object] = {"state_dict": list(model.state_dict())}
    for name, module in model.named_modules():
        state[name] = (
            type(module),
            {key: id(value) for key, value in vars(module).items()},
            {key: list(value.items()) for key, value in vars(module).items() if "hooks" in key and value is not None},
            module.training,
        )
    for name, parameter in model.named_parameters():
        state[f"{name}="] = (id(parameter), parameter._version, parameter.requires_grad, parameter.grad)
    return state
