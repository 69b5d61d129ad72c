"""`hess-patch doctor` tells what runs, why, and what would be faster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from hess_plugin import diagnosis
from hess_plugin.cli import main
from hess_plugin_cuda import Backend, BlockLists, Problem, backends, gather, register_backend
from hess_plugin_cuda.self_test import SelfTests


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backends, "_BACKENDS", dict(backends._BACKENDS))
    monkeypatch.setattr(backends, "_SELF_TESTS", SelfTests())
    monkeypatch.delenv(backends.CHOICE, raising=False)
    backends._choose.cache_clear()
    yield
    backends._choose.cache_clear()


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", "--device", "cpu", *arguments])


def lines(result: Result) -> dict[str, str]:
    """What is said, by the first word of a line."""
    found = [line.split() for line in result.stdout.splitlines()]
    return {words[0]: " ".join(words[1:]) for words in reversed(found)}  # the first line of a word counts


def test_a_cpu_gets_gather_and_hears_why_not_the_others() -> None:
    result = doctor()
    said = lines(result)
    assert result.exit_code == 0
    assert said["gather"] == "chosen: the first that can run here" and said["reference"] == "by name only"
    assert said["cuda_sm90"].startswith("refused: ") and said["triton"].startswith("refused: ")
    assert said["device"].startswith("cpu") and torch.__version__ in said["versions"]
    assert said["attention"] == "float32, head width 64, blocks of 128 x 64 on cpu"
    assert "math" in said["dense"] and said["faster"]


def test_it_is_asked_for_a_type_a_width_and_blocks_and_may_answer_in_json() -> None:
    result = doctor("--dtype", "float16", "--head-dim", "48", "--block-q", "32", "--block-k", "8", "--json")
    found = json.loads(result.stdout)
    assert found["problem"] == "float16, head width 48, blocks of 32 x 8 on cpu"
    assert found["chosen"] == "gather" and found["healthy"] is True
    assert {backend["name"] for backend in found["backends"]} == set(backends.available_backends())


def test_a_backend_that_computes_wrong_results_is_told_with_exit_code_1() -> None:
    def forward(
        q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, heads: tuple[int, ...] | None
    ) -> tuple[Tensor, None]:
        return torch.zeros_like(q), None

    register_backend(Backend("zeros", 50, forward, gather.backward, tested=True))
    result = doctor()
    assert result.exit_code == 1
    assert lines(result)["zeros"].startswith("wrong: its self-test is off by")
    assert "zeros would be tried first, but its self-test is off by" in result.stdout
    assert lines(result)["gather"].startswith("chosen")


def test_a_choice_by_the_environment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.CHOICE, "reference")
    result = doctor()
    assert (
        lines(result)["reference"] == "chosen: named by HESS_BACKEND"
        and "HESS_BACKEND=reference stands for auto" in result.stdout
    )
    monkeypatch.setenv(backends.CHOICE, "flash")
    result = doctor()
    assert result.exit_code == 1 and lines(result)["problem"].startswith("There is no attention backend 'flash'")
    assert "flash" in json.loads(doctor("--json").stdout)["unusable"]


def test_a_missing_device_is_one_sentence() -> None:
    device = f"cuda:{torch.cuda.device_count()}" if torch.cuda.is_available() else "cuda"
    result = CliRunner().invoke(main, ["doctor", "--device", device])
    assert result.exit_code == 2 and f"--device {device} cannot be used here" in result.output


def states(**reasons: str) -> dict[str, diagnosis.BackendState]:
    return {
        name: diagnosis.BackendState(
            name, "chosen" if reason == "chosen" else "refused" if reason else "usable", reason
        )
        for name, reason in reasons.items()
    }


@pytest.mark.parametrize(
    ("capability", "dtype", "found", "dense", "says"),
    [
        ((9, 0), torch.float32, states(cuda_sm90="halves only", triton="chosen"), "cudnn", "bfloat16 (autocast)"),
        ((9, 0), torch.bfloat16, states(cuda_sm90="it needs a newer driver", triton="chosen"), "cudnn",
         "cuda_sm90 is made for this card; here it needs a newer driver"),
        ((8, 0), torch.bfloat16, states(cuda_sm90="other card", triton="triton is not installed", gather="chosen"),
         "flash", "triton goes before gather where it runs; here triton is not installed"),
        ((9, 0), torch.bfloat16, states(cuda_sm90="chosen", triton=""), "flash", "cuDNN 9.15 or later"),
    ],
)  # fmt: skip
def test_advice_on_a_graphics_card(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    found: dict[str, diagnosis.BackendState],
    dense: str,
    says: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(diagnosis, "dense_kernels", lambda *asked: (dense, "math"))
    problem = Problem(torch.device("cuda", 0), dtype)
    (told,) = diagnosis._advice(problem, found)
    assert says in told
    healthy = replace(problem, dtype=torch.bfloat16)
    monkeypatch.setattr(diagnosis, "dense_kernels", lambda *asked: ("cudnn", "math"))
    assert diagnosis._advice(healthy, states(cuda_sm90="chosen", triton="")) == []


def test_a_torch_without_cuda_beside_a_driver_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(diagnosis, "_driver", lambda: "13.0")
    (told,) = diagnosis._advice(Problem(torch.device("cpu"), torch.float32), {})
    assert "built without CUDA" in told
