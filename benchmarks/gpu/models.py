"""Section "models": whole forwards of VGGT-1B and Pi3 with random weights, dense and patched."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import hess_plugin
from hess_plugin.demo.model import TinyVGGT, TinyVGGTConfig
from hess_plugin.evaluation.timing import finish
from hess_plugin.plugins import load_model

from .checks import told
from .options import Options
from .random_profile import random_profile
from .sheet import Sheet

UPSTREAM = {"vggt": "HESS_TEST_VGGT", "pi3": "HESS_TEST_PI3"}
VIEWS = (20, 50, 100, 200, 300)
SIZE = (392, 518)
SPARSITY = 0.75


def time_models(options: Options, sheet: Sheet) -> None:
    """Time each model whose code is importable; the sizes of all models turn by turn, the small first."""
    names = ["demo"] if options.quick else list(UPSTREAM)
    for index, name in enumerate(names):
        share = options.left / (len(names) - index)
        with checkout(name) as found:
            if not found:
                sheet.note(f"{name}: no upstream code; {UPSTREAM[name]} names no checkout and it is not importable.")
                continue
            try:
                model = _load(name, options)
            except Exception as error:  # upstream code may need packages that are not here
                sheet.note(f"{name} could not be built: {told(error)}")
                continue
            _time_model(name, model, share, options, sheet)
            del model
            gc.collect()


@contextlib.contextmanager
def checkout(name: str) -> Iterator[bool]:
    """Put the user's checkout of a model on the path; False where there is no code of it."""
    if name == "demo":
        yield True
        return
    places = [place for place in os.environ.get(UPSTREAM[name], "").split(os.pathsep) if place]
    sys.path[:0] = places[:1]
    try:
        yield importlib.util.find_spec(name) is not None
    finally:
        del sys.path[: len(places[:1])]


def _load(name: str, options: Options) -> nn.Module:
    if name == "demo":
        torch.manual_seed(0)
        return TinyVGGT(TinyVGGTConfig(dim=128, num_heads=2, depth=2)).eval().to(options.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream's own
        return load_model(name, "random", device=options.device, dtype=torch.float32)


def _time_model(name: str, model: nn.Module, share: float, options: Options, sheet: Sheet) -> None:
    """Time one model at growing sizes, as long as its share of the time lasts."""
    until = time.monotonic() + share
    profile = random_profile(model)
    ways: dict[str, dict[str, Any] | None] = {
        "dense": None,
        "uniform": {"sparsity": SPARSITY},
        "by score": {"sparsity": SPARSITY, "profile": profile, "strict": False},
    }
    pace = 0.0  # seconds for the square of a view
    for views in (2, 4) if options.quick else VIEWS:
        if pace * views**2 * 4 > until - time.monotonic():
            sheet.note(f"not timed, for want of time: {name} at {views} views.")
            continue
        dense = None
        for way, how in ways.items():
            found = _time_way(name, model, views, way, how, options, sheet)
            if found is None:
                break
            seconds, peak, sparsity = found
            dense = dense or seconds
            pace = max(pace, seconds / views**2) if way == "dense" else pace
            sheet.row("models", model=name, views=views, way=way, seconds=seconds, of_dense=seconds / dense,
                      sparsity=sparsity, peak_gib=peak)  # fmt: skip


def _time_way(
    name: str, model: nn.Module, views: int, way: str, how: dict[str, Any] | None, options: Options, sheet: Sheet
) -> tuple[float, float | None, float | None] | None:
    """Seconds of a forward, its memory and its sparsity; None, and a note, where it fails."""
    size = (60, 60) if options.quick else SIZE
    images = torch.rand(1, views, 3, *size, device=options.device)
    patched = contextlib.nullcontext() if how is None else hess_plugin.patch(model, **how)
    try:
        with patched as handle, torch.inference_mode():
            first = _forward(model, images, options)
            _reset_peak(options.device)
            repeats = 3 if first < 1 else 1
            times = [_forward(model, images, options) for _ in range(repeats)]
            peak = _peak(options.device)
            sparsity = None if handle is None else handle.report().sparsity
        return statistics.median(times), peak, sparsity
    except torch.OutOfMemoryError:
        sheet.note(f"out of memory: {name} at {views} views, {way}.")
    except Exception as error:  # upstream code raises what it likes
        sheet.fail(f"{name} at {views} views, {way}: {told(error)}")
    finally:
        gc.collect()
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    return None


def _forward(model: nn.Module, images: torch.Tensor, options: Options) -> float:
    """Seconds of one forward, under the autocast that upstream runs in."""
    finish(options.device)
    started = time.perf_counter()
    with torch.autocast(options.device.type, torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(images)
    finish(options.device)
    return time.perf_counter() - started


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> float | None:
    """Most memory allocated, GiB, weights included."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
