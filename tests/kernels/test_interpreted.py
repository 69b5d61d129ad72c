"""Runs the checks of Triton kernels, each file in a process of its own.

Triton reads TRITON_INTERPRET when it is imported, and its interpreter must not leak into other tests. Where there is a
GPU, the same checks run compiled on it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
import torch

HERE = Path(__file__).parent
CHECKS = sorted((HERE / "interpreted").glob("check_*.py"))


def cannot_run() -> str | None:
    """Why no kernel can run here."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'triton>=3.6'"
    import triton

    old = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7)
    new_numpy = tuple(int(part) for part in numpy.__version__.split(".")[:2]) >= (2, 4)
    if old and new_numpy and not torch.cuda.is_available():
        return f"the interpreter of Triton {triton.__version__} does not work with numpy {numpy.__version__}"
    return None


def check(file: Path) -> subprocess.CompletedProcess[str]:
    """Run the checks of one file."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    environment.pop("TRITON_INTERPRET", None)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    return subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=1800)


@pytest.fixture(scope="module")
def checks() -> Iterator[dict[Path, Future[subprocess.CompletedProcess[str]]]]:
    """All files at once, one to a core: they take minutes."""
    reason = cannot_run()
    if reason is not None:
        pytest.skip(reason)
    at_once = 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(at_once) as threads:
        yield {file: threads.submit(check, file) for file in CHECKS}


@pytest.mark.slow
@pytest.mark.parametrize("file", CHECKS, ids=lambda file: file.stem)
def test_kernels(file: Path, checks: dict[Path, Future[subprocess.CompletedProcess[str]]]) -> None:
    child = checks[file].result()
    assert child.returncode == 0, f"{' '.join(child.args)}\n{child.stdout}\n{child.stderr}"


def test_there_are_checks() -> None:
    """A glob that finds nothing would run nothing."""
    attention = {"check_backward", "check_forward"}
    selection = {"check_selection", "check_selection_counts", "check_selection_rows"}
    restoration = {"check_restoration", "check_restoration_swaps"}
    assert {file.stem for file in CHECKS} == attention | selection | restoration
