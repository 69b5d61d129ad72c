"""What the checks of Triton kernels share. `tests/kernels/test_interpreted.py` runs them; see there."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent))  # for kernel_problems.py


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU, or the CPU if Triton interprets its kernels."""
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no CUDA device and no TRITON_INTERPRET=1: run tests/kernels/test_interpreted.py instead")
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is full of NaN, so that what a kernel does not write is seen."""

    def poisoned(make: Any) -> Any:
        def made(*arguments: Any, **options: Any) -> Tensor:
            x = make(*arguments, **options)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
