"""What hess-plugin has to know about the toy model: an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hess_plugin import (
    Family,
    Framing,
    Prediction,
    Projection,
    Replacement,
    Site,
    TokenLayout,
    hookimpl,
    intercept,
    invert_rigid,
    load_weights,
)


@hookimpl
def hess_claim_model(model: Any) -> bool:
    """Look at attributes: a fork may call its class otherwise."""
    return all(hasattr(model, part) for part in ("scene_blocks", "scene_token", "pose_token"))


@hookimpl
def hess_describe_family(model: Any) -> Family:
    """Images of six patches a side, whole; a half for the camera, for want of a measurement."""
    framing = Framing(model.patch, 6 * model.patch)
    return Family(camera_weight=0.5, source="not measured", framing=framing, blocks=("scene_blocks",))


@hookimpl
def hess_find_global_attention(model: Any) -> list[Site]:
    """Every block attends over the whole scene; each projection is a layer of its own, so its rows start at 0."""
    rows = {letter: Projection(f"{letter}_proj.weight", 0) for letter in "qkv"}
    found = [(f"scene_blocks.{i}.attention", block.attention) for i, block in enumerate(model.scene_blocks)]
    return [Site(name, module, module.heads, module.width, "", rows) for name, module in found]


@hookimpl
def hess_token_layout(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenLayout:
    """Patches, then the pose tokens of the view; the scene token closes the sequence."""
    views = args[0] if args else kwargs["views"]  # [S, 3, H, W]
    grid = (views.shape[-2] // model.patch, views.shape[-1] // model.patch)
    return TokenLayout(len(views), grid[0] * grid[1], trailing=model.pose_tokens, tail=1, grid=grid)


@hookimpl
def hess_predict(model: Any, images: Tensor) -> Prediction:
    """The model gives world to camera, hess-plugin wants camera to world."""
    extrinsics, points, certainty = model(images)
    last = torch.tensor([[[0.0, 0.0, 0.0, 1.0]]], device=images.device).expand(len(images), -1, -1)
    w2c = torch.cat([extrinsics.float(), last], 1)
    return Prediction(invert_rigid(w2c), points.float(), certainty.detach().float().sigmoid(), min_confidence=0.0)


@hookimpl
def hess_replace_attention(site: Site, attend: Callable[..., Tensor]) -> Replacement | None:
    """Where attention is spelled out, there is no call to answer: run a forward that makes it."""
    return intercept(site, attend, forward=_forward_with_a_call) if site.module.spelled else None


def _forward_with_a_call(self: Any, tokens: Tensor) -> Tensor:
    q, k, v = (layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in self.layers())
    return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@hookimpl
def hess_load_model(name: str, weights: str, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
    """``--model toy``, and the variant that spells attention out."""
    if name not in ("toy", "toy-spelled"):
        return None
    from hess_plugin_toy.model import Toy  # not at the top: looking for adapters must not import every model

    return load_weights(lambda: Toy(spelled=name == "toy-spelled"), weights, device=device, dtype=dtype)
