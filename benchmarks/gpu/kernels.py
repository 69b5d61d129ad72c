"""Section "kernels": attention over lists against dense attention, at every size, kept share and kind of lists."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hess_plugin_cuda import BlockLists, block_sparse_attention
from hess_plugin_cuda.backends import get_backend

from .checks import told
from .clock import Clock, Time
from .machine import nvidia_smi
from .options import BLOCK_Q, WIDTH, Options
from .problems import Size, make_lists, make_tokens, token_pairs
from .sheet import Sheet

HEADS = {10: 16, 50: 16, 100: 16, 300: 8, 500: 4, 1000: 2}
ORDER = (100, 10, 50, 300, 1000, 500)
SHARES = (0.1, 0.25, 0.5, 0.05, 0.02, 1.0)
EXTRA = (("ragged", "random"), ("uniform", "clustered"), ("ragged", "clustered"))
_PINNED = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention 2": SDPBackend.FLASH_ATTENTION,
}


def time_kernels(options: Options, sheet: Sheet) -> None:
    """Time everything, the sizes that tell most first; what there is no time for is named."""
    clock = Clock(options.device, quick=options.quick)
    for views in options.views or ((2,) if options.quick else ORDER):
        size = Size.of(options, views, 2 if options.quick else HEADS.get(views, 16 if views < 200 else 4))
        q, k, v = make_tokens(size, options.device, options.half)
        best = _time_dense(size, (q, k, v), clock, options, sheet)
        if best is None:
            sheet.note(f"{views} views: no dense attention could be timed.")
            continue
        for share, spread, kind in _kinds(options, views):
            _time_lists(size, (q, k, v), share, spread, kind, best, clock, options, sheet)
        del q, k, v
        _clean()
        if options.device.type == "cuda":
            sheet.note(f"after {views} views: {nvidia_smi()}.")  # clocks under load


def _kinds(options: Options, views: int) -> Iterator[tuple[float, str, str]]:
    """Kept share, spread and kind of the lists of a size, those first whose figures are aimed at."""
    shares, more = SHARES, (0.25, 0.1) if views <= 100 else (0.1,)
    if options.quick:
        shares, more = (0.5, 1.0), (0.5,)
    for share in shares[:4] if views >= 500 else shares:
        yield share, "uniform", "random"
        if share in more:
            for spread, kind in EXTRA[:1] if views >= 500 else EXTRA:
                yield share, spread, kind


def _time_dense(
    size: Size, tokens: tuple[Tensor, Tensor, Tensor], clock: Clock, options: Options, sheet: Sheet
) -> float | None:
    """Milliseconds of the fastest dense attention."""
    q, k, v = tokens
    calls: dict[str, Callable[[], object]] = {}
    if size.views <= 100 or options.device.type != "cuda":  # beyond, the pinned ones tell
        calls["torch's choice"] = lambda: F.scaled_dot_product_attention(q, k, v)
    if options.device.type == "cuda":
        calls |= {name: lambda kernel=kernel: _pinned(kernel, q, k, v) for name, kernel in _PINNED.items()}
    times = {}
    for name, call in calls.items():
        time = _timed(f"dense, {name}, {size.views} views", call, clock, size.dense_flops / 2e14, options, sheet)
        if time is not None:
            times[name] = time.ms
            sheet.row("dense", views=size.views, heads=size.heads, kernel=name, ms=time.ms, repeats=time.repeats,
                      tflops=size.dense_flops / time.ms / 1e9, peak_gib=_gib(time))  # fmt: skip
    return min(times.values()) if times else None


def _pinned(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(q, k, v)


def _time_lists(
    size: Size,
    tokens: tuple[Tensor, Tensor, Tensor],
    share: float,
    spread: str,
    kind: str,
    best: float,
    clock: Clock,
    options: Options,
    sheet: Sheet,
) -> None:
    """Time every backend, and the public function, on lists of one kind."""
    lists = make_lists(size, share, options.device, spread=spread, kind=kind)
    kept = token_pairs(lists, size.tokens, size.tokens) / (size.heads * size.tokens**2)
    about = {"views": size.views, "heads": size.heads, "share": share, "spread": spread, "lists": kind, "kept": kept}
    for backend, call in _calls(size, tokens, lists, share, spread, kind, options):
        name = f"{backend}, {size.views} views, {share:g} kept, {spread}, {kind}"
        time = _timed(name, call, clock, best / 1e3 * kept * 2, options, sheet)
        if time is not None:
            sheet.row("attention", **about, backend=backend, ms=time.ms, least=time.least, repeats=time.repeats,
                      tflops=size.dense_flops * kept / time.ms / 1e9, r=time.ms / (kept * best),
                      of_dense=time.ms / best, peak_gib=_gib(time))  # fmt: skip
            if backend == "by dispatch" and size.views <= 50:
                whole = clock(call, host=True)  # what a caller waits who waits after every call
                sheet.row("calls", views=size.views, share=share, spread=spread, lists=kind, ms=whole.ms)
    if (spread, kind) == ("uniform", "random") and options.device.type == "cuda":
        order = _work_order(lists, size)
        time = _timed(f"work order, {size.views} views", order, clock, 0.01, options, sheet) if order else None
        if time is not None:
            sheet.row("work order", **about, ms=time.ms, repeats=time.repeats, peak_gib=_gib(time))


def _calls(
    size: Size,
    tokens: tuple[Tensor, Tensor, Tensor],
    lists: BlockLists,
    share: float,
    spread: str,
    kind: str,
    options: Options,
) -> Iterator[tuple[str, Callable[[], object]]]:
    q, k, v = tokens
    scale = WIDTH**-0.5
    for name in options.backends():
        few = name in ("flex", "gather") and options.device.type == "cuda"
        if few and (size.views not in (50, 100) or share not in (0.25, 0.1) or (spread, kind) != ("uniform", "random")):
            continue  # not what is aimed at: enough to see how far they are
        if name == "gather" and few and size.views != 50:
            continue
        backend = get_backend(name)
        yield name, lambda backend=backend: backend.forward(q, k, v, lists, scale, None)
    if size.views <= 100 or (size.views == 300 and share in (1.0, 0.1)):
        yield "by dispatch", lambda: block_sparse_attention(q, k, v, lists)


def _work_order(lists: BlockLists, size: Size) -> Callable[[], object] | None:
    try:
        from hess_plugin_cuda.schedule import work_order
    except ImportError:
        return None
    return lambda: work_order(lists, -(-size.special // BLOCK_Q), None)


def _timed(
    name: str, call: Callable[[], object], clock: Clock, guess: float, options: Options, sheet: Sheet
) -> Time | None:
    """Time a call, if there is time for it; what it raises is told and not passed on."""
    if guess * 5 > options.left - 3:
        sheet.note(f"not timed, for want of time: {name}.")
        return None
    try:
        with torch.inference_mode():
            return clock(call)
    except torch.OutOfMemoryError:
        sheet.note(f"out of memory: {name}.")
        _clean()
    except RuntimeError as error:
        if "No available kernel" in str(error):
            sheet.note(f"refused by torch: {name}.")
        else:
            sheet.fail(f"{name}: {told(error)}")
            if "CUDA error" in str(error):
                raise  # nothing works any more in this process
    return None


def _gib(time: Time) -> float | None:
    return None if time.peak is None else time.peak / 2**30


def _clean() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def rows_of(sheet: dict[str, Any], table: str) -> list[dict[str, Any]]:
    """Rows of a table of a finished sheet."""
    rows: list[dict[str, Any]] = sheet.get("tables", {}).get(table, [])
    return rows
