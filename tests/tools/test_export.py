"""Tracing and exporting patched models: refused, and nothing of the attempt stays behind."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hess_plugin import PatchError, patch
from hess_plugin.demo.model import TinyVGGT

Run = Callable[[nn.Module, Tensor], Tensor]


class Depth(nn.Module):
    """A model that answers with one tensor, which is what a tracer can follow."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)["depth"]


def _trace(model: nn.Module, images: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of itself
        return torch.jit.trace(Depth(model), images, check_trace=False)


def _export(model: nn.Module, images: Tensor) -> Any:
    return torch.export.export(Depth(model), (images,), strict=False)


@pytest.mark.parametrize("attempt", [_trace, _export])
def test_a_trace_and_an_export_are_refused_and_leave_the_patch_as_it_was(
    make_model: Callable[..., TinyVGGT],
    outputs: Run,
    images: Callable[..., Tensor],
    small_blocks: dict[str, Any],
    attempt: Callable[[nn.Module, Tensor], Any],
) -> None:
    model, x = make_model(depth=1), images(2)
    plain = outputs(model, x)
    with patch(model, **small_blocks):
        wanted = outputs(model, x)
    with patch(model, **small_blocks) as handle:  # a new one, which has planned nothing yet
        with pytest.raises(
            PatchError, match=r"a trace or an export would freeze; call remove\(\) on the model's patch"
        ):
            attempt(model, x)
        assert torch.equal(outputs(model, x), wanted)
    assert handle.report().sites[0].calls == 1
    with patch(model, unfit="dense", **small_blocks) as lenient:
        attempt(model, x)  # as the unpatched model
        assert torch.equal(outputs(model, x), wanted)
    assert lenient.report().sites[0].unfit_calls >= 1 and lenient.report().sites[0].calls == 1
    attempt(model, x)
    assert torch.equal(outputs(model, x), plain)


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_where_there_are_no_values_the_shapes_come_out_and_nothing_is_counted_or_kept(
    make_model: Callable[..., TinyVGGT],
    outputs: Run,
    images: Callable[..., Tensor],
    small_blocks: dict[str, Any],
    kind: str,
) -> None:
    model, x = make_model(depth=1), images(2)
    with patch(model, **small_blocks):
        patched = outputs(model, x)
    handle = patch(model, **small_blocks)
    if kind == "meta":
        shapes = {name: value.to("meta") for name, value in model.state_dict().items()}
        found = torch.func.functional_call(model, shapes, (x.to("meta"),))["depth"]
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            found = model(torch.empty(x.shape))["depth"]
    assert handle.report().sites[0].calls == 0
    assert torch.equal(outputs(model, x), patched)
    assert found.shape == model(x)["depth"].shape and handle.report().sites[0].calls == 2
