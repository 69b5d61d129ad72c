"""What a patched model did: measured sparsity by site and head, calls and seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .sites import Site


@dataclass(frozen=True)
class SiteReport:
    """What happened at one site since it was patched.

    Attributes:
        name: the site.
        calls: attention calls answered (a checkpointed forward counts its recomputation too).
        dense_calls: of these, the ones that went to plain dense attention by rule.
        seconds: time spent in answered calls, selection included.
        sparsity: dropped share of the patch-block pairs of all calls together, or None without a call.
        sparsity_all_keys: dropped share of all key blocks seen by patch queries, special ones included.
        head_sparsity: `sparsity` of every head.
        unfit_calls: calls that could not be made sparse and were answered dense (``patch(..., unfit="dense")``); they
            are not among `calls`.
        unfit: why the first of them could not.
    """

    name: str
    calls: int
    dense_calls: int
    seconds: float
    sparsity: float | None
    sparsity_all_keys: float | None
    head_sparsity: tuple[float, ...] | None
    unfit_calls: int = 0
    unfit: str | None = None


@dataclass(frozen=True)
class PatchReport:
    """What happened at every site since `patch`; ``str()`` gives a table.

    Attributes:
        sites: one report a site, in execution order.
        backend: name of the attention backend.
        allocation: how budgets were divided among heads.
        settings: every other setting of the patch.
        measures: what ``memory="lean"`` changed, in words; empty without.
    """

    sites: tuple[SiteReport, ...]
    backend: str
    allocation: str
    settings: dict[str, Any]
    measures: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float | None:
        """Measured sparsity averaged over sites and heads, or None before the first forward."""
        return _mean([site.sparsity for site in self.sites])

    @property
    def sparsity_all_keys(self) -> float | None:
        """Like `sparsity`, counting special key blocks (always kept) as well."""
        return _mean([site.sparsity_all_keys for site in self.sites])

    @property
    def seconds(self) -> float:
        """Seconds spent in all answered attention calls."""
        return sum(site.seconds for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return {**asdict(self), "sparsity": self.sparsity, "sparsity_all_keys": self.sparsity_all_keys}

    def __str__(self) -> str:
        lines = [f"{'site':40} {'calls':>6} {'dense':>6} {'sparsity':>9} {'heads':>15} {'seconds':>9}"]
        for site in self.sites:
            spread = (
                "" if site.head_sparsity is None else f"{min(site.head_sparsity):.3f}..{max(site.head_sparsity):.3f}"
            )
            lines.append(
                f"{site.name:40} {site.calls:6d} {site.dense_calls:6d} {_share(site.sparsity):>9} {spread:>15} "
                f"{site.seconds:9.4f}"
            )
        lines.append(
            f"sparsity {_share(self.sparsity)} ({_share(self.sparsity_all_keys)} of all key blocks), "
            f"backend {self.backend}, allocation {self.allocation}, {self.seconds:.4f} s in attention"
        )
        unfit = [site for site in self.sites if site.unfit_calls]
        if unfit:
            count = sum(site.unfit_calls for site in unfit)
            lines.append(f"{count} calls could not be made sparse and ran dense: {unfit[0].unfit}")
        if self.settings.get("dense_below"):
            lines.append(f"forwards of fewer than {self.settings['dense_below']} patch tokens take the dense path")
        lines += [f"lean memory: {measure}" for measure in self.measures]
        if "stepped_aside" in self.settings:
            lines.append(f"the profile's budgets stepped aside for uniform ones: it {self.settings['stepped_aside']}")
        return "\n".join(lines)


class Tally:
    """Running counts of one site, by any number of threads; nothing here waits for a device."""

    def __init__(self, site: Site) -> None:
        self._name = site.name  # not the site, whose module a report must not keep alive
        self._lock = threading.Lock()
        self._calls = 0
        self._dense_calls = 0
        self._total = 0  # patch-block pairs a head had, over all calls and batch items
        self._special = 0  # special key blocks seen by patch query blocks, per head
        self._seconds = 0.0
        self._unfit_calls = 0
        self._unfit: str | None = None
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        # Made by the first sparse call: where a model is patched, tensors may be made on no device at all.
        self._heads, self._kept_dense = site.num_heads, 0
        self._kept: Tensor | None = None
        self._kept_planned = [0] * site.num_heads

    def dense(self, pairs: int, special: int) -> None:
        """Count one call that kept everything: `pairs` patch-block pairs and `special` block pairs a head."""
        with self._lock:
            self._dense_calls += 1
            self._kept_dense += pairs
            self._total += pairs
            self._special += special

    def sparse(self, kept: Tensor | Sequence[int], pairs: int, special: int) -> None:
        """Count one sparse call that kept `kept` ``[H]`` patch-block pairs of `pairs` a head."""
        with self._lock:
            self._total += pairs
            self._special += special
            if not isinstance(kept, Tensor):  # known beforehand: no work for the device
                self._kept_planned = [before + count for before, count in zip(self._kept_planned, kept, strict=True)]
                return
            if self._kept is None or self._kept.device != kept.device:
                # An ordinary tensor also under inference_mode: a new one could not be updated outside of it later.
                with torch.inference_mode(False):
                    before = torch.zeros_like(kept) if self._kept is None else self._kept
                    self._kept = before.to(kept.device)
            self._kept += kept

    def unfit(self, why: str) -> None:
        """Count one call that could not be made sparse."""
        with self._lock:
            self._unfit_calls += 1
            self._unfit = self._unfit or why

    def start(self, device: torch.device) -> Any:
        """Start the clock of one call: wall clock on the CPU, an event on a GPU (read only by `report`)."""
        with self._lock:
            self._calls += 1
        if device.type != "cuda":
            return time.perf_counter()
        if torch.cuda.is_current_stream_capturing():
            return None  # events of a graph are never done
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def stop(self, started: Any, device: torch.device) -> None:
        """Stop the clock of one call."""
        if isinstance(started, float):
            with self._lock:
                self._seconds += time.perf_counter() - started
            return
        if started is None:
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        with self._lock:
            self._events.append((started, event))
            if len(self._events) % 4096 == 0:
                self._settle_events(wait=False)

    def _settle_events(self, *, wait: bool) -> None:
        """Turn recorded GPU events into seconds, under the lock: all of them, or those that need no waiting."""
        left = []
        for first, last in self._events:
            if wait:
                last.synchronize()
            elif not last.query():
                left.append((first, last))
                continue
            self._seconds += first.elapsed_time(last) / 1000.0
        self._events = left

    def reset(self) -> None:
        """Forget, in a forked process, what its parent counted."""
        # A thread that is not in this process may hold the old lock, and what lies on a device is the parent's to free.
        self._lock, self._of_parent = threading.Lock(), (self._events, self._kept)
        self._calls = self._dense_calls = self._total = self._special = self._kept_dense = self._unfit_calls = 0
        self._seconds, self._unfit, self._kept, self._events = 0.0, None, None, []
        self._kept_planned = [0] * self._heads

    def report(self) -> SiteReport:
        """Read the counts."""
        sparsity = all_keys = heads = None
        with self._lock:
            self._settle_events(wait=True)
            total, special, dense = self._total, self._special, self._kept_dense
            kept = list(self._kept_planned)
            if self._kept is not None:
                kept = [planned + counted for planned, counted in zip(kept, self._kept.tolist(), strict=True)]
        if total:
            heads = tuple(1.0 - (dense + count) / total for count in kept)
            sparsity = sum(heads) / len(heads)
            all_keys = sparsity * total / (total + special)
        return SiteReport(
            self._name,
            self._calls,
            self._dense_calls,
            self._seconds,
            sparsity,
            all_keys,
            heads,
            self._unfit_calls,
            self._unfit,
        )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
