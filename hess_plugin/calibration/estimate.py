"""What calibrating will take, found by running the model on tensors that have shapes but no values."""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hess_plugin.adapting import Adapter
from hess_plugin.exceptions import CalibrationError

from .live_memory import LiveMemory
from .measuring import Protocol, measuring

_PROBE_PIXELS = 224  # side of the views whose forward is timed
_PROBE_FLOPS = 1e11  # one view is enough from here on: it keeps a machine busy


@dataclass(frozen=True)
class Estimate:
    """What one scene takes.

    Attributes:
        weights: bytes of parameters and buffers.
        activations: most bytes of other tensors alive at once. An allocator's fragmentation and the context of a
            GPU (one to two gigabytes together) come on top.
        flops: floating-point operations of the forward and both backward passes, recomputation included.
        seconds: time of a scene at the speed of one timed forward; alignment and reading come on top. None if
            not timed, or where the model takes no small images.
    """

    weights: int
    activations: int
    flops: int
    seconds: float | None = None

    @property
    def total(self) -> int:
        """Weights and activations, bytes."""
        return self.weights + self.activations


def estimate(
    adapter: Adapter, model: nn.Module, views: int, height: int, width: int, protocol: Protocol, *, timed: bool = True
) -> Estimate:
    """Estimate what measuring one scene takes, without allocating it.

    The whole measurement (forward and a backward pass for each error, as `protocol` asks) runs on a copy of the
    model whose tensors are fake: operations compute shapes and lifetimes only. With `timed`, a forward of one
    small view (of all views, where one keeps no machine busy) is run for real and its speed taken for everything.

    Args:
        adapter: of the model.
        model: on the device it will be calibrated on.
        views: images of a scene.
        height: rows of an image, pixels.
        width: columns of an image, pixels.
        protocol: how the scenes will be measured.
        timed: whether to run the small real forward too.

    Raises:
        CalibrationError: the model cannot run without values; it then can be calibrated all the same.
    """
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    memory = _fake_run(adapter, model, (views, height, width), protocol, backward=True)
    found = Estimate(weights, memory.peak, memory.flops)
    if not timed:
        return found
    side = adapter.family(model).framing.whole(min(_PROBE_PIXELS, height, width))
    try:
        for count in (1, views):
            flops = _fake_run(adapter, model, (count, side, side), protocol, backward=False).flops
            if flops >= _PROBE_FLOPS:
                break
        seconds = _seconds(adapter, model, (count, side, side), protocol)
    except (CalibrationError, RuntimeError, ValueError):  # a model of one size only, or of two views and more
        return found
    return replace(found, seconds=found.flops * seconds / max(1, flops))


def _fake_run(
    adapter: Adapter, model: nn.Module, size: tuple[int, int, int], protocol: Protocol, *, backward: bool
) -> LiveMemory:
    """Run one scene of `views, height, width` on fake tensors and count what lives."""
    views, height, width = size
    fake = _FakeMode(allow_non_fake_inputs=True)
    device = next(model.parameters()).device
    try:
        twin = _fake_copy(model, fake, device)
        sites = adapter.sites(twin)
        memory = LiveMemory([*twin.parameters(), *twin.buffers()])
        with _quiet(), fake, memory, measuring(adapter, twin, sites, protocol) as measurer:
            images = torch.empty(views, 3, height, width, device=device)
            if backward:
                measurer.rehearse(images)
            else:
                with torch.no_grad():
                    measurer.predict(images)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CalibrationError(
            f"{type(model).__name__} cannot be run without values, so nothing can be estimated ({reason}); calibrate "
            "with a few views to see what it takes."
        ) from error
    return memory


class _FakeMode(FakeTensorMode):
    """Fake tensors whose values may be asked for: models size their tables by them.

    Any answer will do for counting bytes as long as it is of the right order: positions on a patch grid are what
    is asked for in practice, and whether everything is finite.
    """

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            tensor: Tensor = args[0]
            return True if tensor.dtype is torch.bool else 1.0 if tensor.is_floating_point() else 40
        return super().dispatch(func, types, args, kwargs or {})


def _fake_copy(model: nn.Module, fake: FakeTensorMode, device: torch.device) -> nn.Module:
    """Copy a model with fake parameters and buffers: nothing of its size is allocated, its caches stay its own."""
    memo: dict[int, Any] = {}
    with fake:
        for weight in model.parameters():
            empty = torch.empty(weight.shape, dtype=weight.dtype, device=device)
            memo[id(weight)] = nn.Parameter(empty, requires_grad=False)
        for buffer in model.buffers():
            memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return copy.deepcopy(model, memo)


def _seconds(adapter: Adapter, model: nn.Module, size: tuple[int, int, int], protocol: Protocol) -> float:
    """The best of two real forwards of `views, height, width`."""
    device = next(model.parameters()).device
    views, height, width = size
    images = torch.rand(views, 3, height, width, device=device)
    times = []
    with _quiet(), measuring(adapter, model, adapter.sites(model), protocol) as measurer, torch.no_grad():
        for _ in itertools.repeat(None, 2):
            _finish(device)
            started = time.perf_counter()
            measurer.predict(images)
            _finish(device)
            times.append(time.perf_counter() - started)
    return min(times)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Upstream code warns in every forward; a rehearsal need not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def describe(size: int) -> str:
    """Write bytes as gigabytes, or as megabytes where there are few."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
