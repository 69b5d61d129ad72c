"""Backends are chosen by what can run and computes rightly; a named one runs or raises."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hess_plugin_cuda import (
    Backend,
    BlockLists,
    Problem,
    available_backends,
    backends,
    block_sparse_attention,
    gather,
    reference,
    register_backend,
    resolve_backend,
    self_test,
)
from hess_plugin_cuda.built_in import register_built_in
from hess_plugin_cuda.self_test import SelfTests

HERE = Problem(torch.device("cpu"), torch.float32)
THERE = Problem(torch.device("meta"), torch.float16)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    few = {name: backends._BACKENDS[name] for name in ("gather", "reference")}
    monkeypatch.setattr(backends, "_BACKENDS", few)
    monkeypatch.setattr(backends, "_SELF_TESTS", SelfTests())
    monkeypatch.delenv(backends.CHOICE, raising=False)
    backends._choose.cache_clear()
    yield
    backends._choose.cache_clear()


def halves_only(problem: Problem) -> str | None:
    return None if problem.dtype in (torch.float16, torch.bfloat16) else "it computes in half precision"


def fast() -> Backend:
    return Backend("fast", 100, gather.forward, gather.backward, halves_only)


def with_a_test(name: str, forward: backends.Forward) -> Backend:
    """A backend that claims to run anywhere, with a self-test."""
    return Backend(name, 50, forward, gather.backward, tested=True)


def wrong(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, heads: tuple[int, ...] | None
) -> tuple[Tensor, None]:
    return gather.forward(q, k, v, lists, scale)[0] * 1.01, None


def broken(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, heads: tuple[int, ...] | None
) -> tuple[Tensor, None]:
    raise OSError("no kernel image is available\nfor execution on the device")


def test_gather_is_the_choice_on_a_cpu() -> None:
    assert resolve_backend("auto", HERE) == "gather"
    assert available_backends(HERE) == ("gather", "reference")


def test_auto_takes_the_best_that_can_run() -> None:
    register_backend(fast())
    assert available_backends() == ("fast", "gather", "reference")
    assert resolve_backend("auto", HERE) == "gather"
    half = replace(HERE, dtype=torch.bfloat16)
    assert resolve_backend("auto", half) == "fast"
    assert available_backends(half) == ("fast", "gather", "reference")


def test_a_new_backend_is_seen_by_calls_of_before() -> None:
    half = replace(HERE, dtype=torch.bfloat16)
    assert resolve_backend("auto", half) == "gather"
    register_backend(fast())
    assert resolve_backend("auto", half) == "fast"


def test_a_named_backend_that_cannot_run_raises_and_says_why() -> None:
    register_backend(fast())
    with pytest.raises(
        RuntimeError,
        match=r"'fast' cannot run float32, head width 64, blocks of 128 x 64 on cpu: it computes in half precision; "
        r"choose auto or gather\.",
    ):
        resolve_backend("fast", HERE)


def test_unknown_names_list_what_exists() -> None:
    with pytest.raises(ValueError, match="'flash'; choose one of auto, gather, reference"):
        resolve_backend("flash", HERE)


def test_names_are_taken_once() -> None:
    register_backend(fast())
    with pytest.raises(ValueError, match="'fast' already"):
        register_backend(fast())
    with pytest.raises(ValueError, match="a name of its own"):
        Backend("auto", 0, gather.forward, gather.backward)


def test_auto_never_falls_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_BACKENDS", {"reference": backends._BACKENDS["reference"]})
    with pytest.raises(RuntimeError, match="No attention backend runs float32"):
        resolve_backend("auto", HERE)


def test_the_environment_says_what_auto_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.CHOICE, "reference")
    assert resolve_backend("auto", HERE) == "reference"
    assert resolve_backend("gather", HERE) == "gather"  # what a caller names goes before
    monkeypatch.setenv(backends.CHOICE, "flash")
    with pytest.raises(ValueError, match=r"'flash' \(named by HESS_BACKEND\); choose one of auto"):
        resolve_backend("auto", HERE)
    register_backend(fast())
    monkeypatch.setenv(backends.CHOICE, "fast")
    with pytest.raises(RuntimeError, match=r"'fast' \(named by HESS_BACKEND\) cannot run float32"):
        resolve_backend("auto", HERE)


@pytest.mark.parametrize(
    ("forward", "says"),
    [(wrong, r"its self-test is off by \S+ where \S+ is allowed"),
     (broken, "its self-test failed with OSError: no kernel image is available")],
)  # fmt: skip
def test_a_backend_that_fails_its_test_is_passed_over_with_one_line_or_refused(
    forward: backends.Forward, says: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    register_backend(with_a_test("new", forward))
    assert backends.why_wrong("gather", HERE) is None
    with pytest.raises(RuntimeError, match=says):
        resolve_backend("new", HERE)
    # On a graphics card "auto" would take it; here it may be told apart by the device's name alone.
    monkeypatch.setattr(backends, "_is_emulated", lambda problem: False)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert resolve_backend("auto", HERE) == "gather"
    (record,) = caplog.records
    assert "backend new is passed over for float32" in record.message


def test_a_backend_that_computes_rightly_passes_whatever_mode_the_caller_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def counted(q: Tensor, *others: object) -> tuple[Tensor, None]:
        runs.append(q.dtype)
        return reference.forward(q, *others)  # type: ignore[arg-type]

    register_backend(with_a_test("new", counted))
    monkeypatch.setattr(backends, "_is_emulated", lambda problem: False)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert resolve_backend("auto", HERE) == "new"
    assert resolve_backend("new", HERE) == "new"
    assert runs == [torch.float32]  # once in a process
    assert resolve_backend("auto", replace(HERE, dtype=torch.float16, head_dim=48, block_q=40, block_k=24)) == "new"
    assert runs == [torch.float32, torch.float16]


@pytest.mark.parametrize("pin", [SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH])
def test_a_backend_is_tested_whatever_kernels_and_device_the_caller_has_chosen(pin: SDPBackend) -> None:
    """Pi3 pins FlashAttention, which takes no mask; here it is a kernel that this device does not have."""
    register_backend(with_a_test("new", reference.forward))
    with sdpa_kernel(pin), torch.device("meta"):
        assert backends.why_wrong("new", HERE) is None


def test_a_test_for_which_there_is_no_memory_says_nothing_about_the_backend() -> None:
    failures: list[Exception] = [torch.OutOfMemoryError("no room")]

    def forward(
        q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, heads: tuple[int, ...] | None
    ) -> tuple[Tensor, Tensor | None]:
        if failures:
            raise failures.pop()
        return reference.forward(q, k, v, lists, scale)

    register_backend(with_a_test("new", forward))
    with pytest.raises(torch.OutOfMemoryError):
        resolve_backend("new", HERE)
    assert resolve_backend("new", HERE) == "new"


def test_what_is_chosen_while_a_graph_is_captured_is_tested_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = [True]
    card = Problem(torch.device("cuda", 0), torch.float32)
    tests: list[Problem] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[-1])
    monkeypatch.setattr(self_test, "_test", lambda forward, problem: tests.append(problem) or "it is wrong")
    register_backend(with_a_test("new", wrong))
    assert resolve_backend("auto", card) == "new" and tests == []
    capturing.append(False)
    assert resolve_backend("auto", card) == "gather" and tests == [card]


def test_several_threads_wait_for_one_test() -> None:
    started = []

    def slow(
        q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, heads: tuple[int, ...] | None
    ) -> tuple[Tensor, Tensor | None]:
        started.append((torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        time.sleep(0.2)
        return reference.forward(q, k, v, lists, scale)

    register_backend(with_a_test("new", slow))

    def ask(_: int) -> str | None:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            return backends.why_wrong("new", HERE)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(ask, range(4))) == [None] * 4
    assert started == [(False, False, False)]


def test_the_backends_of_this_package_come_in_the_order_that_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_BACKENDS", {})
    register_built_in()
    made = {name: backends.get_backend(name) for name in available_backends()}
    assert list(made) == ["cuda_sm90", "triton", "flex", "gather", "reference"]
    kernels = {"cuda_sm90", "triton", "flex"}
    assert {name for name, backend in made.items() if backend.tested} == kernels
    assert {name for name, backend in made.items() if backend.dense_heads} == kernels
    assert [name for name, backend in made.items() if backend.priority < 0] == ["reference"]
    assert made["cuda_sm90"].backward is made["triton"].backward
    monkeypatch.setattr(backends, "_is_emulated", lambda problem: False)
    for last in range(1, 5):  # each where those before it cannot run
        usable = list(made)[last - 1 :]
        for name, backend in made.items():
            refusal = (lambda problem: None) if name in usable else (lambda problem: "it is not there")
            backends._BACKENDS[name] = replace(backend, refusal=refusal, tested=False)
        backends._choose.cache_clear()
        assert resolve_backend("auto", HERE) == usable[0]


def test_what_runs_on_a_cpu_only_in_an_interpreter_is_taken_by_name_alone() -> None:
    register_backend(with_a_test("emulated", reference.forward))
    assert resolve_backend("auto", HERE) == "gather"
    assert resolve_backend("emulated", HERE) == "emulated"


def heads_recorder(name: str, calls: list[tuple[int, ...] | None]) -> Backend:
    def forward(
        q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, heads: tuple[int, ...] | None
    ) -> tuple[Tensor, Tensor | None]:
        calls.append(heads)
        out = torch.full_like(q, float("nan"))
        some = list(range(lists.heads) if heads is None else heads)
        out[:, some] = reference.forward(q, k, v, lists, scale)[0][:, some]
        return out, None

    return replace(backends._BACKENDS["gather"], name=name, forward=forward, dense_heads=True)


@pytest.mark.parametrize("full", [(), (1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("gradient", [False, True])
def test_heads_known_to_keep_everything_are_computed_dense(full: tuple[int, ...], gradient: bool) -> None:
    calls: list[tuple[int, ...] | None] = []
    register_backend(heads_recorder("fast", calls))
    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 2, 3, 45, 8, generator=generator, dtype=torch.float64).unbind(0)
    mask = torch.zeros(2, 3, 5, 5, dtype=torch.bool)
    mask[..., 1] = mask[..., 4] = True
    mask[:, list(full)] = True
    kept = tuple(25 if head in full else 10 for head in range(3))
    lists = replace(BlockLists.from_mask(mask, 40, 40, 8, 8), head_kept=kept).check()
    tokens = [x.requires_grad_(gradient) for x in (q, k, v)]
    output = block_sparse_attention(*tokens, lists, backend="fast")
    wanted = block_sparse_attention(*tokens, lists, backend="reference")
    torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-12)
    sparse = tuple(head for head in range(3) if head not in full)
    assert calls == ([sparse] if full and sparse else [] if full else [None])
    if gradient:
        flow = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        ours = torch.autograd.grad(output, tokens, flow)
        for one, other in zip(ours, torch.autograd.grad(wanted, tokens, flow), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
