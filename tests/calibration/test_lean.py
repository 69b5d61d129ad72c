"""Measuring in little memory: the same traces, much less alive, everything given back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from hess_plugin import AdapterError, CalibrationError, Family, Scene
from hess_plugin.calibration.lean import lean
from hess_plugin.calibration.live_memory import LiveMemory
from hess_plugin.calibration.measuring import Protocol, measuring
from hess_plugin.demo.model import TinyVGGT, load_demo_model
from hess_plugin.demo.rooms import make_scene
from hess_plugin.plugins import resolve_adapter

LEAN_TOLERANCE = 1e-4  # relative, float32


def traces_of(model: nn.Module, scene: Scene, memory: str) -> dict[str, Tensor]:
    adapter = resolve_adapter(model)
    with measuring(adapter, model, adapter.sites(model), Protocol(eps=1e6, memory=memory)) as measurer:
        return measurer.measure(scene).traces


def state_of(model: nn.Module) -> list[object]:
    return [(name, type(module), sorted(vars(module)), list(module._modules)) for name, module in model.named_modules()]


@pytest.fixture(scope="module")
def demo() -> TinyVGGT:
    return load_demo_model()


@pytest.mark.parametrize("views", [2, 3, 7])
def test_traces_of_the_demo_model_equal_those_of_the_whole_graph(demo: TinyVGGT, views: int) -> None:
    scene = make_scene(41, views)
    plain, little = (traces_of(demo, scene, memory) for memory in ("plain", "lean"))
    assert plain.keys() == little.keys() and len(plain) == 12
    for name, trace in plain.items():
        assert bool((trace > 0).all())
        torch.testing.assert_close(little[name], trace, rtol=LEAN_TOLERANCE, atol=0.0)


def test_much_less_is_alive_at_once(demo: TinyVGGT) -> None:
    scene, peaks = make_scene(41, 12), {}
    for memory in ("plain", "lean"):
        with LiveMemory([*demo.parameters(), *demo.buffers()]) as live:
            traces_of(demo, scene, memory)
        peaks[memory] = live.peak
    assert peaks["lean"] < 0.55 * peaks["plain"]


def test_everything_is_given_back_also_after_an_exception(tiny_model: TinyVGGT) -> None:
    adapter = resolve_adapter(tiny_model)
    family, sites = adapter.family(tiny_model), adapter.sites(tiny_model)
    before, head = state_of(tiny_model), tiny_model.depth_head
    with contextlib.suppress(ZeroDivisionError), lean(tiny_model, family, sites, 3):
        assert tiny_model.depth_head is None
        assert "forward" in vars(tiny_model.aggregator.frame_blocks[0])
        assert "forward" in vars(tiny_model.point_head)
        raise ZeroDivisionError
    assert state_of(tiny_model) == before and tiny_model.depth_head is head


def test_a_forward_that_another_tool_put_on_a_module_is_run_and_kept(tiny_model: TinyVGGT, room: Scene) -> None:
    block, calls = tiny_model.aggregator.global_blocks[0], 0
    own = type(block).forward

    def counted(*args: Tensor, **kwargs: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return own(block, *args, **kwargs)

    block.forward = counted  # type: ignore[method-assign]
    plain, little = (traces_of(tiny_model, room, memory) for memory in ("plain", "lean"))
    assert block.forward is counted and calls == 1 + 1 + 2  # lean: recomputed once for each of two errors
    torch.testing.assert_close(little["points.q"], plain["points.q"], rtol=LEAN_TOLERANCE, atol=0.0)


def test_without_gradient_nothing_is_cut_into_pieces(tiny_model: TinyVGGT, room: Scene) -> None:
    adapter = resolve_adapter(tiny_model)
    whole = adapter.predict(tiny_model, room.images)
    with torch.no_grad(), lean(tiny_model, adapter.family(tiny_model), adapter.sites(tiny_model), room.views):
        assert torch.equal(adapter.predict(tiny_model, room.images).points, whole.points)


def test_the_parents_of_the_sites_are_the_blocks_where_none_are_named(tiny_model: TinyVGGT) -> None:
    sites = resolve_adapter(tiny_model).sites(tiny_model)
    with lean(tiny_model, Family(), sites, 3):
        wrapped = [name for name, module in tiny_model.named_modules() if "forward" in vars(module)]
    assert wrapped == ["aggregator.global_blocks.0", "aggregator.global_blocks.1"]


@pytest.mark.parametrize("field", ["blocks", "frame_heads", "unused_heads"])
def test_a_name_that_the_model_does_not_have_is_told(tiny_model: TinyVGGT, field: str) -> None:
    adapter = resolve_adapter(tiny_model)
    family = replace(adapter.family(tiny_model), **{field: ("nowhere.to_be",)})
    before = state_of(tiny_model)
    with pytest.raises(AdapterError, match=r"names 'nowhere\.to_be', which TinyVGGT does not have"):
        lean(tiny_model, family, adapter.sites(tiny_model), 3).__enter__()
    assert state_of(tiny_model) == before


@pytest.mark.parametrize("memory", ["", "frugal"])
def test_unknown_ways_are_refused(memory: str) -> None:
    with pytest.raises(CalibrationError, match="wanted one of lean, plain"):
        Protocol(memory=memory)


@pytest.fixture
def running_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def run_out(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("hess_plugin.calibration.measuring.head_traces", run_out)
    yield


def test_running_out_of_memory_ends_in_a_sentence_and_skips_no_scene(
    running_out: None, tiny_model: TinyVGGT, room: Scene
) -> None:
    from hess_plugin import HessError, calibrate

    with pytest.raises(HessError, match=r"Scene .* \(4 views of 60 x 60\) does not fit .* fewer views") as raised:
        calibrate(tiny_model, [room], eps=1e6)
    assert not isinstance(raised.value, CalibrationError)


def test_a_head_that_is_not_given_frames_is_told(tiny_model: TinyVGGT, room: Scene) -> None:
    adapter = resolve_adapter(tiny_model)
    family = replace(adapter.family(tiny_model), frame_heads=("aggregator.patch_embed",))
    refused = pytest.raises(AdapterError, match=r"aggregator\.patch_embed .* without a tensor \[B, 4, \.\.\.\]")
    with lean(tiny_model, family, adapter.sites(tiny_model), room.views), refused:
        adapter.predict(tiny_model, room.images)


@pytest.mark.parametrize("inside", [None, torch.bfloat16])
def test_a_callers_autocast_stays_outside(demo: TinyVGGT, room: Scene, inside: torch.dtype | None) -> None:
    adapter, protocol = resolve_adapter(demo), Protocol(eps=1e6, autocast=inside)
    with measuring(adapter, demo, adapter.sites(demo), protocol) as measurer:
        wanted = measurer.measure(room).traces
        with torch.autocast("cpu", torch.bfloat16):
            found = measurer.measure(room).traces
    assert all(torch.equal(found[name], trace) for name, trace in wanted.items())
