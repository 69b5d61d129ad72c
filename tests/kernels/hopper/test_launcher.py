"""The launcher: strides, scales, heads, refusals, errors in words, what is loaded once, threads, and its cost."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hess_plugin_cuda.sm90.driver as cuda
from hess_plugin_cuda import BlockLists, token_mask
from hess_plugin_cuda.backends import Problem
from hess_plugin_cuda.sm90 import launch

Case = tuple[Tensor, Tensor, Tensor, BlockLists]
HOPPER = Problem(torch.device("cuda:0"), torch.bfloat16)


@pytest.fixture
def case(make_case: Callable[..., Case]) -> Case:
    return make_case((140, 200), (3, 5), torch.bfloat16, batch=2, heads=2)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in other places."""
    batch, heads, tokens, width = x.shape
    packed = torch.zeros(batch, tokens, 3, heads, width, dtype=x.dtype)
    packed[:, :, 1] = x.transpose(1, 2)
    shifted = torch.zeros(x.numel() + 1, dtype=x.dtype)
    shifted[1:] = x.flatten()
    odd = torch.zeros(batch, heads, tokens, width + 1, dtype=x.dtype)
    odd[..., :width] = x
    return {
        "token-major": x.transpose(1, 2).contiguous().transpose(1, 2),
        "packed": packed[:, :, 1].transpose(1, 2),
        "off by one": shifted[1:].view(x.shape),
        "odd rows": odd[..., :width],
        "transposed": x.mT.contiguous().mT,
    }


@pytest.mark.parametrize("layout", ["token-major", "packed", "off by one", "odd rows", "transposed"])
def test_any_strides_give_the_same_bits(gpu: Any, case: Case, layout: str) -> None:
    q, k, v, lists = case
    plain, plain_lse = gpu.attend(*case)
    moved = [layouts(x)[layout] for x in (q, k, v)]
    out, lse = gpu.attend(*moved, lists)
    assert torch.equal(out, plain) and torch.equal(lse, plain_lse)
    if layout != "transposed":  # whose rows the kernel could not write
        assert out.stride() == torch.empty_like(moved[0]).stride()


def test_only_what_cannot_be_described_is_copied() -> None:
    x = torch.randn(2, 2, 9, 64).bfloat16()
    given = {name: launch.loadable(y) for name, y in layouts(x).items()}
    assert given == {"token-major": True, "packed": True, "off by one": False, "odd rows": False, "transposed": False}
    assert launch.loadable(x) and launch.loadable(x[:1]) and launch.loadable(x[:, :, :1])
    assert not launch.loadable(x[:, :1].expand(2, 2, 9, 64)), "a stride of zero"


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.2])
def test_any_scale(gpu: Any, case: Case, scale: float) -> None:
    q, k, v, lists = case
    out, lse = gpu.attend(q, k, v, lists, scale)
    scores = scale * (q.double() @ k.double().mT)
    scores = scores.masked_fill(~token_mask(lists, q.shape[2], k.shape[2]), -torch.inf)
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ v.double(), atol=0.02, rtol=0.02)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-5, rtol=1e-5)


def test_only_some_heads(gpu: Any, make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case((140, 200), (3, 5), torch.float16, batch=2, heads=3)
    out, lse = gpu.attend(*case)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, 7.0))
    monkeypatch.setattr(torch, "empty", lambda *args, **more: empty(*args, **more).fill_(7.0))
    some, some_lse = gpu.attend(*case, heads=(2, 0))
    for head in (0, 2):
        assert torch.equal(some[:, head], out[:, head]) and torch.equal(some_lse[:, head], lse[:, head])
    assert (some[:, 1] == 7).all() and (some_lse[:, 1] == 7).all()


def test_a_kernel_is_loaded_once_for_all_threads(gpu: Any, case: Case) -> None:
    gpu.attend(*case)  # alone: the emulated machine runs one launch at a time
    wanted, _ = gpu.attend(*case)
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(gpu.attend(*case)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(out, wanted) for out in results)
    assert gpu.library.emulator_calls(b"cuModuleLoadData") == 1
    assert gpu.library.emulator_calls(b"cuLaunchKernel") == 6
    assert gpu.library.emulator_calls(b"cuDevicePrimaryCtxRetain") == 1
    assert gpu.library.emulator_pushed() == 0, "a context was left current"


