"""The estimate: counted on tensors without values, equal to what a real run keeps alive."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from hess_plugin import CalibrationError
from hess_plugin.calibration.estimate import describe, estimate
from hess_plugin.calibration.live_memory import LiveMemory
from hess_plugin.calibration.measuring import Protocol, measuring
from hess_plugin.calibration.rehearsal import rehearse
from hess_plugin.demo.model import TinyVGGT, load_demo_model
from hess_plugin.demo.rooms import make_scene
from hess_plugin.plugins import resolve_adapter


def tensors_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("memory", ["plain", "lean"])
@pytest.mark.parametrize("views", [3, 9])
def test_the_estimate_is_what_a_real_run_keeps_alive(memory: str, views: int) -> None:
    model = load_demo_model()
    adapter, protocol, scene = resolve_adapter(model), Protocol(memory=memory), make_scene(43, views)
    found = estimate(adapter, model, views, 60, 60, protocol)
    sites, real = adapter.sites(model), LiveMemory(tensors_of(model))
    with measuring(adapter, model, sites, protocol) as measurer, real:
        measurer.measure(scene)
    # The errors themselves (alignment, neighbours) are not rehearsed; the model's graph is all but a few per cent.
    assert found.activations == pytest.approx(real.peak, rel=0.05)
    assert found.flops == pytest.approx(real.flops, rel=0.01)
    assert found.weights == sum(t.numel() * t.element_size() for t in tensors_of(model))
    assert found.seconds is not None and found.seconds > 0


def test_estimating_leaves_the_model_alone(tiny_model: TinyVGGT) -> None:
    before = [(t.data_ptr(), t._version, t.requires_grad) for t in tensors_of(tiny_model)]
    estimate(resolve_adapter(tiny_model), tiny_model, 3, 60, 60, Protocol(), timed=False)
    assert [(t.data_ptr(), t._version, t.requires_grad) for t in tensors_of(tiny_model)] == before
    assert not any(isinstance(t, FakeTensor) for t in tensors_of(tiny_model))


def test_a_size_that_no_machine_holds_is_estimated_all_the_same(tiny_model: TinyVGGT) -> None:
    found = estimate(resolve_adapter(tiny_model), tiny_model, 4000, 600, 600, Protocol(memory="plain"), timed=False)
    assert found.total > 1e11 and found.seconds is None


def test_a_model_that_depends_on_values_is_told(tiny_model: TinyVGGT, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tiny_model.aggregator.patch_embed.forward
    monkeypatch.setattr(
        tiny_model.aggregator.patch_embed, "forward", lambda images: original(images[images.mean((1, 2, 3)) >= 0])
    )
    with pytest.raises(CalibrationError, match="TinyVGGT cannot be run without values"):
        estimate(resolve_adapter(tiny_model), tiny_model, 3, 60, 60, Protocol())


def test_counting_bytes_and_operations() -> None:
    before = torch.zeros(1000)
    with LiveMemory([before]) as live:
        view = before[:10]
        first = torch.zeros(256)
        assert live.live == 1024 and view.numel() == 10
        second = first.reshape(16, 16) @ first.reshape(16, 16)
        assert (live.live, live.flops) == (2048, 2 * 16**3)
        del first
        assert live.live == 1024
        third = second + 1
        del second
        assert live.live == 1024 and live.peak == 2048 and third.numel() == 256


def test_attention_on_a_cpu_is_counted_forward_and_backward() -> None:
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (32, 48, 48))
    with LiveMemory() as live:
        output = nn.functional.scaled_dot_product_attention(q, k, v)
        forward = live.flops
        output.sum().backward()
    product = 2 * 2 * 32 * 48 * 8
    assert forward == 2 * product and live.flops == 7 * product


def test_the_rehearsal_says_what_it_takes_and_what_is_too_much(
    tiny_model: TinyVGGT, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = [make_scene(seed, 3) for seed in (1, 2)]
    text = rehearse(tiny_model, scenes, Protocol())
    assert "2 scenes like room-1: 3 views of 60 x 60 px; memory lean, autocast none" in text
    assert "without --memory lean: " in text and "NOT ENOUGH" not in text
    monkeypatch.setattr("hess_plugin.calibration.rehearsal._available", lambda device: 1000)
    assert "available: 0 MB: NOT ENOUGH; use fewer --views" in rehearse(tiny_model, scenes, Protocol())
    plain = rehearse(tiny_model, scenes, replace(Protocol(), memory="plain"))
    assert "without" not in plain and "memory plain" in plain
    shared = rehearse(tiny_model, scenes * 2, Protocol(), processes=3)
    assert "in all with 3 processes" in shared


@pytest.mark.parametrize("size, text", [(0, "0 MB"), (23_400_000, "23 MB"), (13_360_000_000, "13.4 GB")])
def test_sizes_are_written_in_words(size: int, text: str) -> None:
    assert describe(size) == text


def test_dry_run_writes_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from hess_plugin.cli import main
    from hess_plugin.scenes.writing import write_folder

    monkeypatch.chdir(tmp_path)
    write_folder(make_scene(3, 3), tmp_path / "scenes" / "a")
    arguments = ["calibrate", "--model", "demo", "--data", f"folder:{tmp_path}/scenes"]
    result = CliRunner().invoke(main, [*arguments, "--dry-run", "-o", "x.hess"])
    assert result.exit_code == 0 and "memory: " in result.output and "time: about" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and "Missing option '-o'" in result.output and "--dry-run" in result.output
