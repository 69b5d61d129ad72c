"""Times of calls: on a GPU by events, with inputs that are in no cache and no waiting for the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_FLUSH = 2**28  # bytes; several times the second-level cache of any GPU
_AHEAD = 4_000_000  # cycles that the GPU sleeps while the host launches


@dataclass(frozen=True)
class Time:
    """Times of one call.

    Attributes:
        ms: median, milliseconds.
        least: of the repeats, milliseconds.
        repeats: how many there were.
        peak: bytes allocated at most during a call beyond those before it; None on a CPU.
    """

    ms: float
    least: float
    repeats: int
    peak: int | None


class Clock:
    """Times calls on one device.

    Three calls to warm up and a median of ten; of calls over 0.2 s two and five, of calls over 1 s one and three.
    Before each the cache is overwritten, and the GPU sleeps until the host has launched everything, so that the time
    is the GPU's own; `host=True` leaves that sleep out and takes the wall time of the call and the wait for it.

    Args:
        device: where the calls run.
        quick: one call to warm up, and three.
    """

    def __init__(self, device: torch.device, *, quick: bool = False) -> None:
        self.device, self.quick = device, quick
        self._flush: Tensor | None = None
        if device.type == "cuda":
            self._flush = torch.empty(_FLUSH, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], object], *, host: bool = False) -> Time:
        """Time a call; its result is dropped."""
        before = self._reset_peak()
        estimate = self._wall(call)
        peak = None if before is None else torch.cuda.max_memory_allocated(self.device) - before
        if estimate < 1 or before is None:  # the first call may compile
            estimate = self._wall(call)
        warm_ups, repeats = (1, 10) if estimate < 0.2 else (0, 5) if estimate < 1 else (0, 3)
        if self.quick:
            warm_ups, repeats = 0, 3
        for _ in range(warm_ups):
            call()
        times = [self._wall(call) * 1e3 if host or before is None else self._event(call) for _ in range(repeats)]
        return Time(statistics.median(times), min(times), repeats, peak)

    def _reset_peak(self) -> int | None:
        if self._flush is None:
            return None
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def _wall(self, call: Callable[[], object]) -> float:
        """Seconds of a call and of the wait for what it launched."""
        if self._flush is not None:
            self._flush.zero_()
            torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        call()
        if self._flush is not None:
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started

    def _event(self, call: Callable[[], object]) -> float:
        """Milliseconds of a call on the GPU."""
        assert self._flush is not None
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(_AHEAD)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end)
