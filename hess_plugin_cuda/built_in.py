"""The backends of this package, registered when it is imported; what they are made with is imported when they run."""

from __future__ import annotations

from . import flex, gather, reference, triton
from .backends import Backend, register_backend
from .sm90 import launch as sm90


def register_built_in() -> None:
    """Register them all."""
    kernels = {"dense_heads": True, "tested": True}
    # The kernels for Hopper compute no gradients: Triton's read the same log-sum-exp.
    register_backend(Backend("cuda_sm90", 40, sm90.forward, triton.backward, sm90.refusal, **kernels))
    register_backend(Backend("triton", 30, triton.forward, triton.backward, triton.refusal, **kernels))
    register_backend(Backend("flex", 20, flex.forward, flex.backward, flex.refusal, **kernels))
    register_backend(Backend("gather", 10, gather.forward, gather.backward))
    register_backend(Backend("reference", -1, reference.forward, reference.backward))
