"""VGGT-Omega: which of its layers are sites, where its special tokens lie, and its conventions."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hess_plugin import Framing, patch, resolve_adapter
from hess_plugin.plugins import load_model
from hess_plugin.scenes.scene import Scene

CPU = torch.device("cpu")
REGISTER_LAYERS = {2, 6, 9, 14, 20}  # the default of upstream's Aggregator


def load(weights: str = "random") -> nn.Module:
    return load_model("vggt-omega", weights, device=CPU, dtype=torch.float32)


def test_register_layers_are_no_sites(omega_code: None, small_scene_of_omega: Scene) -> None:
    """`_run_inter_frame_attention_block` gives some layers camera and register tokens alone: 17 of each view."""
    model = load()
    adapter = resolve_adapter(model)
    lengths: dict[int, int] = {}
    for index, block in enumerate(model.aggregator.inter_frame_blocks):
        block.attn.register_forward_pre_hook(lambda m, args, i=index: lengths.__setitem__(i, args[0].shape[1]))
    with torch.no_grad():
        adapter.predict(model, small_scene_of_omega.images)
    layout = adapter.token_layout(model, (small_scene_of_omega.images[None],), {})
    assert layout.leading == 17 and layout.grid == (4, 5) and layout.tokens == 3 * (17 + 20)
    sites = [int(site.name.split(".")[2]) for site in adapter.sites(model)]
    assert sites == [i for i in range(24) if i not in REGISTER_LAYERS]
    assert lengths == {i: 3 * 17 if i in REGISTER_LAYERS else layout.tokens for i in range(24)}


def test_the_key_bias_stays_masked_in_a_patched_model(omega_code: None, small_scene_of_omega: Scene) -> None:
    """Upstream's qkv layer multiplies its bias by a mask that is 0 for keys: they must not move with that bias."""
    model, outputs = load(), []
    images = small_scene_of_omega.images[None]
    for value in (0.0, 100.0):
        for site in resolve_adapter(model).sites(model):
            width = site.num_heads * site.head_dim
            with torch.no_grad():
                site.module.qkv.bias[width : 2 * width] = value
        with torch.no_grad(), patch(model, sparsity=0.5, block_q=4, block_k=4):
            outputs.append(model(images)["depth"])
    assert torch.equal(*outputs)


def test_predictions_follow_upstreams_conventions(omega_code: None, small_scene_of_omega: Scene) -> None:
    utils: Any = importlib.import_module("vggt_omega.utils.pose_enc")
    inverse = importlib.import_module("vggt_omega.utils.geometry").closed_form_inverse_se3
    model = load()
    with torch.no_grad():
        found = resolve_adapter(model).predict(model, small_scene_of_omega.images)
        output = model(small_scene_of_omega.images[None])
    w2c, intrinsics = utils.encoding_to_camera(output["pose_enc"], (64, 80))
    torch.testing.assert_close(found.c2w, inverse(w2c[0]), rtol=1e-5, atol=1e-5)
    # Back through upstream's own cameras every point is at its pixel and depth.
    local = torch.einsum("sij,shwj->shwi", w2c[0, :, :, :3], found.points) + w2c[0, :, None, None, :, 3]
    pixels: Tensor = torch.einsum("sij,shwj->shwi", intrinsics[0], local)
    torch.testing.assert_close(pixels[..., 2], output["depth"][0, ..., 0], rtol=1e-3, atol=1e-3)
    v, u = torch.meshgrid(torch.arange(64.0), torch.arange(80.0), indexing="ij")
    seen = pixels[..., :2] / pixels[..., 2:]
    torch.testing.assert_close(seen, torch.stack([u, v], -1).expand_as(seen), rtol=1e-3, atol=5e-2)
    assert torch.equal(found.confidence, output["depth_conf"][0]) and bool(found.confident.all())


def test_lean_patches_run_the_head_in_chunks(
    omega_code: None, small_scene_of_omega: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hess_plugin.memory.chunks.CHUNK", 4000)
    model, images = load(), small_scene_of_omega.images[None]
    with torch.no_grad():
        with patch(model, sparsity=0.5, block_q=4, block_k=4):
            plain = model(images)
        calls: list[int] = []
        model.dense_head.norm.register_forward_hook(lambda module, args, output: calls.append(output.shape[0]))
        with patch(model, sparsity=0.5, block_q=4, block_k=4, memory="lean"):
            lean = model(images)
    assert calls == [1] * 4 + [2] * 4  # 4 levels of one frame, then of two, and not of all three
    for name in ("depth", "depth_conf", "pose_enc"):
        torch.testing.assert_close(lean[name], plain[name], rtol=1e-4, atol=1e-5)


def test_framing_is_near_upstreams_balanced_shape(omega_code: None) -> None:
    """`_balanced_target_shape`, whose module needs torchvision: about (512 / 16)^2 tokens at the image's aspect."""
    framing = resolve_adapter(model := load()).family(model).framing
    assert framing == Framing(16, 512, "area")
    for height, width in ((480, 640), (1080, 1920), (2000, 1000), (777, 778), (500, 1000)):
        columns = (1024 * width / height) ** 0.5
        place = framing.place(height, width)
        assert abs(place.columns // 16 - round(columns)) <= 1 and abs(place.rows // 16 - round(1024 / columns)) <= 1


def test_random_weights_are_initialised_and_a_file_is_taken_as_it_is(omega_code: None, tmp_path: Path) -> None:
    """Upstream's constructor leaves NaN in the mask of the key bias and nothing in particular in the layer scales."""
    model = load()
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    torch.save(model.state_dict(), tmp_path / "omega.pt")
    loaded = load(str(tmp_path / "omega.pt"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


@pytest.fixture
def small_scene_of_omega(plane: Any) -> Scene:
    scene: Scene = plane(3, 64, 80)
    return scene