def test_the_launch_is_as_the_kernel_wants_it(gpu: Any, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "current_stream", lambda device: 4711)
    gpu.library.emulator_launch.restype = ctypes.c_char_p
    gpu.attend(*case, multiprocessors=132)
    items = 2 * 2 * (2 + 1)  # two query blocks and one tile of special queries
    assert gpu.library.emulator_launch() == f"block_sparse_bf16 {items} x 384, stream 4711".encode()


@pytest.mark.parametrize("name", ["cuModuleLoadData", "cuFuncSetAttribute", "cuTensorMapEncodeTiled", "cuLaunchKernel"])
def test_errors_name_the_function_and_the_reason(gpu: Any, case: Case, name: str) -> None:
    gpu.library.emulator_fail(name.encode(), 2)
    with pytest.raises(cuda.DriverError, match=rf"^{name} failed: out of memory \(CUDA error 2\)\.$"):
        launch.forward(*case, 0.125)
    gpu.library.emulator_fail(name.encode(), 0)
    gpu.attend(*case)  # nothing broken was kept


def test_an_error_without_words(gpu: Any) -> None:
    with pytest.raises(cuda.DriverError, match=r"an error that this driver has no words for \(CUDA error 101\)"):
        cuda.device(5)


def test_hopper_is_taken(gpu: Any) -> None:
    assert launch.refusal(HOPPER) is None


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (Problem(torch.device("cpu"), torch.bfloat16), "a CUDA device"),
        (Problem(HOPPER.device, torch.float32), "bfloat16 and float16"),
        (Problem(HOPPER.device, torch.float16, head_dim=128), "width 64"),
        (Problem(HOPPER.device, torch.float16, block_q=64), "128 x 64"),
        (Problem(HOPPER.device, torch.float16, block_k=128), "128 x 64"),
    ],
)
def test_refuses_other_problems(gpu: Any, problem: Problem, words: str) -> None:
    assert words in str(launch.refusal(problem))


def test_refuses_other_devices(gpu: Any) -> None:
    gpu.library.emulator_attribute(75, 10)
    assert "compute capability 9.0" in str(launch.refusal(HOPPER)) and "10.0" in str(launch.refusal(HOPPER))


def test_refuses_an_old_driver(gpu: Any) -> None:
    gpu.library.emulator_driver_version(11080)
    assert launch.refusal(HOPPER) == "its kernel needs a driver for CUDA 12, this one is for CUDA 11"


def test_refuses_without_a_driver(
    emulate: Callable[[Path], Any], shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(shipped)
    monkeypatch.setattr(cuda, "LIBRARY", "libcuda-that-is-not-there.so.1")
    assert "libcuda-that-is-not-there.so.1" in str(launch.refusal(HOPPER))


def test_refuses_without_the_compiled_kernel(gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch, "COMPILED", tmp_path / "block_sparse_sm90.cubin")
    assert launch.refusal(HOPPER) == "block_sparse_sm90.cubin is not part of this installation"


def test_a_launch_costs_little(gpu: Any, make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """The part that is this package's: tensor maps, arguments, contexts. Measured: 40 to 55 us on a busy core."""
    q, k, v, lists = make_case((128, 128), (0, 0), torch.bfloat16)
    arguments = launch._Arguments(work=1, heads=1, query_blocks=1, queries=128, patch_queries=128, keys=128)
    gpu.attend(q, k, v, lists)
    monkeypatch.setattr(cuda.Kernel, "launch", lambda *given: None)
    best = float("inf")
    for _ in range(20):
        begin = time.perf_counter()
        for _ in range(50):
            launch._launch(q, k, v, arguments)
        best = min(best, (time.perf_counter() - begin) / 50)
    assert best < 300e-6
