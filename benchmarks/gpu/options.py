"""What every section of the suite is told."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from hess_plugin_cuda import available_backends
from hess_plugin_cuda.backends import Problem, get_backend

WIDTH = 64
BLOCK_Q, BLOCK_K = 128, 64
SPECIAL_PER_VIEW = 5
KERNELS = ("cuda_sm90", "triton", "flex", "gather")


@dataclass(frozen=True)
class Options:
    """Settings of a run.

    Attributes:
        device: where everything runs.
        quick: tiny sizes, to see that every path works.
        views: numbers of views of the timings of attention, () for the section's own.
        skip: backends that are not timed, because they were found to be wrong.
        seconds: that the section may take.
        started: when it began, by `time.monotonic`.
    """

    device: torch.device
    quick: bool = False
    views: tuple[int, ...] = ()
    skip: tuple[str, ...] = ()
    seconds: float = 1e9
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds that are left for the section."""
        return self.seconds - (time.monotonic() - self.started)

    @property
    def patches_per_view(self) -> int:
        """Patch tokens of a view: 37 x 37, as of 518 pixels in patches of 14."""
        return 71 if self.quick else 1369

    @property
    def half(self) -> torch.dtype:
        """The type that models compute attention in."""
        return torch.bfloat16

    def refusal(self, name: str, dtype: torch.dtype = torch.bfloat16) -> str | None:
        """Why a backend cannot run here, or None."""
        if name not in available_backends():
            return "there is none of this name"
        return get_backend(name).refusal(Problem(self.device, dtype, WIDTH, BLOCK_Q, BLOCK_K))

    def backends(self) -> tuple[str, ...]:
        """Names of the backends that can run here and were not found to be wrong, best first."""
        return tuple(name for name in KERNELS if name not in self.skip and self.refusal(name) is None)
