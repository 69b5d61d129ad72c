"""Pi3 and Pi3X (yyfz/Pi3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hess_plugin import (
    Family,
    Framing,
    Prediction,
    Site,
    TokenLayout,
    fused_site,
    hookimpl,
    import_upstream,
    load_weights,
    to_world,
)
from hess_plugin.adapters.parts import has_parts


@hookimpl
def hess_claim_model(model: Any) -> bool:
    parts = ("decoder", "register_token", "point_decoder", "camera_decoder", "conf_decoder", "camera_head")
    return has_parts(model, *parts)


@hookimpl
def hess_describe_family(model: Any) -> Family:
    return Family(
        camera_weight=0.0,
        framing=Framing(model.patch_size, 255_000**0.5, "area"),  # upstream: at most so many pixels
        source="lambda = 0 for Pi3: HeSS (arXiv 2603.25336), sec. 4; ReSS (arXiv 2609.35593)",
        blocks=("decoder", "point_decoder.blocks", "camera_decoder.blocks", "conf_decoder.blocks"),
        separable=_separable(model),
    )


def _separable(model: Any) -> tuple[tuple[str, int], ...]:
    """What treats frames, [B * N, ...], or the tokens of one sequence, [B, N * P, C], alone."""
    heads = ("encoder", "point_decoder", "conf_decoder", "camera_decoder", "point_head", "conf_head", "camera_head")
    blocks = range(len(model.decoder))
    frame = [(f"decoder.{i}", 0) for i in blocks if i % 2 == 0]
    return (*((head, 0) for head in heads), *frame, *((f"decoder.{i}.mlp", 1) for i in blocks if i % 2 == 1))


@hookimpl
def hess_find_global_attention(model: Any) -> list[Site]:
    # decode() reshapes to one sequence of all frames before every odd block.
    return [fused_site(model, f"decoder.{i}.attn", "") for i in range(1, len(model.decoder), 2)]


@hookimpl
def hess_token_layout(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenLayout:
    images = args[0] if args else kwargs["imgs"]  # [B, N, 3, H, W]
    grid = (images.shape[-2] // model.patch_size, images.shape[-1] // model.patch_size)
    return TokenLayout(images.shape[1], grid[0] * grid[1], leading=model.patch_start_idx, grid=grid)


@hookimpl
def hess_predict(model: Any, images: Tensor) -> Prediction:
    if hasattr(model, "metric_token"):
        return _predict_pi3x(model, images)
    output = model(images[None])
    return _prediction(output["camera_poses"][0], output["points"][0], output["conf"][0])


def _predict_pi3x(model: Any, images: Tensor) -> Prediction:
    """Rebuild Pi3X's points from its heads: its forward scales the poses in place after autograd saved them.

    The metric scale is left out; it cancels under the similarity alignment of every error.
    """
    poses: list[Tensor] = []
    rays: list[tuple[Tensor, Tensor]] = []  # the point head may run in chunks of views
    hooks = [
        model.camera_head.register_forward_hook(lambda module, args, output: poses.append(output.clone())),
        model.point_head.register_forward_hook(lambda module, args, output: rays.append(tuple(output))),
    ]
    try:
        confidence = model(images[None])["conf"][0]
    finally:
        for hook in hooks:
            hook.remove()
    xy, z = (torch.cat(part).permute(0, 2, 3, 1).float() for part in zip(*rays, strict=True))
    z = torch.exp(z.clamp(max=15.0))
    local = torch.cat([xy * z, z], -1)
    c2w = torch.cat(poses).reshape(-1, 4, 4).float()
    return _prediction(c2w, to_world(local, c2w), confidence)


def _prediction(c2w: Tensor, points: Tensor, logits: Tensor) -> Prediction:
    # Confidence is a logit; upstream's own scripts keep a point where its sigmoid is above 0.1.
    return Prediction(c2w.float(), points.float(), logits[..., 0].detach().float().sigmoid(), min_confidence=0.1)


@hookimpl
def hess_load_model(name: str, weights: str, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
    if name not in ("pi3", "pi3x"):
        return None
    upstream = import_upstream(f"pi3.models.{name}", "https://github.com/yyfz/Pi3")
    return load_weights(upstream.Pi3 if name == "pi3" else upstream.Pi3X, weights, device=device, dtype=dtype)
