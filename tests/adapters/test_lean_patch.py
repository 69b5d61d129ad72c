"""`patch(..., memory="lean")` on upstream code: the same outputs, less alive, only what is never read left out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hess_plugin import patch, unpatch
from hess_plugin.calibration.live_memory import LiveMemory
from hess_plugin.plugins import resolve_adapter

BLOCKS: dict[str, Any] = {"block_q": 8, "block_k": 8}
SHORT = 4000  # numbers in a chunk: a frame or two


def images_of(views: int, batch: int = 1) -> Tensor:
    return torch.rand(batch, views, 3, 56, 70, generator=torch.Generator().manual_seed(0))


def run(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)  # Pi3X draws which conditions it uses
    with torch.no_grad():
        predicted = model(images)
    return {name: value.clone() for name, value in predicted.items() if isinstance(value, Tensor)}


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        scale = float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance * scale, msg=name)


def peak(model: nn.Module, images: Tensor) -> int:
    run(model, images)
    with LiveMemory([*model.parameters(), *model.buffers(), images]) as memory, torch.no_grad():
        model(images)
    return memory.peak


@pytest.fixture
def reads_last(upstream_model: nn.Module) -> nn.Module:
    """The same model; in VGGT the dense heads read the last layer alone, and not all that there are."""
    for head in (getattr(upstream_model, name, None) for name in ("point_head", "depth_head")):
        if hasattr(head, "intermediate_layer_idx"):
            head.intermediate_layer_idx = [1] * 4
    return upstream_model


@pytest.mark.parametrize(("views", "batch"), [(5, 1), (3, 2), (10, 2)])
def test_dense_outputs_are_those_of_the_unpatched_model(
    reads_last: nn.Module, monkeypatch: pytest.MonkeyPatch, views: int, batch: int
) -> None:
    images = images_of(views, batch)
    # Beyond eight frames the VGGT of 2025 cannot cut a batch itself; in chunks it can.
    alone = views * batch > 16 and hasattr(reads_last, "aggregator")
    plain = None if alone else run(reads_last, images)
    if plain is None:
        parts = [run(reads_last, item[None]) for item in images]
        plain = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    with patch(reads_last, sparsity=0.0, memory="lean"):
        if not alone:
            assert all(torch.equal(value, plain[name]) for name, value in run(reads_last, images).items())  # one chunk
        monkeypatch.setattr("hess_plugin.memory.chunks.CHUNK", SHORT)
        close(run(reads_last, images), plain)


def test_sparse_outputs_are_those_of_a_plain_patch(reads_last: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    images = images_of(4, 2)
    with patch(reads_last, sparsity=0.5, **BLOCKS):
        plain = run(reads_last, images)
    monkeypatch.setattr("hess_plugin.attention.GROUP", 1)
    with patch(reads_last, sparsity=0.5, **BLOCKS, memory="lean") as handle:
        assert all(torch.equal(value, plain[name]) for name, value in run(reads_last, images).items())
        monkeypatch.setattr("hess_plugin.memory.chunks.CHUNK", SHORT)
        close(run(reads_last, images), plain, 5e-3)
    assert handle.report().sparsity == pytest.approx(0.5, abs=0.02)


def test_less_is_alive_at_once(reads_last: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hess_plugin.attention.GROUP", 1)
    monkeypatch.setattr("hess_plugin.memory.chunks.CHUNK", SHORT)
    images, peaks = images_of(8), {}
    for memory in ("plain", "lean"):
        with patch(reads_last, sparsity=0.5, **BLOCKS, memory=memory):
            peaks[memory] = peak(reads_last, images)
    # Pi3 keeps all frames' points in several copies at the end of its own forward, where nothing can be cut.
    assert peaks["lean"] < (0.7 if "aggregator" in dict(reads_last.named_children()) else 0.95) * peaks["plain"]


def test_nothing_is_left_behind(reads_last: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hess_plugin.memory.chunks.CHUNK", SHORT)
    images = images_of(3)
    plain = run(reads_last, images)
    before = [(name, set(vars(m)), len(m._forward_hooks)) for name, m in reads_last.named_modules()]
    with patch(reads_last, sparsity=0.5, **BLOCKS, memory="lean"):
        sparse = run(reads_last, images)
        twin = copy.deepcopy(reads_last)
    assert [(name, set(vars(m)), len(m._forward_hooks)) for name, m in reads_last.named_modules()] == before
    assert all(torch.equal(value, plain[name]) for name, value in run(reads_last, images).items())
    assert all(torch.equal(value, sparse[name]) for name, value in run(twin, images).items())
    assert unpatch(twin) == len(resolve_adapter(twin).sites(twin))
    assert all(torch.equal(value, plain[name]) for name, value in run(twin, images).items())


def test_layers_of_vggt(reads_last: nn.Module, small_upstream: tuple[str, str]) -> None:
    """The code of 2025 makes every layer; inside the model those that no head reads are left out, as upstream now does.

    The aggregator called alone gives what it always gives.
    """
    if small_upstream[0] != "vggt":
        pytest.skip("only VGGT joins layers")
    keeps_some = hasattr(reads_last.aggregator, "cached_layer_indices")
    seen: list[list[Any]] = []
    hook = reads_last.aggregator.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with torch.no_grad(), patch(reads_last, sparsity=0.0, memory="lean") as handle:
        reads_last(images_of(2))
        reads_last.aggregator(images_of(2))
    hook.remove()
    layers = handle.measures[-1]
    assert layers.startswith("of 2 layers of aggregator") is not keeps_some
    inside, alone = seen
    assert [tokens is None for tokens in inside] == [not keeps_some, False]
    assert all(isinstance(tokens, Tensor) for tokens in alone)
