"""MapAnything: upstream's own model, small, with a patch embedding where the released ones have a large encoder.

`HESS_TEST_MAPANYTHING` names a checkout and `HESS_TEST_UNICEPTION` its uniception, unless they are importable.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hess_plugin import HessError, patch, resolve_adapter
from hess_plugin.plugins import load_model
from hess_plugin.scenes.scene import Scene
from hess_plugin.testing import check_adapter, require

pytestmark = pytest.mark.upstream


def configs() -> tuple[dict[str, Any], ...]:
    """Upstream's configuration of ray directions, depth, pose, confidence, mask and scale, with small sizes."""
    free = {"vmin": -inf, "vmax": inf}
    rays = {
        "ray_directions_mode": "linear",
        "ray_directions_normalize_to_unit_sphere": True,
        "ray_directions_normalize_to_unit_image_plane": False,
        **{f"ray_directions_{key}": value for key, value in free.items()},
        "ray_directions_clamp_min_of_z_dir": False,
        "ray_directions_z_dir_min": -inf,
    }
    depth = {"depth_mode": "exp", "depth_vmin": 0, "depth_vmax": inf}
    confidence = {"confidence_type": "exp", "confidence_vmin": 1, "confidence_vmax": inf}
    trans = {"cam_trans_mode": "linear", **{f"cam_trans_{key}": value for key, value in free.items()}}
    quats = {
        "quaternions_mode": "linear",
        "quaternions_normalize": True,
        "quaternions_vmin": -inf,
        "quaternions_vmax": inf,
    }
    name = {"name": "raydirs+depth+pose+confidence+mask+scale"}
    encoder = {"encoder_str": "patch_embedder", "name": "encoder", "uses_torch_hub": False, "input_size": 56}
    sharing = {"name": "sharing", "indices": [1, 2], "norm_intermediate": True, "depth": 4, "dim": 64, "num_heads": 4}
    heads = {
        "type": "dpt+pose",
        "feature_head": {"feature_dim": 32, "hooks": [0, 1, 2, 3]},
        "regressor_head": {"output_dim": 6},
        "pose_head": {"num_resconv_block": 2, "rot_representation_dim": 4},
        "scale_head": {"output_dim": 1},
        "adaptor_type": "raydirs+depth+pose+confidence+mask",
        "dpt_adaptor": {**name, **rays, **depth, **confidence},
        "pose_adaptor": {**name, **trans, **quats},
        "scale_adaptor": {**name, "mode": "exp", "vmin": 1e-8, "vmax": inf},
    }
    never = ("overall_prob", "ray_dirs_prob", "depth_prob", "cam_prob", "sparse_depth_prob")
    dense, single = {"encoder_str": "dense_rep_encoder", "apply_pe": False}, {"encoder_str": "global_rep_encoder"}
    geometry = {
        **dict.fromkeys(never, 0),
        "dropout_prob": 1,
        "sparsification_removal_percent": 0,
        "depth_scale_norm_all_prob": 0,
        "pose_scale_norm_all_prob": 0,
        "ray_dirs_encoder_config": {"name": "rays", "in_chans": 3, **dense},
        "depth_encoder_config": {"name": "depth", "in_chans": 1, **dense},
        "cam_rot_encoder_config": {"name": "rotation", "in_chans": 4, **single},
        "cam_trans_encoder_config": {"name": "translation", "in_chans": 3, **single},
        "scale_encoder_config": {"name": "scale", "in_chans": 1, **single},
    }
    kind = {"model_type": "alternating_attention", "model_return_type": "intermediate_features"}
    info = {**kind, "custom_positional_encoding": None, "module_args": sharing}
    return {**encoder, "data_norm_type": "patch_embedder", "patch_size": 14, "enc_embed_dim": 64}, info, heads, geometry


def add_registers(encoder: nn.Module) -> None:
    """Let the encoder also return a register for each view, as the DINOv2 of version 1.1 returns its class token."""
    base: Any = importlib.import_module("uniception.models.encoders.base")

    def join(module: nn.Module, args: object, output: Any) -> Any:
        return base.ViTEncoderOutput(features=output.features, registers=output.features.flatten(2).mean(-1, True))

    encoder.register_forward_hook(join)


Checkouts = Callable[[str, str], list[str]]
Upstream = Callable[[str, str], AbstractContextManager[None]]


