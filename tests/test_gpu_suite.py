"""The suite for GPUs runs from end to end on tiny sizes, finds what is wrong, and outlives what hangs or breaks."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hess_plugin_cuda import Backend, BlockLists, backends, block_count, register_backend, token_mask

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_suite.py"
Row = dict[str, Any]


@pytest.fixture(scope="module")
def gpu() -> Iterator[SimpleNamespace]:
    """The modules of the suite, imported as the program imports them."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        names = ("checks", "exact", "jobs", "kernels", "options", "problems", "report", "runner", "sheet", "verdicts")
        yield SimpleNamespace(**{name: importlib.import_module(f"gpu.{name}") for name in names})
    finally:
        sys.path.remove(str(SCRIPT.parent))
        for name in [name for name in sys.modules if name == "gpu" or name.startswith("gpu.")]:
            del sys.modules[name]


@pytest.fixture
def here(gpu: SimpleNamespace) -> Any:
    return gpu.options.Options(torch.device("cpu"), quick=True)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("OUT", "TRITON_INTERPRET")}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=200, env=environment | {"OMP_NUM_THREADS": "1"}
    )


@pytest.mark.slow
def test_everything_runs_on_a_cpu(tmp_path: Path) -> None:
    result = run("--device", "cpu", "--quick", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert not [job["failures"] for job in found["jobs"].values() if job["failures"]]
    tables = {name: rows for job in found["jobs"].values() for name, rows in job["tables"].items()}
    wanted = {"correctness", "gradients", "selection", "waiting", "dense", "attention", "selection times", "models"}
    assert wanted <= set(tables)
    checked = [r for r in found["jobs"]["check gather"]["tables"]["correctness"] if r["backend"] == "gather"]
    assert len(checked) == 3 and all(row["result"] == "right" for row in checked)
    assert {row["backend"] for row in tables["attention"]} == {"gather", "by dispatch"}
    text = (tmp_path / "gpu_suite.md").read_text()
    assert all(f"| {name} |" in text for name in found["jobs"])
    assert found["about"]["torch"] in text and "| met |" in text


def test_without_a_gpu_it_says_what_it_needs(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for arguments in ((), ("--device", "cpu")):
        result = run(*arguments, "--out", str(tmp_path))
        assert result.returncode == 2 and result.stdout.count("\n") == 1 and "--quick" in result.stdout
    assert not list(tmp_path.iterdir())


CHILD = """
import json, os, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
into = options["--into"]
def write(**data):
    open(into, "w").write(json.dumps({"tables": {}, "notes": [], "failures": []} | data))
name = options["--job"]
if name == "check triton":
    write(tables={"correctness": [{"backend": "triton", "result": "right", "problem": "first"}]})
    time.sleep(600)
if name == "check flex":
    write(failures=["it is wrong"])
if name == "kernels":
    print("about to end"); print("illegal memory access", file=sys.stderr); sys.exit(3)
if name == "tuning":
    write(notes=[" ".join(sys.argv), os.environ.get("HESS_BACKEND")])
if name == "check gather":
    write()
"""


def test_jobs_that_hang_or_break_take_nothing_with_them(
    gpu: SimpleNamespace, here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HESS_BACKEND", raising=False)
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    names = ("check triton", "check flex", "check gather", "kernels", "tuning", "models")
    limits = dict.fromkeys(names, 60.0) | {"check triton": 4.0}
    jobs = {name: dataclasses.replace(gpu.jobs.JOBS[name], seconds=limits[name]) for name in names}
    monkeypatch.setattr(gpu.runner, "JOBS", jobs)
    monkeypatch.setattr(gpu.runner, "START", 0.1)
    started = time.monotonic()
    status = gpu.runner.run_all(script, here, list(gpu.jobs.SECTIONS), tmp_path / "out", apart=True)
    assert status == 1 and time.monotonic() - started < 60
    found = json.loads((tmp_path / "out" / "gpu_suite.json").read_text())["jobs"]
    assert list(found) == list(names)
    assert found["check triton"]["state"] == "killed after 4 s"
    assert found["check triton"]["tables"]["correctness"][0]["problem"] == "first"  # measured before it was killed
    assert found["kernels"]["state"] == "ended with status 3"
    assert found["kernels"]["failures"][0].endswith("about to end / illegal memory access")
    assert found["check gather"]["state"] == "done" and not found["check gather"]["failures"]
    command, backend = found["tuning"]["notes"]
    assert command.endswith("--skip triton flex") and backend == "gather"  # neither is timed or chosen any more


def test_what_there_is_no_time_for_is_named(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = gpu.options.Options(torch.device("cpu"), quick=True, seconds=5.0)
    status = gpu.runner.run_all(tmp_path / "none.py", options, ["tuning"], tmp_path, apart=True)
    found = json.loads((tmp_path / "gpu_suite.json").read_text())["jobs"]
    assert status == 1 and found["tuning"]["state"] == "not begun, for want of time"


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_BACKENDS", dict(backends._BACKENDS))
    backends._choose.cache_clear()


@pytest.mark.parametrize("fault", ["last key", "unset row", "another time"])
def test_wrong_backends_are_found(gpu: SimpleNamespace, here: Any, own_registry: None, fault: str) -> None:
    gather, calls = backends.get_backend("gather"), []

    def forward(q: Any, k: Any, v: Any, lists: Any, scale: float, heads: Any) -> Any:
        calls.append(1)
        if fault == "last key":
            return gather.forward(q, torch.cat([k[:, :, :-1], k[:, :, :1]], 2), v, lists, scale, heads)
        out, lse = gather.forward(q, k, v, lists, scale, heads)
        if fault == "unset row":
            out[0, -1, lists.query_tokens - 1] = float("nan")
        if fault == "another time" and len(calls) % 2:
            out = out.clone()
            out[0, 0, 0, 0] += torch.finfo(out.dtype).eps
        return out, lse

    register_backend(Backend("faulty", -1, forward, gather.backward))
    sheet = gpu.sheet.Sheet()
    gpu.checks.check_backend("faulty", here, sheet)
    assert sheet.data["failures"] and all("faulty" in text for text in sheet.data["failures"])
    if fault == "another time":
        assert any("second run" in text for text in sheet.data["failures"])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.integers(0, 90), st.integers(1, 3), st.floats(0, 1), st.integers(0, 10**6))
def test_pairs_of_tokens_are_counted_exactly(
    gpu: SimpleNamespace, patches: int, special: int, heads: int, share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand((2, heads, block_count(patches, 128), block_count(patches, 64)), generator=generator) < share
    mask[..., 0] = True
    lists = BlockLists.from_mask(mask, patches, patches, 128, 64)
    tokens = patches + special
    assert gpu.problems.token_pairs(lists, tokens, tokens) == int(token_mask(lists, tokens, tokens).sum())
    rows = token_mask(lists, tokens, tokens)[:, :, :patches:128].flatten(0, 2)
    for row in range(0, lists.rows, 3):
        keys = gpu.exact.row_keys(lists, row, tokens)
        assert torch.equal(keys, rows[row].nonzero()[:, 0])


@pytest.mark.parametrize("spread", ["uniform", "ragged"])
@pytest.mark.parametrize("kind", ["random", "clustered"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_lists_to_time_are_valid_and_keep_their_share(
    gpu: SimpleNamespace, spread: str, kind: str, share: float
) -> None:
    size = gpu.problems.Size(5, 12345, 25, 16)
    lists = gpu.problems.make_lists(size, share, torch.device("cpu"), spread=spread, kind=kind).check()
    assert lists.head_kept == tuple(lists.counts().sum((0, 2)).tolist())
    assert 1 - lists.sparsity() == pytest.approx(share, abs=0.03 if kind == "random" else 0.08)
    dense = [kept == lists.query_blocks * lists.key_blocks for kept in lists.head_kept]
    assert dense[0] == (spread == "ragged" or share == 1)
    assert all(dense) == (share == 1)


def attention(**changes: Any) -> Row:
    row = {"views": 100, "share": 0.1, "spread": "uniform", "lists": "random", "backend": "triton", "heads": 16}
    return row | {"r": 1.2, "of_dense": 0.12, "ms": 20.0} | changes


@pytest.mark.parametrize(
    ("row", "target", "verdict"),
    [
        (attention(r=1.45), "triton: t /", "met"),
        (attention(r=1.46), "triton: t /", "MISSED"),
        (attention(r=9.0, views=50), "triton: t /", "not measured"),
        (attention(r=1.3), "triton: the same", "MISSED"),
        (attention(backend="cuda_sm90", r=1.15), "cuda_sm90: t /", "met"),
        (attention(backend="by dispatch", share=1.0, of_dense=1.04), "everything kept", "MISSED"),
        (attention(backend="by dispatch", share=1.0, of_dense=1.0), "everything kept", "met"),
    ],
)
def test_verdicts_follow_from_the_worst_row(gpu: SimpleNamespace, row: Row, target: str, verdict: str) -> None:
    better = row | {"r": 0.5, "of_dense": 0.01}
    found = gpu.verdicts.verdicts({"attention": [better, row, better]})
    assert [v["verdict"] for v in found if v["target"].startswith(target)] == [verdict]


def test_verdicts_on_evenness_and_selection(gpu: SimpleNamespace) -> None:
    rows = [attention(share=share, r=r) for share, r in ((1.0, 1.0), (0.05, 1.09), (0.02, 5.0))]
    rows += [attention(views=300, share=share, r=r) for share, r in ((1.0, 1.0), (0.5, 1.2))]
    times = [{"views": 100, "heads": 16, "part": "whole", "ms": 0.9, "peak_gib": 0.1}]
    times += [{"views": 1000, "heads": 16, "part": "whole", "ms": 50.0, "peak_gib": 2.5}]
    rows += [attention(views=1000, heads=2, ms=200.0), attention(ms=20.0), attention(ms=25.0)]
    found = {v["target"]: v for v in gpu.verdicts.verdicts({"attention": rows, "selection times": times})}
    even = next(v for target, v in found.items() if target.startswith("triton: time for a kept pair"))
    assert (even["verdict"], even["worst"], even["where"]) == ("MISSED", 1.2, "300 views")
    selection = next(v for target, v in found.items() if target.startswith("selection / attention"))
    assert selection["verdict"] == "met" and selection["worst"] == 0.045  # 0.9 of 20 ms; 50 of 200 ms x 16 / 2 heads
    memory = next(v for target, v in found.items() if target.startswith("memory of the selection"))
    assert memory["verdict"] == "MISSED"


def test_a_sheet_is_on_disk_after_every_row(gpu: SimpleNamespace, tmp_path: Path) -> None:
    sheet = gpu.sheet.Sheet(tmp_path / "sheet.json")
    sheet.row("one", value=1.23456, odd=float("nan"), shape=(1, 2), kind=torch.bfloat16)
    assert json.loads((tmp_path / "sheet.json").read_text())["tables"] == {
        "one": [{"value": 1.235, "odd": "nan", "shape": [1, 2], "kind": "torch.bfloat16"}]
    }
    sheet.fail("no")
    assert json.loads((tmp_path / "sheet.json").read_text())["failures"] == ["no"]
