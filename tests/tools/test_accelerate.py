"""accelerate's hooks, which replace forwards as a patch does: before it, after it, and undone in either order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hess_plugin import PatchError, Profile, ProfileError, patch, unpatch
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.interception import is_patched
from hess_plugin.plugins import resolve_adapter
from hess_plugin.scoring import ERROR_NAMES
from hess_plugin.sites import PROJECTIONS

Run = Callable[[nn.Module, Tensor], Tensor]


@pytest.fixture
def hooks() -> Any:
    return pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("unpatch_first", [True, False])
@pytest.mark.parametrize("by_handle", [True, False])
def test_a_hook_on_a_patched_module_and_a_patch_under_a_hook_work_and_are_undone_in_any_order(
    make_model: Callable[..., TinyVGGT],
    outputs: Run,
    images: Callable[..., Tensor],
    small_blocks: dict[str, Any],
    hooks: Any,
    patch_first: bool,
    unpatch_first: bool,
    by_handle: bool,
) -> None:
    class Counts(hooks.ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    model, x, hook = make_model(), images(), Counts()
    attention = [block.attn for block in model.aggregator.global_blocks]
    plain = outputs(model, x)
    with patch(model, **small_blocks):
        wanted = outputs(model, x)
    steps: list[Callable[[], Any]] = []
    handles = []

    def install() -> None:
        handles.append(patch(model, **small_blocks))

    def add() -> None:
        for module in (model, model.aggregator, *attention):
            hooks.add_hook_to_module(module, hook)

    steps = [install, add] if patch_first else [add, install]
    for step in steps:
        step()
    assert torch.equal(outputs(model, x), wanted) and hook.calls == 4
    with pytest.raises(PatchError, match="patched already"):
        patch(model, **small_blocks)

    def undo() -> None:
        if by_handle:
            handles[0].remove()
        else:
            assert unpatch(model) == 2

    def take_off() -> None:
        hooks.remove_hook_from_module(model, recurse=True)

    undone, off = (undo, take_off) if unpatch_first else (take_off, undo)
    undone()
    assert torch.equal(outputs(model, x), plain if unpatch_first else wanted)
    assert hook.calls == (8 if unpatch_first else 4)
    off()
    assert torch.equal(outputs(model, x), plain) and not is_patched(model)
    # What accelerate leaves, the class's own forward on the module, does not keep the next patch away.
    with patch(model, **small_blocks):
        assert torch.equal(outputs(model, x), wanted)
    assert torch.equal(outputs(model, x), plain)


def test_weights_held_elsewhere_between_forwards(
    make_model: Callable[..., TinyVGGT], outputs: Run, images: Callable[..., Tensor], small_blocks: dict[str, Any]
) -> None:
    accelerate = pytest.importorskip("accelerate")
    x, reference = images(), make_model()
    plain = outputs(reference, x)
    with patch(reference, **small_blocks):
        wanted = outputs(reference, x)
    for patch_first in (True, False):
        model = make_model()
        handle = patch(model, **small_blocks) if patch_first else None
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.aggregator.global_blocks[0].attn.qkv.weight.is_meta
        handle = handle or patch(model, **small_blocks)
        assert torch.equal(outputs(model, x), wanted)
        handle.remove()
        assert torch.equal(outputs(model, x), plain)
    sites = resolve_adapter(model).sites(model)
    traces = {f"{e}.{p}": torch.rand(1, 2, 4).double() for e in ERROR_NAMES for p in PROJECTIONS}
    profile = Profile("vggt", tuple(site.name for site in sites), 4, ("one",), traces, 0.5, "0" * 16)
    with pytest.raises(ProfileError, match=r"attn are on the meta device and cannot be compared.*strict=False"):
        patch(model, profile=profile, **small_blocks)
    with patch(model, profile=profile, strict=False, **small_blocks):
        assert not torch.equal(outputs(model, x), plain)


def test_a_model_dispatched_over_devices_and_disk(
    make_model: Callable[..., TinyVGGT],
    outputs: Run,
    images: Callable[..., Tensor],
    small_blocks: dict[str, Any],
    tmp_path: Path,
) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, x = make_model(), images()
    with patch(model, **small_blocks):
        wanted = outputs(model, x)
    places = {"aggregator": "cpu", "aggregator.global_blocks.0.attn": "disk", "camera_head": "cpu"}
    places |= {"point_head": "cpu", "depth_head": "cpu"}
    with patch(model, **small_blocks):
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
        assert torch.equal(outputs(model, x), wanted)


def test_a_prepared_model_with_mixed_precision(
    make_model: Callable[..., TinyVGGT], outputs: Run, images: Callable[..., Tensor], small_blocks: dict[str, Any]
) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, x = make_model(), images(2)
    with torch.autocast("cpu", torch.bfloat16):
        plain = outputs(model, x)
    found = []
    for patch_first in (True, False):
        model = make_model()
        handle = patch(model, **small_blocks) if patch_first else None
        prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
        handle = handle or patch(prepared, **small_blocks)
        found.append(outputs(prepared, x))
        assert handle.report().sparsity == pytest.approx(0.5, abs=0.02)
        handle.remove()
        assert torch.equal(outputs(prepared, x), plain.float())
    assert torch.equal(*found) and not torch.equal(found[0], plain.float())
