"""What the Triton backend cannot compute, and why."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hess_plugin_cuda.backends import Problem

WIDTHS = (16, 32, 64, 128)
BLOCKS = (16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16)


def refusal(problem: Problem) -> str | None:
    """Say in a few words why Triton cannot compute a problem, or None if it can.

    Under TRITON_INTERPRET=1, set before Triton is imported, it runs anywhere: that is for tests, and slow.
    """
    refused = device_refusal(problem.device)
    if refused is not None:
        return refused
    # In float32 a tile's operands do not fit the registers, and products of tensor cores are not exact enough.
    if problem.dtype not in DTYPES and not (problem.dtype == torch.float32 and is_interpreted()):
        return "it computes bfloat16 and float16"
    if problem.head_dim not in WIDTHS:
        return f"it needs a head width of {_one_of(WIDTHS)}"
    if problem.block_q not in BLOCKS or problem.block_k not in BLOCKS:
        return f"it needs blocks of {_one_of(BLOCKS)} tokens"
    return None


def device_refusal(device: torch.device) -> str | None:
    """Say in a few words why no kernel of Triton can run on a device, or None if one can."""
    if is_interpreted():
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return "it needs an NVIDIA GPU"  # known without importing Triton
    missing = missing_triton()
    if missing is not None:
        return missing
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"it needs compute capability 8.0, and {device} has {major}.{minor}"


@functools.cache
def missing_triton() -> str | None:
    """Say that there is no Triton, or that it is too old; None if it will do."""
    try:
        import triton
    except ImportError:
        return "it needs Triton, which is not installed: pip install 'triton>=3.6'"
    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if release < (3, 6):
        return f"it needs Triton 3.6 or later, not {triton.__version__}"
    return None


@functools.cache
def is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on any device."""
    if "TRITON_INTERPRET" not in os.environ or missing_triton() is not None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def _one_of(sizes: tuple[int, ...]) -> str:
    return f"{', '.join(str(size) for size in sizes[:-1])} or {sizes[-1]}"
