"""What the Triton backend refuses, and with which words."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from hess_plugin_cuda.backends import Problem
from hess_plugin_cuda.triton import support
from hess_plugin_cuda.triton.configurations import forward_configuration, key_configuration, query_configuration

CUDA = torch.device("cuda", 0)
GOOD = Problem(CUDA, torch.bfloat16)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a recent Triton and an H200, as far as the refusal asks."""
    monkeypatch.setattr(support, "missing_triton", lambda: None)
    monkeypatch.setattr(support, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "block_q", "block_k"), [(64, 128, 64), (16, 16, 128), (128, 32, 32)])
def test_takes_what_it_computes(dtype: torch.dtype, width: int, block_q: int, block_k: int) -> None:
    assert support.refusal(Problem(CUDA, dtype, width, block_q, block_k)) is None


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("problem", "says"),
    [
        (Problem(torch.device("cpu"), torch.bfloat16), "it needs an NVIDIA GPU"),
        (Problem(CUDA, torch.float32), "it computes bfloat16 and float16"),
        (Problem(CUDA, torch.bfloat16, 80), "it needs a head width of 16, 32, 64 or 128"),
        (Problem(CUDA, torch.bfloat16, 64, 100, 64), "it needs blocks of 16, 32, 64 or 128 tokens"),
        (Problem(CUDA, torch.bfloat16, 64, 128, 256), "it needs blocks of 16, 32, 64 or 128 tokens"),
    ],
)
def test_refuses_what_it_cannot_compute(problem: Problem, says: str) -> None:
    assert support.refusal(problem) == says


@pytest.mark.usefixtures("hopper")
def test_refuses_old_and_foreign_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert support.refusal(GOOD) == "it needs compute capability 8.0, and cuda:0 has 7.5"
    monkeypatch.setattr(torch.version, "cuda", None)  # a build for AMD, whose devices are called cuda too
    assert support.refusal(GOOD) == "it needs an NVIDIA GPU"


@pytest.mark.usefixtures("hopper")
def test_interpreted_it_computes_float32_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "is_interpreted", lambda: True)
    assert support.refusal(Problem(torch.device("cpu"), torch.float32)) is None
    assert support.refusal(Problem(torch.device("cpu"), torch.float64)) is not None


@pytest.mark.parametrize(("version", "fits"), [("3.5.1", False), ("3.6.0", True), ("3.10.0+git1a2b", True)])
def test_version_of_triton(version: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("triton")
    module.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", module)
    said = support.missing_triton.__wrapped__()
    assert said is None if fits else said == f"it needs Triton 3.6 or later, not {version}"


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "not installed: pip install 'triton>=3.6'" in str(support.missing_triton.__wrapped__())


@pytest.mark.parametrize("choose", [forward_configuration, query_configuration, key_configuration])
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 103, 120, 121])
def test_configurations_fit_the_kernels(choose: object, capability: int) -> None:
    for width in support.WIDTHS:
        for rows in support.BLOCKS:
            for block in support.BLOCKS:
                chosen = choose(capability, width, rows, block)  # type: ignore[operator]
                assert block % chosen.step == 0
                assert chosen.step >= 16  # the least that a matrix product takes
                assert chosen.group == 1 or (chosen.group == 2 and chosen.step == block)
                assert chosen.warps in (1, 2, 4, 8)
