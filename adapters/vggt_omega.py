"""VGGT-Omega (facebookresearch/vggt-omega)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hess_plugin import (
    AdapterError,
    Family,
    Framing,
    Prediction,
    Site,
    TokenLayout,
    fused_site,
    hookimpl,
    import_upstream,
    load_weights,
    unproject,
)
from hess_plugin.adapters.parts import has_parts, part
from hess_plugin.adapters.vggt import cameras, token_layout

_PLACE = "https://github.com/facebookresearch/vggt-omega"


@hookimpl
def hess_claim_model(model: Any) -> bool:
    parts = ("frame_blocks", "inter_frame_blocks", "inter_frame_attention_types", "patch_token_start")
    return has_parts(part(model, "aggregator"), *parts)


@hookimpl
def hess_describe_family(model: Any) -> Family:
    def present(*heads: str) -> tuple[str, ...]:
        return tuple(head for head in heads if part(model, head) is not None)

    layers = range(len(model.aggregator.inter_frame_blocks))
    return Family(
        camera_weight=0.5,
        # Upstream's "balanced" keeps as many tokens, but may exceed them by a row, and cuts aspects beyond 1 : 2.
        framing=Framing(model.aggregator.patch_size, 512, "area"),
        source="lambda = 0.5, that of VGGT: no sweep was published for VGGT-Omega, which predicts the same quantities",
        blocks=("aggregator.frame_blocks", "aggregator.inter_frame_blocks"),
        frame_heads=present("dense_head"),
        unused_heads=present("text_alignment_head"),
        # Not whole frame blocks: they are given a rotation for each patch of a frame as well.
        separable=tuple((f"aggregator.frame_blocks.{i}.mlp", 0) for i in layers)
        + tuple((f"aggregator.inter_frame_blocks.{i}.mlp", 1) for i in layers),
    )


@hookimpl
def hess_find_global_attention(model: Any) -> list[Site]:
    # In a "register" layer only camera and register tokens meet: there is nothing that could be dropped.
    kinds = model.aggregator.inter_frame_attention_types
    found = [i for i, kind in enumerate(kinds) if kind == "global"]
    return [fused_site(model, f"aggregator.inter_frame_blocks.{i}.attn", "aggregator") for i in found]


@hookimpl
def hess_token_layout(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenLayout:
    return token_layout(model.aggregator.patch_size, model.aggregator.patch_token_start, args, kwargs)


@hookimpl
def hess_predict(model: Any, images: Tensor) -> Prediction:
    output = model(images[None])  # on a GPU upstream enters its own half-precision autocast, whatever is around it
    if "pose_enc" not in output or "depth" not in output:
        raise AdapterError(
            "this VGGT-Omega was built without its camera or depth head; build it with enable_camera=True and "
            "enable_depth=True."
        )
    depth = output["depth"][0, ..., 0].float()
    c2w, intrinsics = cameras(output["pose_enc"][0].float(), *depth.shape[1:])
    # As for VGGT: confidence is 1 + exp(.), and HeSS discards what is below 1.
    return Prediction(c2w, unproject(depth, intrinsics, c2w), output["depth_conf"][0].float(), min_confidence=1.0)


@hookimpl
def hess_load_model(name: str, weights: str, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
    if name != "vggt-omega":
        return None
    upstream = import_upstream("vggt_omega.models", _PLACE).VGGTOmega
    if weights != "random":
        return load_weights(upstream, weights, device=device, dtype=dtype)
    # Upstream leaves the mask of the key bias NaN and the layer scales empty for its weights to fill.
    initialise = import_upstream("vggt_omega.models.layers.vision_transformer", _PLACE).init_weights_vit
    return load_weights(lambda: upstream().apply(initialise), weights, device=device, dtype=dtype)
