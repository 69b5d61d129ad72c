"""Depth Anything 3: its sites, its reordered views, its conventions, and what is built around its network."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from hess_plugin import HessError, UnknownModel, calibrate, patch, resolve_adapter
from hess_plugin.plugins import load_model
from hess_plugin.scenes.scene import Scene

SPARSE: dict[str, Any] = {"sparsity": 0.5, "block_q": 4, "block_k": 4}
CPU = torch.device("cpu")


def helpers(name: str) -> Any:
    return importlib.import_module(f"depth_anything_3.{name}")


class Holder(nn.Module):
    """What upstream's API object is to the network: it keeps it as `model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def nested(net: nn.Module) -> nn.Module:
    """Upstream's own nested model around this network, with a small metric network."""
    cfg = helpers("cfg")
    metric = cfg.load_config(helpers("registry").MODEL_REGISTRY["da3metric-large"])
    metric.net.name, metric.head.dim_in = "vits", 384
    small = cfg.load_config(helpers("registry").MODEL_REGISTRY["da3-small"])
    model: nn.Module = helpers("model.da3").NestedDepthAnything3Net(small, metric)
    model.da3 = net
    return model.eval()


def test_sites_are_the_blocks_that_upstream_calls_global(da3_net: nn.Module, small_scene: Scene) -> None:
    """`_get_intermediate_layers_not_chunked` names the kind of attention of every block it runs."""
    vit, adapter = da3_net.backbone.pretrained, resolve_adapter(da3_net)
    own, seen = vit.process_attention, []

    def spy(x: Tensor, block: nn.Module, kind: str, **options: Any) -> Tensor:
        seen.append((kind, block.attn))
        result: Tensor = own(x, block, kind, **options)
        return result

    vit.process_attention = spy
    with torch.no_grad():
        adapter.predict(da3_net, small_scene.images)
    assert [attn for kind, attn in seen if kind == "global"] == [site.module for site in adapter.sites(da3_net)]
    assert len(adapter.sites(da3_net)) == 4 and len(seen) == 12


def test_special_tokens_are_those_without_a_position(da3_net: nn.Module, small_scene: Scene) -> None:
    """`_prepare_rope` gives special tokens position 0 and every patch position 1."""
    adapter = resolve_adapter(da3_net)
    positions: list[Tensor] = []
    site = adapter.sites(da3_net)[0]
    hook = site.module.register_forward_pre_hook(lambda m, args, kw: positions.append(kw["pos"]), with_kwargs=True)
    with torch.no_grad():
        adapter.predict(da3_net, small_scene.images)
    hook.remove()
    layout = adapter.token_layout(da3_net, (small_scene.images[None],), {})
    special = layout.patches_first()[layout.patch_tokens :]
    assert layout.grid == (4, 5) and layout.leading == 1
    assert special.sort().values.tolist() == (positions[0][0] == 0).all(-1).nonzero()[:, 0].tolist()


