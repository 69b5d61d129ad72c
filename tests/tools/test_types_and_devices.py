"""Models that change their number type or their device after they were patched; precision switched on and off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hess_plugin import patch
from hess_plugin.demo.model import TinyVGGT

Run = Callable[[nn.Module, Tensor], Tensor]


def attend_in(model: TinyVGGT, dtype: torch.dtype) -> TinyVGGT:
    """Change the type of the global attention; what is around it stays float32, which this model needs."""
    for block in model.aggregator.global_blocks:
        block.attn.to(dtype)
        block.attn.register_forward_pre_hook(lambda module, args: (args[0].to(dtype),))
        block.attn.register_forward_hook(lambda module, args, output: output.float())
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_change_of_type_after_the_patch_is_as_good_as_one_before(
    make_model: Callable[..., TinyVGGT],
    outputs: Run,
    images: Callable[..., Tensor],
    small_blocks: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    x = images(2)
    before = attend_in(make_model(), dtype)
    plain = outputs(before, x)
    patch(before, **small_blocks)
    wanted = outputs(before, x)
    model = make_model()
    handle = patch(model, **small_blocks)
    single = outputs(model, x)
    attend_in(model, dtype)
    assert torch.equal(outputs(model, x), wanted) and not torch.equal(wanted, single)
    torch.testing.assert_close(wanted, single, rtol=0.05, atol=0.05)
    assert handle.report().sparsity == pytest.approx(0.5, abs=0.02)
    handle.remove()
    assert torch.equal(outputs(model, x), plain)


def test_half_and_its_kind_change_a_patched_model_as_any_other(
    make_model: Callable[..., TinyVGGT], outputs: Run, images: Callable[..., Tensor], small_blocks: dict[str, Any]
) -> None:
    rounded, x = make_model().half().float(), images(2)
    patch(rounded, **small_blocks)
    model = make_model()
    handle = patch(model, **small_blocks)
    full = outputs(model, x)
    for change in (model.half, model.double, model.bfloat16, model.float):
        change()
        assert {p.dtype for p in model.parameters()} == {next(model.parameters()).dtype}
    assert not torch.equal(outputs(model, x), full)
    model.load_state_dict(rounded.state_dict())
    assert torch.equal(outputs(model, x), outputs(rounded, x))
    assert {site.calls for site in handle.report().sites} == {3}


def test_a_model_goes_to_another_device_and_comes_back(
    make_model: Callable[..., TinyVGGT], outputs: Run, images: Callable[..., Tensor], small_blocks: dict[str, Any]
) -> None:
    device = "cuda" if torch.cuda.is_available() else "meta"  # the one other device that every machine has
    model, x = make_model(), images()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    handle = patch(model, **small_blocks)
    wanted = outputs(model, x)
    there = outputs(model.to(device), x.to(device))
    assert there.device.type == device and there.shape == wanted.shape
    if device == "cuda":
        torch.testing.assert_close(there.cpu(), wanted, rtol=1e-2, atol=1e-3)
        model.to("cpu")
    else:
        model.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(outputs(model, x), wanted)
    assert {site.calls for site in handle.report().sites} == {3 if device == "cuda" else 2}


def test_a_model_built_without_memory_is_patched_and_then_loaded(
    make_model: Callable[..., TinyVGGT], outputs: Run, images: Callable[..., Tensor], small_blocks: dict[str, Any]
) -> None:
    loaded, x = make_model(), images()
    with patch(loaded, **small_blocks):
        wanted = outputs(loaded, x)
    with torch.device("meta"):
        empty = TinyVGGT(loaded.config).eval()
    with patch(empty, **small_blocks):
        empty.load_state_dict(loaded.state_dict(), assign=True)
        assert torch.equal(outputs(empty, x), wanted)


def test_autocast_alternates_with_full_precision(
    make_model: Callable[..., TinyVGGT], outputs: Run, images: Callable[..., Tensor], small_blocks: dict[str, Any]
) -> None:
    model, x = make_model(), images(2)

    def low() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return outputs(model, x)

    with patch(model, **small_blocks):
        wanted_low = low()
    with patch(model, **small_blocks):
        wanted = outputs(model, x)
        for _ in range(2):
            assert torch.equal(low(), wanted_low) and torch.equal(outputs(model, x), wanted)
    assert not torch.equal(wanted, wanted_low)


@pytest.mark.parametrize("options", [{}, {"allocation": "equal"}, {"sparsity": None, "cdf_threshold": 0.5}])
def test_inference_mode_training_and_inference_mode_again(
    make_model: Callable[..., TinyVGGT],
    outputs: Run,
    images: Callable[..., Tensor],
    small_blocks: dict[str, Any],
    options: dict[str, Any],
) -> None:
    model, x = make_model(), images(2)
    patch(model, **{**small_blocks, **options})
    with torch.inference_mode():
        first = outputs(model, x)
    model(x)["depth"].sum().backward()
    gradient = model.aggregator.global_blocks[0].attn.qkv.weight.grad
    assert gradient is not None and gradient.abs().max() > 0
    with torch.inference_mode():
        assert torch.equal(outputs(model, x), first)
