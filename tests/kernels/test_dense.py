"""Dense attention takes the kernel that is best in its place, whatever the caller has pinned."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hess_plugin_cuda import dense

CUDA = torch.device("cuda", 0)
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def fresh_orders() -> Iterator[None]:
    dense._order.cache_clear()
    yield
    dense._order.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cudnn: int | None = 91900) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU, and knows under which settings it was attended to."""

    device = CUDA  # type: ignore[assignment]
    chosen: int
    seen: list[list[SDPBackend]]

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is torch._fused_sdp_choice:
            return cls.chosen
        if function is F.scaled_dot_product_attention:
            cls.seen.append(torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True))
        return super().__torch_function__(function, types, args, kwargs or {})


def on_gpu(chosen: SDPBackend) -> OnGPU:
    OnGPU.chosen, OnGPU.seen = int(chosen), []
    return torch.randn(1, 2, 6, 8, dtype=HALF).as_subclass(OnGPU)


class _Without:
    """torch, but for one name."""

    def __getattr__(self, name: str) -> object:
        if name == "_fused_sdp_choice":
            raise AttributeError(name)
        return getattr(torch, name)


@pytest.mark.parametrize(
    ("capability", "cudnn", "dtype", "width", "first"),
    [
        ((9, 0), 91900, torch.bfloat16, 64, "CUDNN"),
        ((10, 0), 91501, torch.float16, 128, "CUDNN"),
        ((10, 3), 92000, torch.float16, 64, "CUDNN"),
        ((9, 0), 91500, torch.bfloat16, 64, "FLASH"),
        ((9, 0), None, torch.bfloat16, 64, "FLASH"),
        ((9, 0), 91900, torch.float32, 64, "FLASH"),
        ((9, 0), 91900, torch.bfloat16, 256, "FLASH"),
        ((8, 0), 91900, torch.bfloat16, 64, "FLASH"),
        ((8, 9), 91900, torch.bfloat16, 64, "FLASH"),
        ((12, 0), 91900, torch.bfloat16, 64, "FLASH"),
    ],
)
def test_cudnn_comes_first_where_it_is_best(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    cudnn: int | None,
    dtype: torch.dtype,
    width: int,
    first: str,
) -> None:
    pretend(monkeypatch, capability, cudnn)
    order = dense._order(CUDA, dtype, width)
    assert order[0].name.startswith(first)
    assert len(set(order)) == 4  # whatever the first refuses, another computes


def test_on_a_cpu_it_is_torchs_own() -> None:
    q, k, v = torch.randn(3, 2, 3, 9, 8, requires_grad=True)
    out = dense.dense_attention(q, k, v, 0.3)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, scale=0.3))
    out.sum().backward()


def test_settings_are_left_alone_where_torch_chooses_the_best_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))
    monkeypatch.setattr(dense, "sdpa_kernel", lambda *a, **k: pytest.fail("settings were touched"))
    q = on_gpu(SDPBackend.CUDNN_ATTENTION)
    dense.dense_attention(q, q, q, 0.5)
    assert len(OnGPU.seen) == 1


def test_what_the_caller_pinned_is_overruled_and_then_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True):
        before = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
        q = on_gpu(SDPBackend.FLASH_ATTENTION)
        out = dense.dense_attention(q, q, q, 0.5)
        assert torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True) == before
    assert OnGPU.seen == [list(dense._CUDNN_FIRST)]
    plain = q.as_subclass(torch.Tensor)
    assert torch.equal(out.as_subclass(torch.Tensor), F.scaled_dot_product_attention(plain, plain, plain, scale=0.5))


def test_threads_leave_the_settings_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))
    before = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
    q, barrier = on_gpu(SDPBackend.MATH), threading.Barrier(4)

    def many() -> None:
        barrier.wait()
        for _ in range(50):
            dense.dense_attention(q, q, q, 0.5)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(many) for _ in range(4)]:
            done.result()
    assert torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True) == before
    assert all(seen == list(dense._CUDNN_FIRST) for seen in OnGPU.seen) and len(OnGPU.seen) == 200


def test_a_pin_that_leaves_no_kernel_is_overruled(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))
    q = on_gpu(SDPBackend.CUDNN_ATTENTION)

    def none_left(*tensors: object, **options: object) -> int:
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(torch, "_fused_sdp_choice", none_left)
    dense.dense_attention(q, q, q, 0.5)
    assert OnGPU.seen == [list(dense._CUDNN_FIRST)]


def test_without_torchs_own_answer_the_order_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))
    q = on_gpu(SDPBackend.CUDNN_ATTENTION)
    monkeypatch.setattr(dense, "torch", _Without())
    dense.dense_attention(q, q, q, 0.5)
    assert OnGPU.seen == [list(dense._CUDNN_FIRST)]


def test_names_of_usable_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dense.dense_kernels("cpu", torch.float32, 48) == ("flash", "math")
    pretend(monkeypatch, (9, 0))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device, **how: empty(*shape, **how))
    asked = []
    for kernel in ("cudnn", "flash", "efficient"):
        answer = lambda params, kernel=kernel: asked.append(kernel) or kernel != "flash"  # noqa: E731
        monkeypatch.setattr(dense, f"can_use_{kernel}_attention", answer)
    with sdpa_kernel([SDPBackend.MATH]):
        assert dense.dense_kernels(CUDA, HALF, 64) == ("cudnn", "efficient", "math")
    assert asked == ["cudnn", "flash", "efficient"]
    assert dense.dense_kernels(CUDA, torch.float32, 64) == ("efficient", "math", "cudnn")
