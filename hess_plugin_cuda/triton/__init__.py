"""Block-sparse attention in Triton: a kernel for outputs, two for gradients. Triton is imported when they first run."""

from __future__ import annotations

from .launch import backward, forward
from .support import refusal

__all__ = ["backward", "forward", "refusal"]
