"""MapAnything (facebookresearch/map-anything) with alternating attention, whose transformer is uniception's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hess_plugin import (
    AdapterError,
    Family,
    Framing,
    HessError,
    Prediction,
    Site,
    TokenLayout,
    fused_site,
    hookimpl,
    import_upstream,
    load_weights,
    quaternion_to_matrix,
)
from hess_plugin.adapters.parts import has_parts, part

_PLACE = "https://github.com/facebookresearch/map-anything"
_BLOCKS = "info_sharing.self_attention_blocks"


@hookimpl
def hess_claim_model(model: Any) -> bool:
    # Its other kinds of transformer attend across views in every block, or only from one view to the others.
    kind = part(model, "info_sharing_type")
    parts = ("encoder", "info_sharing", "scale_token", "dense_adaptor")
    return isinstance(kind, str) and kind == "alternating_attention" and has_parts(model, *parts)


@hookimpl
def hess_describe_family(model: Any) -> Family:
    return Family(
        camera_weight=0.5,
        # Upstream's loader has a table of shapes whose longest side is 518, and cuts images to the nearest of them.
        framing=Framing(model.encoder.patch_size, 518, "longest"),
        source="lambda = 0.5, that of VGGT: no sweep was published for MapAnything",
        # Its dense head is called with the views of the batch in one axis, so it cannot run view by view.
        blocks=(_BLOCKS,),
        separable=tuple((f"{_BLOCKS}.{i}" if i % 2 else f"{_BLOCKS}.{i}.mlp", 1 - i % 2) for i in _indices(model)),
    )


def _indices(model: Any) -> range:
    return range(len(model.info_sharing.self_attention_blocks))


@hookimpl
def hess_find_global_attention(model: Any) -> list[Site]:
    # uniception's forward runs even blocks on one sequence of all views, odd ones on each view.
    return [fused_site(model, f"{_BLOCKS}.{i}.attn", "info_sharing") for i in _indices(model) if i % 2 == 0]


@hookimpl
def hess_token_layout(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenLayout:
    given = args[0] if args else kwargs["model_input"]
    height, width = given.features[0].shape[-2:]  # one [B, C, h, w] for each view
    own, shared = given.additional_input_tokens_per_view, given.additional_input_tokens  # [B, C, T]
    return TokenLayout(
        len(given.features),
        height * width,
        trailing=0 if own is None else own[0].shape[-1],
        tail=0 if shared is None else shared.shape[-1],
        grid=(height, width),
    )


@hookimpl
def hess_predict(model: Any, images: Tensor) -> Prediction:
    kind = model.encoder.data_norm_type
    norms = import_upstream("uniception.models.encoders.image_normalizations", "uniception").IMAGE_NORMALIZATION_DICT
    mean, std = (value.to(images)[:, None, None] for value in (norms[kind].mean, norms[kind].std))
    views = [{"img": image[None], "data_norm_type": [kind]} for image in (images - mean) / std]
    outputs = model(views)  # not `infer`, which forbids gradients
    if "cam_quats" not in outputs[0] or "conf" not in outputs[0]:
        raise AdapterError(
            "this MapAnything predicts no poses or no confidence; take one whose scene representation has both."
        )
    found = {
        key: torch.cat([view[key] for view in outputs]).float() for key in ("cam_quats", "cam_trans", "pts3d", "conf")
    }
    c2w = torch.eye(4, device=images.device).repeat(len(images), 1, 1)
    c2w[:, :3, :3] = quaternion_to_matrix(found["cam_quats"])
    c2w[:, :3, 3] = found["cam_trans"]
    # Upstream's confidence is 1 + exp(.); as for VGGT every point counts.
    return Prediction(c2w, found["pts3d"], found["conf"], min_confidence=1.0)


@hookimpl
def hess_load_model(name: str, weights: str, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
    if name != "mapanything":
        return None
    if weights == "random" or Path(weights).is_file():
        raise HessError(
            f"MapAnything is built from the config.json beside its weights, and {weights!r} has none; give a hub id "
            "such as facebook/map-anything, or a folder with both."
        )
    return load_weights(import_upstream("mapanything.models", _PLACE).MapAnything, weights, device=device, dtype=dtype)