@pytest.fixture(params=[False, True], ids=["patches", "registers"])
def model(request: pytest.FixtureRequest, checkouts_of: Checkouts, upstream_of: Upstream) -> Iterator[nn.Module]:
    """Without per-view tokens, as version 1, and with one, as version 1.1."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for package, variable in (("uniception", "HESS_TEST_UNICEPTION"), ("mapanything", "HESS_TEST_MAPANYTHING")):
            found = checkouts_of(package, variable)
            if not found:
                pytest.skip(f"no upstream code: `{package}` is not importable and {variable} names no checkout")
            stack.enter_context(upstream_of(package, found[0]))
        try:
            build = importlib.import_module("mapanything.models.mapanything.model").MapAnything
        except ImportError as error:
            pytest.skip(f"MapAnything cannot be imported: {error}")
        torch.manual_seed(0)
        made: nn.Module = build("small", *configs(), use_register_tokens_from_encoder=True).eval()
        if request.param:
            add_registers(made.encoder)
        yield made


def test_keeps_the_contract(model: nn.Module, small_scene: Scene) -> None:
    assert resolve_adapter(model).name == "mapanything"
    checks = check_adapter(model, small_scene)
    print("\n".join(str(check) for check in checks))
    require(checks)


def test_even_blocks_are_global_and_their_specials_come_last(model: nn.Module, small_scene: Scene) -> None:
    """uniception's forward: `if depth_idx % 2 == 0` global, else each view alone without the shared scale token."""
    adapter, lengths = resolve_adapter(model), []
    special: list[Tensor] = []
    blocks = model.info_sharing.self_attention_blocks
    for block in blocks:
        block.attn.register_forward_pre_hook(lambda module, args: lengths.append(tuple(args[0].shape[:2])))
    layouts = []
    model.info_sharing.register_forward_pre_hook(
        lambda module, args, kwargs: layouts.append(adapter.token_layout(model, args, kwargs)), with_kwargs=True
    )
    model.info_sharing.proj_embed.register_forward_pre_hook(lambda module, args: special.append(args[0][0]))
    tokens = []
    model.info_sharing.register_forward_pre_hook(lambda module, args: tokens.append(args[0]))
    with torch.no_grad():
        adapter.predict(model, small_scene.images)
    (layout,), (given,) = layouts, tokens
    registers = 0 if given.additional_input_tokens_per_view is None else 1
    assert (layout.trailing, layout.tail, layout.leading, layout.grid) == (registers, 1, 0, (4, 5))
    whole, alone = (1, layout.tokens), (3, layout.tokens_per_frame)
    assert lengths == [whole, alone, whole, alone]
    assert [site.module for site in adapter.sites(model)] == [blocks[0].attn, blocks[2].attn]
    # Patches and special tokens are where the layout says, in the very sequence that upstream joins.
    order = layout.patches_first()
    patches = torch.cat([feature[0].flatten(1).mT for feature in given.features])
    others = [view[0].mT for view in given.additional_input_tokens_per_view or ()] + [
        given.additional_input_tokens[0].mT
    ]
    assert torch.equal(special[0][order], torch.cat([patches, *others]))


def test_predictions_follow_upstreams_conventions(model: nn.Module, small_scene: Scene) -> None:
    geometry: Any = importlib.import_module("mapanything.utils.geometry")
    with torch.no_grad():
        found = resolve_adapter(model).predict(model, small_scene.images)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = (small_scene.images - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        views = model([{"img": image[None], "data_norm_type": ["patch_embedder"]} for image in images])
    for index, view in enumerate(views):
        # Upstream's own composition of the same outputs, in the frame and unit that they are in.
        points = geometry.convert_ray_dirs_depth_along_ray_pose_trans_quats_to_pointmap(
            view["ray_directions"], view["depth_along_ray"], view["cam_trans"], view["cam_quats"]
        )
        torch.testing.assert_close(found.points[index], points[0], rtol=1e-4, atol=1e-4)
        local = view["ray_directions"] * view["depth_along_ray"]
        ours = local[0] @ found.c2w[index, :3, :3].mT + found.c2w[index, :3, 3]
        torch.testing.assert_close(ours, points[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(found.confidence[index], view["conf"][0])


def test_what_users_call_is_patched(model: nn.Module, small_scene: Scene) -> None:
    """`infer` runs in inference mode, under autocast, and its heads in smaller batches."""
    views = [{"img": image[None], "data_norm_type": ["patch_embedder"]} for image in small_scene.images]
    options = {"use_amp": False, "apply_mask": False, "mask_edges": False, "minibatch_size": 2}
    plain = model.infer([dict(view) for view in views], **options)
    with patch(model, sparsity=0.0):
        dense = model.infer([dict(view) for view in views], **options)
    with patch(model, sparsity=0.5, block_q=4, block_k=4) as handle:
        sparse = model.infer([dict(view) for view in views], **options)
    assert handle.report().sparsity == pytest.approx(0.5, abs=0.03)
    for a, b, c in zip(plain, dense, sparse, strict=True):
        assert torch.equal(a["pts3d"], b["pts3d"]) and bool(c["pts3d"].isfinite().all())
    assert not torch.equal(plain[0]["pts3d"], sparse[0]["pts3d"])


def test_weights_without_a_configuration_are_refused() -> None:
    with pytest.raises(HessError, match=r"built from the config\.json beside its weights, and 'random' has none"):
        load_model("mapanything", "random", device=torch.device("cpu"), dtype=torch.float32)
