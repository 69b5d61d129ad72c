"""Pi3X as it is by default: with inputs for depth, rays and poses, given or not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hess_plugin import patch, resolve_adapter
from hess_plugin.scenes.scene import Scene
from hess_plugin.testing import check_adapter, require

SPARSE = {"sparsity": 0.5, "block_q": 4, "block_k": 4}


def count_calls(module: nn.Module) -> list[nn.Module]:
    seen: list[nn.Module] = []
    for block in module:  # type: ignore[attr-defined]
        block.register_forward_hook(lambda module, args, output: seen.append(module))
    return seen


def with_poses(model: nn.Module, scene: Scene) -> dict[str, Tensor]:
    """What a user does who has cameras and depth; upstream draws masks from the global generator."""
    assert scene.c2w is not None and scene.intrinsics is not None and scene.depth is not None
    torch.manual_seed(0)
    with torch.no_grad():
        output: dict[str, Tensor] = model(
            scene.images[None], poses=scene.c2w[None], intrinsics=scene.intrinsics[None], depths=scene.depth[None]
        )
    return output


def test_keeps_the_contract(multimodal_pi3x: nn.Module, small_scene: Scene) -> None:
    injected = count_calls(multimodal_pi3x.pose_inject_blk)
    checks = check_adapter(multimodal_pi3x, small_scene)
    print("\n".join(str(check) for check in checks))
    require(checks)
    assert not injected  # no poses are given while calibrating


def test_images_alone_predict_what_the_plain_model_does(multimodal_pi3x: nn.Module, small_scene: Scene) -> None:
    adapter = resolve_adapter(multimodal_pi3x)
    with torch.no_grad():
        both = adapter.predict(multimodal_pi3x, small_scene.images)
        multimodal_pi3x.disable_multimodal()
        plain = adapter.predict(multimodal_pi3x, small_scene.images)
        output = multimodal_pi3x(small_scene.images[None])
    assert torch.equal(both.points, plain.points) and torch.equal(both.c2w, plain.c2w)
    # Upstream's own outputs but for the metric scale, which it multiplies points and camera centres by.
    metric = output["metric"][0]
    torch.testing.assert_close(plain.points * metric, output["points"][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.centres * metric, output["camera_poses"][0, :, :3, 3], rtol=1e-4, atol=1e-5)
    assert torch.equal(plain.c2w[:, :3, :3], output["camera_poses"][0, :, :3, :3])


def test_a_forward_with_poses_is_patched_too(multimodal_pi3x: nn.Module, small_scene: Scene) -> None:
    """The blocks that inject poses attend across views, over patches alone: they are no sites and stay dense."""
    sites = resolve_adapter(multimodal_pi3x).sites(multimodal_pi3x)
    assert [site.name for site in sites] == ["decoder.1.attn", "decoder.3.attn"]
    injected = count_calls(multimodal_pi3x.pose_inject_blk)
    plain = with_poses(multimodal_pi3x, small_scene)
    assert len(injected) == 1
    with patch(multimodal_pi3x, sparsity=0.0):
        dense = with_poses(multimodal_pi3x, small_scene)
    assert all(torch.equal(plain[name], dense[name]) for name in plain)
    with patch(multimodal_pi3x, **SPARSE) as handle:  # type: ignore[arg-type]
        sparse = with_poses(multimodal_pi3x, small_scene)
    assert len(injected) == 3 and bool(sparse["points"].isfinite().all())
    assert not torch.equal(sparse["points"], plain["points"])
    assert [(site.calls, site.dense_calls) for site in handle.report().sites] == [(1, 0)] * 2
    with torch.no_grad():
        torch.manual_seed(0)
        images_only = multimodal_pi3x(small_scene.images[None])
    assert not torch.equal(images_only["points"], plain["points"])  # the poses do matter
