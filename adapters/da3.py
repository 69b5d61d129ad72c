"""Depth Anything 3 (ByteDance-Seed/depth-anything-3): the net, the API object around it, the nested metric model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hess_plugin import (
    Family,
    Framing,
    HessError,
    Prediction,
    Site,
    TokenLayout,
    fused_site,
    hookimpl,
    import_upstream,
    invert_rigid,
    load_weights,
    unproject,
)
from hess_plugin.adapters.parts import part

_PLACE = "https://github.com/ByteDance-Seed/depth-anything-3"
_NAMES = ("da3", "da3-small", "da3-base", "da3-large", "da3-giant", "da3nested-giant-large")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _network(model: Any) -> str | None:
    """Name of the net inside `model`: bare, in the API object, in the nested model, or in both; None without one."""
    for name in ("", "model", "da3", "model.da3"):
        net = part(model, name)
        start = part(net, "backbone.pretrained.alt_start")
        # It is -1 in the mono and metric models, which have no attention across views.
        if isinstance(start, int) and start != -1 and part(net, "cam_dec") is not None:
            return name
    return None


def _inside(model: Any) -> tuple[Any, str]:
    """The net and what its modules' names start with in `model`."""
    name = _network(model) or ""
    return model.get_submodule(name), f"{name}." if name else ""


@hookimpl
def hess_claim_model(model: Any) -> bool:
    return _network(model) is not None


@hookimpl
def hess_describe_family(model: Any) -> Family:
    net, prefix = _inside(model)
    blocks, across = f"{prefix}backbone.pretrained.blocks", _across(net)
    return Family(
        camera_weight=1.0,
        framing=Framing(net.backbone.pretrained.patch_size, 504, "longest"),  # process_res, "upper_bound_resize"
        source="lambda = 1 for Depth Anything 3: ReSS (arXiv 2609.35593), sweep of the camera weight",
        blocks=(blocks,),
        frame_heads=(f"{prefix}head",),
        # Other blocks treat frames, [B * S, N, C], alone; these only their network on tokens, [B, S * N, C].
        separable=tuple(
            (f"{blocks}.{i}.mlp", 1) if i in across else (f"{blocks}.{i}", 0)
            for i in range(len(net.backbone.pretrained.blocks))
        ),
    )


def _across(net: Any) -> list[int]:
    """Blocks that run on one sequence of all views: from alt_start on every odd one."""
    vit = net.backbone.pretrained
    return [i for i in range(len(vit.blocks)) if i >= vit.alt_start and i % 2 == 1]


@hookimpl
def hess_find_global_attention(model: Any) -> list[Site]:
    net, prefix = _inside(model)
    inside, name = f"{prefix}backbone.pretrained.blocks", prefix.removesuffix(".")
    return [fused_site(model, f"{inside}.{i}.attn", name, network=name) for i in _across(net)]


@hookimpl
def hess_token_layout(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenLayout:
    vit = _inside(model)[0].backbone.pretrained
    images = args[0] if args else kwargs["x"]  # [B, N, 3, H, W]
    grid = (images.shape[-2] // vit.patch_size, images.shape[-1] // vit.patch_size)
    # Upstream puts a reference view of its choice first: the order of the views changes, their tokens' does not.
    return TokenLayout(images.shape[1], grid[0] * grid[1], leading=1 + vit.num_register_tokens, grid=grid)


@hookimpl
def hess_predict(model: Any, images: Tensor) -> Prediction:
    net, _ = _inside(model)  # the API object forbids gradients, and the nested model only rescales, in place
    mean, std = (images.new_tensor(values)[:, None, None] for values in (_MEAN, _STD))
    output = net(((images - mean) / std)[None], ref_view_strategy="first")  # any other depends on the values
    w2c = torch.eye(4, device=images.device).repeat(len(images), 1, 1)
    w2c[:, :3] = output["extrinsics"][0].float()[:, :3]
    c2w = invert_rigid(w2c)
    points = unproject(output["depth"][0].float(), output["intrinsics"][0].float(), c2w)
    # As for VGGT: HeSS discards confidence below 1, and upstream's is 1 + exp(.), so every point counts.
    return Prediction(c2w, points, output["depth_conf"][0].float(), min_confidence=1.0)


class _Build:
    """One of upstream's configurations, as `load_weights` wants it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, model_name: str = "") -> nn.Module:
        registry = import_upstream("depth_anything_3.registry", _PLACE).MODEL_REGISTRY
        cfg = import_upstream("depth_anything_3.cfg", _PLACE)
        # Upstream's own default is the large model.
        name = model_name or ("da3-large" if self.name == "da3" else self.name)
        net: nn.Module = cfg.create_object(cfg.load_config(registry[name]))
        return net

    def from_pretrained(self, weights: str) -> nn.Module:
        """Load what upstream's API object saved: `model.` before every name, `model_name` in config.json."""
        build = self
        mixin: Any = import_upstream("huggingface_hub", "huggingface_hub").PyTorchModelHubMixin

        class Saved(nn.Module, mixin):
            def __init__(self, model_name: str = "da3-large", **_: Any) -> None:
                if build.name not in ("da3", model_name):
                    raise HessError(f"they are of {model_name}, not of {build.name}")
                super().__init__()
                self.model = build(model_name)

        net: nn.Module = Saved.from_pretrained(weights).model
        return net


@hookimpl
def hess_load_model(name: str, weights: str, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
    if name not in _NAMES:
        return None
    if "DA3_LOG_LEVEL" not in os.environ:  # by default every forward prints a line
        import_upstream("depth_anything_3.utils.logger", _PLACE).logger.level = 1
    return load_weights(_Build(name), weights, device=device, dtype=dtype, prefix="model.")
