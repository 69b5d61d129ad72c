"""Every Triton kernel, compiled for every architecture without a GPU, is as good as the committed table says."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hess_plugin_cuda import BlockLists

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "kernel_resources.py"
TABLE = ROOT / "benchmarks" / "results" / "kernel_resources.md"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_resources", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernel_resources"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_kernels_are_as_good_as_the_table() -> None:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install 'triton>=3.6'")
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(SCRIPT), "--hold", str(TABLE)]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert child.returncode == 0, f"{child.stdout}\n{child.stderr}"
    if child.stdout.startswith("skipped"):
        pytest.skip(child.stdout.strip())
    assert "as good as the table says" in child.stdout


def test_the_table_has_no_spills_and_the_attention_kernels_everywhere(script: ModuleType) -> None:
    made_with, rows = script.read_table(TABLE.read_text())
    assert made_with.startswith("Triton 3.")
    assert all(row.stack == row.spills == 0 for row in rows.values())
    for kernel in ("forward bf16 d64 128x64", "gradient of q bf16 d64 128x64", "gradient of k, v bf16 d64 64x128"):
        assert {sm for name, sm in rows if name == kernel} == {80, 89, 90, 100, 120}


def test_programs_fit_the_shared_memory(script: ModuleType) -> None:
    _, rows = script.read_table(TABLE.read_text())
    most = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that one program may have
    for row in rows.values():
        assert row.shared <= most[row.architecture] * 1024, row


def test_two_programs_of_the_forward_pass_fit_an_sm_of_hopper(script: ModuleType) -> None:
    _, rows = script.read_table(TABLE.read_text())
    row = rows["forward bf16 d64 128x64", 90]
    assert 2 * row.warps * 32 * row.registers <= 65536
    assert 2 * (row.shared + 1024) <= 228 * 1024


def test_hopper_multiplies_with_its_own_instruction(script: ModuleType) -> None:
    _, rows = script.read_table(TABLE.read_text())
    assert "HGMMA" in rows["forward bf16 d64 128x64", 90].matrix


def test_what_the_table_complains_about(script: ModuleType) -> None:
    row = script.Resources("kernel", 90, 8, 3, 128, 0, 0, 65536, "16 HGMMA")
    held = {row.key: row}
    assert script.complaints([row], held) == []
    assert script.complaints([replace(row, registers=120)], held) == []
    for worse, says in (
        (replace(row, registers=129), "takes 129 registers, the table says 128"),
        (replace(row, stack=8), "spills: 8 bytes"),
        (replace(row, spills=1), "spills: 0 bytes, 1 instructions"),
        (replace(row, matrix="128 HMMA"), "has 128 HMMA, the table says 16 HGMMA"),
        (replace(row, kernel="other"), "other on sm_90 is not in the table"),
    ):
        found = script.complaints([worse], held)
        assert says in found[0]
    assert script.complaints([], held) == ["kernel on sm_90 is in the table and no longer compiled"]


def test_the_table_reads_back(script: ModuleType) -> None:
    row = script.Resources("gradient of k, v bf16", 120, 4, 2, 255, 0, 0, 34816, "256 HMMA")
    text = f"{script.TITLE}\n\nTriton 3.7.1, ptxas 12.9.\n\n| kernel |\n|---|\n{row.row()}\n"
    assert script.read_table(text) == ("Triton 3.7.1, ptxas 12.9", {row.key: row})


def launched(patches: int, special: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a launch tells Triton's compiler, by kernel: type and hint of each argument; nothing is run."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton only interprets in this process")
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from hess_plugin_cuda.triton import launch

    found = {}
    compiler = make_backend(GPUTarget("cuda", 90, 32))

    def record(kernel: Any, chosen: Any, order: torch.Tensor, *arguments: Any, **constants: Any) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, compiler)
        named, hints, _ = bind(*arguments, **constants)
        found[kernel.__name__] = dict(zip(named, hints, strict=True))

    monkeypatch.setattr(launch, "_launch", record)
    packed = torch.zeros(1, patches + special, 3, heads, 64, dtype=torch.bfloat16)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    lists = BlockLists.full(1, heads, patches, patches, 128, 64)
    out, lse = launch.forward(q, k, v, lists, 0.125)
    launch.backward(out, q, k, v, out, lse, lists, 0.125)
    return found


def test_another_number_of_views_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (launched(views * 37, views * 5, 16, monkeypatch) for views in (1, 16))
    assert set(few) == {"forward_kernel", "query_kernel", "key_kernel"}
    assert few == many


def test_the_table_is_of_what_a_launch_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    hints = launched(100, 5, 3, monkeypatch)
    from hess_plugin_cuda.triton.compilations import compiled_configurations

    for configuration in compiled_configurations():
        if "bf16 d64" in configuration.name:
            own = hints[configuration.kernel.__name__]
            aligned = {name for name, (_, hint) in own.items() if hint == "D"}
            types = {name: kind for name, (kind, _) in own.items() if kind != "constexpr"}
            assert dict(configuration.signature) == types
            assert set(configuration.aligned) == aligned
            assert configuration.constants.keys() == own.keys() - types.keys()
