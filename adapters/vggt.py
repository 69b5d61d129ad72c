"""VGGT (facebookresearch/vggt), before and after its token cache of May 2026, and models built like it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hess_plugin import (
    AdapterError,
    Family,
    Framing,
    JoinedLayers,
    Prediction,
    Site,
    TokenLayout,
    fused_site,
    hookimpl,
    import_upstream,
    invert_rigid,
    load_weights,
    quaternion_to_matrix,
    unproject,
)
from hess_plugin.adapters.parts import has_parts, part

_KNOWN_FORWARDS = (".vggt.models.vggt", ".hess_plugin.demo.model")
"""Where forwards of whole models are from that keep the layers to their heads; one of a subclass may return them."""


@hookimpl
def hess_claim_model(model: Any) -> bool:
    aggregator = part(model, "aggregator")
    if not has_parts(aggregator, "frame_blocks", "global_blocks", "camera_token", "register_token", "patch_start_idx"):
        return False
    # StreamVGGT has the same parts, but its global attention is causal and cached: not this adapter's.
    attention = part(aggregator, "global_blocks.0.attn")
    try:
        parameters = inspect.signature(type(attention).forward).parameters
    except (AttributeError, TypeError, ValueError):  # no block, no attention in it, or none that can be looked into
        return False
    return not {"attn_mask", "past_key_values"} & set(parameters)


@hookimpl
def hess_describe_family(model: Any) -> Family:
    dense = [name for name in ("point_head", "depth_head") if part(model, name) is not None]
    return Family(
        camera_weight=0.5,
        framing=Framing(model.aggregator.patch_size, _width(model), "crop"),
        source="lambda = 0.5 for VGGT: ReSS (arXiv 2609.35593), sweep of the camera weight",
        blocks=("aggregator.frame_blocks", "aggregator.global_blocks"),
        frame_heads=tuple(dense[:1]),
        unused_heads=tuple(dense[1:]),  # hess_predict reads one of the two
        separable=_separable(model),
        joined_layers=_joined_layers(model),
    )


def _separable(model: Any) -> tuple[tuple[str, int], ...]:
    """What treats frames, [B * S, ...] or [B, S, ...], or the tokens of one sequence, [B, N, C], alone."""
    count = len(model.aggregator.global_blocks)
    found = [("aggregator.patch_embed", 0), *((f"aggregator.frame_blocks.{i}", 0) for i in range(count))]
    found += [(f"aggregator.global_blocks.{i}.mlp", 1) for i in range(count)]
    heads = ("point_head", "depth_head", "track_head.feature_extractor")
    return (*found, *((head, 1) for head in heads if part(model, head) is not None))


def _joined_layers(model: Any) -> JoinedLayers | None:
    """The layers that the heads read; None where all are kept for a reason, or nobody knows who reads which."""
    aggregator = model.aggregator
    if hasattr(aggregator, "cached_layer_indices"):  # since May 2026 upstream keeps only some itself
        return None
    if not f".{getattr(type(model).forward, '__module__', '')}".endswith(_KNOWN_FORWARDS):
        return None
    count, read = len(aggregator.global_blocks), {-1}  # the camera head reads the last
    for name, child in model.named_children():
        layers = [head.intermediate_layer_idx for head in child.modules() if hasattr(head, "intermediate_layer_idx")]
        if not layers and name not in ("aggregator", "camera_head"):
            return None
        read |= {index for some in layers for index in some}
    blocks = ("aggregator.frame_blocks", "aggregator.global_blocks")
    return JoinedLayers("aggregator", blocks, tuple(sorted({index % count for index in read})))


def _width(model: Any) -> int | None:
    """Image width that the model was built for, to which upstream scales every image."""
    embed = model.aggregator.patch_embed
    size = getattr(getattr(embed, "patch_embed", embed), "img_size", None)  # DINOv2 keeps it one level down
    return None if size is None else int(size[1])


@hookimpl
def hess_find_global_attention(model: Any) -> list[Site]:
    count = len(model.aggregator.global_blocks)
    return [fused_site(model, f"aggregator.global_blocks.{i}.attn", "aggregator") for i in range(count)]


@hookimpl
def hess_token_layout(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenLayout:
    return token_layout(model.aggregator.patch_size, model.aggregator.patch_start_idx, args, kwargs)


def token_layout(size: int, leading: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenLayout:
    """Special tokens, then patches of `size` pixels, of each frame that an aggregator is called with."""
    images = args[0] if args else kwargs["images"]  # [B, S, 3, H, W]
    grid = (images.shape[-2] // size, images.shape[-1] // size)
    return TokenLayout(images.shape[1], grid[0] * grid[1], leading=leading, grid=grid)


@hookimpl
def hess_predict(model: Any, images: Tensor) -> Prediction:
    output = model(images[None])
    if "pose_enc" not in output:
        raise AdapterError("this VGGT was built without its camera head; build it with enable_camera=True.")
    dense = "world_points" if "world_points" in output else "depth"
    c2w, intrinsics = cameras(output["pose_enc"][0].float(), *output[dense].shape[2:4])
    if dense == "world_points":
        points, confidence = output["world_points"][0], output["world_points_conf"][0]
    else:
        depth, confidence = output["depth"][0, ..., 0].float(), output["depth_conf"][0]
        points = unproject(depth, intrinsics, c2w)
    # HeSS discards confidence below 1; upstream's is 1 + exp(.), so this keeps every point, as in the paper.
    return Prediction(c2w, points.float(), confidence.float(), min_confidence=1.0)


def cameras(encoding: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Decode poses `[S, 9]`: camera-from-world translation and quaternion xyzw, field of view (h, w) in radians.

    Returns:
        `c2w` `[S, 4, 4]` and pinhole cameras `[S, 3, 3]` on upstream's grid of pixels: centre at W/2, H/2.
    """
    w2c = torch.eye(4, device=encoding.device).repeat(len(encoding), 1, 1)
    w2c[:, :3, :3] = quaternion_to_matrix(encoding[:, 3:7])
    w2c[:, :3, 3] = encoding[:, :3]
    intrinsics = torch.eye(3, device=encoding.device).repeat(len(encoding), 1, 1)
    size = torch.tensor([height, width], device=encoding.device)
    intrinsics[:, 1, 1], intrinsics[:, 0, 0] = (size / 2 / torch.tan(encoding[:, 7:] / 2)).unbind(-1)
    intrinsics[:, 0, 2], intrinsics[:, 1, 2] = width / 2, height / 2
    return invert_rigid(w2c), intrinsics


@hookimpl
def hess_load_model(name: str, weights: str, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
    if name != "vggt":
        return None
    upstream = import_upstream("vggt.models.vggt", "https://github.com/facebookresearch/vggt")
    return load_weights(upstream.VGGT, weights, device=device, dtype=dtype)
