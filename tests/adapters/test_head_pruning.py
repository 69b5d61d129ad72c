"""Head pruning on upstream's own classes: gate gradients, masks by every method, and what tuning has to find."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hess_plugin import resolve_adapter
from hess_plugin.baselines import gate_gradients, prune_heads, pruning_mask
from hess_plugin.baselines.projecting import joints
from hess_plugin.scenes.scene import Scene

EPS = 1e6  # random weights predict points anywhere


def points(model: nn.Module, scene: Scene) -> Tensor:
    with torch.inference_mode():
        return resolve_adapter(model).predict(model, scene.images).points


def stream_error(model: nn.Module, scene: Scene, mask: Tensor, layer: int) -> float:
    """Squared error of the residual stream behind one site's attention, in the pruned against the original model."""
    adapter = resolve_adapter(model)
    sites = adapter.sites(model)
    with torch.inference_mode():
        joint = joints(adapter, model, sites, lambda images: adapter.predict(model, images), scene.images)[layer]
        assert joint.after is not None
        seen: list[Tensor] = []
        hook = joint.after.register_forward_pre_hook(lambda module, args: seen.append(args[0].double()))
        points(model, scene)
        with prune_heads(model, mask):
            points(model, scene)
        hook.remove()
    return float((seen[1] - seen[0]).square().sum())


def test_tuning_finds_projection_and_residual_stream(upstream_model: nn.Module, small_scene: Scene) -> None:
    adapter = resolve_adapter(upstream_model)
    sites = adapter.sites(upstream_model)
    with torch.inference_mode():
        found = joints(
            adapter, upstream_model, sites, lambda images: adapter.predict(upstream_model, images), small_scene.images
        )
    assert len(found) == len(sites) > 0
    for site, joint in zip(sites, found, strict=True):
        block = upstream_model.get_submodule(site.name.rpartition(".")[0])
        assert joint.projection is site.module.proj and joint.block is block and joint.after is block.norm2
        torch.testing.assert_close(joint.gain, block.ls1.gamma.double(), rtol=1e-2, atol=1e-4)


def test_heads_are_pruned_by_every_method(upstream_model: nn.Module, small_scene: Scene) -> None:
    gradients = gate_gradients(upstream_model, [small_scene], eps=EPS)
    sites = resolve_adapter(upstream_model).sites(upstream_model)
    assert gradients.camera.shape == (1, len(sites), sites[0].num_heads)
    assert float(gradients.points.abs().sum()) > 0 and float(gradients.camera.abs().sum()) > 0
    dense = points(upstream_model, small_scene)
    masks: dict[str, Tensor] = {}
    for method in ("michel", "kwon", "kwon-tuned"):
        scenes = [small_scene] if method == "kwon-tuned" else None
        model = upstream_model if method == "kwon-tuned" else None
        mask = masks[method] = pruning_mask(method, gradients, 0.25, 0.5, model=model, scenes=scenes)
        assert int((mask == 0).sum()) == round(0.25 * mask.numel())
        with prune_heads(upstream_model, mask) as pruned:
            changed = points(upstream_model, small_scene)
            report = pruned.report()
        assert bool(changed.isfinite().all()) and not torch.equal(changed, dense)
        assert report.sparsity == pytest.approx(float((mask == 0).double().mean()))
        torch.testing.assert_close(points(upstream_model, small_scene), dense, rtol=0, atol=0)
    plain, tuned = masks["kwon"], masks["kwon-tuned"]
    assert torch.equal(plain == 0, tuned == 0) and not torch.equal(plain, tuned)
    first = int((plain == 0).any(1).nonzero()[0])
    if bool(plain[first].any()):
        assert stream_error(upstream_model, small_scene, tuned, first) < stream_error(
            upstream_model, small_scene, plain, first
        )