def test_predictions_follow_upstreams_conventions(da3_net: nn.Module, small_scene: Scene) -> None:
    geometry = helpers("utils.geometry")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # InputProcessor.NORMALIZE
    images = (small_scene.images - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        found = resolve_adapter(da3_net).predict(da3_net, small_scene.images)
        output = da3_net(images[None], ref_view_strategy="first")
    c2w = geometry.affine_inverse(geometry.as_homogeneous(output.extrinsics))
    points = geometry.unproject_depth(output.depth[..., None], output.intrinsics, c2w)
    torch.testing.assert_close(found.c2w, c2w[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.points, points[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(found.confidence, output.depth_conf[0]) and bool(found.confident.all())


def test_reordered_views_are_sparse_in_the_same_way(da3_net: nn.Module) -> None:
    """With a reference view of its choice upstream permutes the views before the global blocks, and back after."""
    images = torch.rand(1, 5, 3, 56, 70, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([2, 0, 1, 3, 4])
    with torch.no_grad(), patch(da3_net, **SPARSE) as handle:
        middle = da3_net(images, ref_view_strategy="middle")
        moved = da3_net(images[:, order], ref_view_strategy="first")
    assert handle.report().sparsity == pytest.approx(0.5, abs=0.03)
    for name in ("depth", "extrinsics", "intrinsics"):
        torch.testing.assert_close(middle[name][:, order], moved[name], rtol=1e-3, atol=1e-4)


def test_what_users_call_is_bit_exact_when_nothing_is_dropped(da3_net: nn.Module, small_scene: Scene) -> None:
    """Upstream's default reference view depends on the images; given cameras take the place of camera tokens."""
    assert small_scene.c2w is not None and small_scene.intrinsics is not None
    images = torch.rand(2, 4, 3, 56, 70)
    cameras = {"extrinsics": torch.linalg.inv(small_scene.c2w)[None], "intrinsics": small_scene.intrinsics[None]}
    with torch.no_grad():
        plain = [da3_net(images), da3_net(small_scene.images[None], **cameras)]
        with patch(da3_net, sparsity=0.0) as handle:
            dense = [da3_net(images), da3_net(small_scene.images[None], **cameras)]
        assert all(site.calls == 2 for site in handle.report().sites)
        with patch(da3_net, **SPARSE):
            sparse = [da3_net(images), da3_net(small_scene.images[None], **cameras)]
    for name in ("depth", "depth_conf", "extrinsics", "intrinsics"):
        assert all(torch.equal(a[name], b[name]) for a, b in zip(plain, dense, strict=True))
        assert all(bool(output[name].isfinite().all()) for output in sparse)
    assert not torch.equal(plain[0]["depth"], sparse[0]["depth"])


def test_one_profile_serves_the_network_and_what_is_around_it(da3_net: nn.Module, small_scene: Scene) -> None:
    profile = calibrate(da3_net, [small_scene], eps=1e6)
    assert profile.sites[0] == "backbone.pretrained.blocks.5.attn" and profile.camera_weight == 1.0
    holder = Holder(da3_net)
    assert [site.name for site in resolve_adapter(holder).sites(holder)] == [f"model.{name}" for name in profile.sites]
    with torch.no_grad():
        with patch(da3_net, profile=profile, **SPARSE):
            alone = da3_net(small_scene.images[None])
        with patch(holder, profile=profile, **SPARSE):
            held = holder.model(small_scene.images[None])
    assert torch.equal(alone["depth"], held["depth"])
    again = calibrate(holder, [small_scene], eps=1e6)
    assert again.sites == profile.sites and again.fingerprint == profile.fingerprint
    assert all(torch.equal(profile.traces[name], again.traces[name]) for name in profile.traces)


def test_the_nested_model_is_patched_in_its_first_network(da3_net: nn.Module, small_scene: Scene) -> None:
    model = nested(da3_net)
    names = [site.name for site in resolve_adapter(model).sites(model)]
    assert names == [f"da3.backbone.pretrained.blocks.{i}.attn" for i in (5, 7, 9, 11)]
    holder = Holder(model)
    assert [site.name for site in resolve_adapter(holder).sites(holder)] == [f"model.{name}" for name in names]
    with torch.no_grad():
        nested_points = resolve_adapter(model).predict(model, small_scene.images).points
        assert torch.equal(nested_points, resolve_adapter(da3_net).predict(da3_net, small_scene.images).points)
        with patch(holder, **SPARSE) as handle:
            model.da3(small_scene.images[None])
    assert handle.report().sparsity == pytest.approx(0.5, abs=0.03)
    with pytest.raises(UnknownModel, match="no adapter claims DepthAnything3Net"):
        resolve_adapter(model.da3_metric)  # it sees each view alone


def test_lean_patches_run_the_head_in_chunks(
    da3_net: nn.Module, small_scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its head returns addict's dictionary, which is given back as one."""
    monkeypatch.setattr("hess_plugin.memory.chunks.CHUNK", 4000)
    images = small_scene.images[None]
    with torch.no_grad():
        with patch(da3_net, **SPARSE):
            plain = da3_net(images)
        calls = []
        da3_net.head.norm.register_forward_hook(lambda module, args, output: calls.append(output.shape[0]))
        with patch(da3_net, memory="lean", **SPARSE):
            lean = da3_net(images)
    assert calls == [1] * 4 + [2] * 4  # 4 levels of one frame, then of two, and not of all three
    assert type(lean) is type(plain)
    for name in ("depth", "depth_conf", "extrinsics"):
        torch.testing.assert_close(lean[name], plain[name], rtol=1e-4, atol=1e-5)


def test_weights_of_another_size_are_refused(da3_net: nn.Module, tmp_path: Path) -> None:
    state = {f"model.{name}": value for name, value in da3_net.state_dict().items()}
    torch.save(state, tmp_path / "small.pt")
    torch.save(da3_net.state_dict(), tmp_path / "bare.pt")
    for name in ("small.pt", "bare.pt"):  # as upstream saves it, and as somebody may who only has the network
        loaded = load_model("da3-small", str(tmp_path / name), device=CPU, dtype=torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), da3_net.parameters(), strict=True))
    with pytest.raises(HessError, match=r"of another model: backbone\.pretrained\.cls_token has shape"):
        load_model("da3-base", str(tmp_path / "small.pt"), device=CPU, dtype=torch.float32)
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_name": "da3-small"}')
    safetensors.torch.save_model(Holder(da3_net), str(folder / "model.safetensors"))
    with pytest.raises(HessError, match="they are of da3-small, not of da3-base"):
        load_model("da3-base", str(folder), device=CPU, dtype=torch.float32)
    loaded = load_model("da3", str(folder), device=CPU, dtype=torch.float32)  # the size is read from config.json
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), da3_net.parameters(), strict=True))


def test_models_without_attention_across_views_have_no_name(da3_net: nn.Module) -> None:
    with pytest.raises(UnknownModel, match="no adapter loads a model called 'da3mono-large'"):
        load_model("da3mono-large", "random", device=CPU, dtype=torch.float32)
