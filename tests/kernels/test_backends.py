"""Backends are chosen by what can run; a named one runs or raises."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hess_plugin_cuda import Backend, available_backends, backends, register_backend, resolve_backend

HERE = {"device": "cpu", "dtype": torch.float32, "head_dim": 64}


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backends, "_BACKENDS", dict(backends._BACKENDS))
    yield


def halves_only(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return None if dtype in (torch.float16, torch.bfloat16) else "it computes in half precision"


def fast() -> Backend:
    return Backend("fast", 100, backends.gather_attention, halves_only)


def test_gather_is_the_choice_on_a_cpu() -> None:
    assert resolve_backend("auto", **HERE) == "gather"
    assert available_backends("cpu") == ("gather", "reference")


def test_auto_takes_the_best_that_can_run() -> None:
    register_backend(fast())
    assert available_backends() == ("fast", "gather", "reference")
    assert resolve_backend("auto", **HERE) == "gather"
    assert resolve_backend("auto", device="cpu", dtype=torch.bfloat16, head_dim=64) == "fast"
    assert available_backends("cpu", torch.bfloat16) == ("fast", "gather", "reference")


def test_a_named_backend_that_cannot_run_raises_and_says_why() -> None:
    register_backend(fast())
    with pytest.raises(
        RuntimeError, match=r"'fast' cannot run torch.float32.*half precision; choose auto or one of gather"
    ):
        resolve_backend("fast", **HERE)


def test_unknown_names_list_what_exists() -> None:
    with pytest.raises(ValueError, match="'flash'; choose one of auto, gather, reference"):
        resolve_backend("flash", **HERE)


def test_names_are_taken_once() -> None:
    register_backend(fast())
    with pytest.raises(ValueError, match="'fast' already"):
        register_backend(fast())
    with pytest.raises(ValueError, match="a name of its own"):
        Backend("auto", 0, backends.gather_attention)


def test_auto_never_falls_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_BACKENDS", {"reference": backends._BACKENDS["reference"]})
    with pytest.raises(RuntimeError, match="No attention backend runs"):
        resolve_backend("auto", **HERE)
