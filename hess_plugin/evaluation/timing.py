"""Timing calls side by side, so that ratios mean something on a busy machine."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from hess_plugin.break_even import Timing
from hess_plugin.exceptions import HessError

LEVEL = 0.95
_Name = TypeVar("_Name", bound=Hashable)
Clock = Callable[[], float]
Call = Callable[[], object]


class TooLarge(HessError):
    """A size takes longer than it may, or does not fit in memory."""


def side_by_side(
    calls: Mapping[_Name, Call], repeats: int, device: torch.device, *, clock: Clock = time.perf_counter
) -> dict[_Name, list[float]]:
    """Time every call once in each repeat, one after the other, in turned order from repeat to repeat.

    Whatever slows the machine for a while slows neighbours alike, and none always runs first, so ratios of times of
    one repeat mean more than the times. Nothing is warmed up here.

    Args:
        calls: what to time, by name.
        repeats: times that each call is made.
        device: where they run; it has finished before each reading of the clock.
        clock: seconds.

    Returns:
        Seconds of each call, repeat by repeat.
    """
    times: dict[_Name, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats):
        for name in calls if repeat % 2 == 0 else reversed(list(calls)):
            times[name].append(_timed(calls[name], device, clock))
    return times


def finish(device: torch.device) -> None:
    """Wait until a GPU has done all it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Interval of the median by the sign test: it holds the median with at least the probability `coverage` tells.

    The narrowest pair of order statistics, alike on both sides, that reaches `level`; with five values or fewer no
    pair reaches 0.95, and the whole range is taken.
    """
    ordered, cut = sorted(values), _cut(len(values), level)
    return ordered[cut], ordered[-1 - cut]


def coverage(count: int, level: float = LEVEL) -> float:
    """Probability with which `interval` of so many independent values holds their median."""
    return 1.0 - 2.0 * _below(count, _cut(count, level))


def _cut(count: int, level: float) -> int:
    """Values to leave out at each end."""
    cut = 0
    while 2 * (cut + 1) < count and 1.0 - 2.0 * _below(count, cut + 1) >= level:
        cut += 1
    return cut


def _below(count: int, cut: int) -> float:
    """Probability that at most `cut` of `count` values fall on one given side of their median."""
    return float(sum(math.comb(count, i) for i in range(cut + 1)) / 2**count)


def twin(model: nn.Module) -> nn.Module:
    """Copy a model that shares every parameter and buffer: one is patched while the other stays as it is."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


class Stopwatch:
    """How a dense and a patched call are timed; the settings that all sizes share.

    Args:
        device: where the calls run.
        repeats: pairs of calls.
        max_seconds: longest that the dense call of a warm-up may take.
        autocast: type of the autocast around both calls, or None.
        clock: seconds.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        repeats: int = 7,
        max_seconds: float = math.inf,
        autocast: torch.dtype | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.device, self.repeats, self.max_seconds = device, repeats, max_seconds
        self.autocast, self.clock = autocast, clock

    @contextlib.contextmanager
    def running(self, views: int) -> Iterator[None]:
        """Make calls of a size as they are timed: without gradient; too little memory raises `TooLarge`."""
        try:
            with torch.inference_mode(), _no_shortfall_warnings():
                yield
        except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator has none of its own
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            raise TooLarge(f"{views} views do not fit in the memory of {self.device}") from error
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def under_autocast(self) -> contextlib.AbstractContextManager[None]:
        """The autocast of one call; entered for each, since weights cast once would be kept until it is left."""
        return contextlib.nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)

    def compare(self, views: int, dense: Call, patched: Call) -> Timing:
        """Warm up and time; tokens and sparsity are left for the caller to fill in.

        Raises:
            TooLarge: the warm-up took too long.
        """
        dense, patched = self._as_made(dense), self._as_made(patched)
        seconds, dense_bytes = self._warm_up(dense)
        if seconds > self.max_seconds:
            raise TooLarge(f"one unpatched call of {views} views took longer than {self.max_seconds:g} s")
        patched_bytes = self._warm_up(patched)[1]
        times = side_by_side({"dense": dense, "patched": patched}, self.repeats, self.device, clock=self.clock)
        ratios = [ours / theirs for ours, theirs in zip(times["patched"], times["dense"], strict=True)]
        low, high = interval(ratios)
        return Timing(
            views=views,
            tokens=0,
            sparsity=0.0,
            dense=statistics.median(times["dense"]),
            patched=statistics.median(times["patched"]),
            ratio=statistics.median(ratios),
            low=low,
            high=high,
            repeats=self.repeats,
            dense_bytes=dense_bytes,
            patched_bytes=patched_bytes,
        )

    def _as_made(self, call: Call) -> Call:
        def made() -> object:
            with self.under_autocast():
                return call()

        return made

    def _warm_up(self, call: Call) -> tuple[float, int | None]:
        """Seconds of one call and, on a GPU, most memory alive in it."""
        if self.device.type != "cuda":
            return _timed(call, self.device, self.clock), None
        torch.cuda.reset_peak_memory_stats(self.device)
        seconds = _timed(call, self.device, self.clock)
        return seconds, torch.cuda.max_memory_allocated(self.device)


@contextlib.contextmanager
def _no_shortfall_warnings() -> Iterator[None]:
    """Timings tell the sparsity that was reached; a warning for each size would only hide them."""
    log = logging.getLogger("hess_plugin.attention")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _timed(call: Call, device: torch.device, clock: Clock) -> float:
    finish(device)
    started = clock()
    call()
    finish(device)
    return clock() - started
