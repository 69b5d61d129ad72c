"""Section "tuning": other tiles, warps, stages and orders of work for the kernels than those they have."""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hess_plugin_cuda import BlockLists

from .checks import told
from .clock import Clock
from .options import BLOCK_K, BLOCK_Q, WIDTH, Options
from .problems import Size, make_lists, make_tokens, token_pairs
from .sheet import Sheet

LAUNCHERS = {"cuda_sm90": "hess_plugin_cuda.sm90.launch", "triton": "hess_plugin_cuda.triton.launch"}
_AS_IT_IS = "as it is"


def tune(options: Options, sheet: Sheet) -> None:
    """Time the forward kernels as they are, in other orders of work, and Triton's in other configurations."""
    size = Size.of(options, 1 if options.quick else 50, 1 if options.quick else 16)
    tokens = make_tokens(size, options.device, options.half)
    lists = make_lists(size, 0.25, options.device, spread="ragged")
    flops = 4.0 * WIDTH * token_pairs(lists, size.tokens, size.tokens)
    clock = Clock(options.device, quick=options.quick)
    for backend, place in LAUNCHERS.items():
        refusal = "it was found to be wrong" if backend in options.skip else options.refusal(backend)
        if refusal is not None:
            sheet.note(f"{backend} was not tuned: {refusal}.")
            continue
        launch = importlib.import_module(place)
        times: dict[str, float] = {}
        for name, change in _changes(backend, launch, options):
            if options.left < 12:
                sheet.note(f"not tried, for want of time: {backend}, {name}.")
                continue
            ms = _time(f"{backend}, {name}", launch, change, tokens, lists, clock, sheet)
            if ms is not None:
                times[name] = ms
                sheet.row("tuning", backend=backend, change=name, ms=ms, tflops=flops / ms / 1e9)
        if _AS_IT_IS in times:
            best = min(times, key=lambda name: times[name])
            sheet.note(f"{backend} as it is takes {times[_AS_IT_IS]:.3g} ms; the best, {best}, {times[best]:.3g} ms.")


def _changes(backend: str, launch: Any, options: Options) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of what to try, and what to put in the launcher's place for it."""
    yield _AS_IT_IS, {}
    if not options.quick:
        yield "order of work: as in memory", {"work_order": _as_in_memory}
        yield "order of work: longest first over all heads", {"work_order": _longest_first}
    if backend == "triton":
        yield from _configurations(options)


def _configurations(options: Options) -> Iterator[tuple[str, dict[str, Any]]]:
    from hess_plugin_cuda.triton.configurations import Configuration

    shapes = ((BLOCK_K, 1), (BLOCK_K, 2), (BLOCK_K // 2, 2))
    tried = [
        Configuration(*shape, warps, stages) for shape, warps, stages in itertools.product(shapes, (8, 4), (3, 2, 4))
    ]
    limited = [(8, 3, 128), (8, 2, 128), (8, 4, 128), (8, 3, 168), (4, 3, 224), (4, 2, 224)]
    tried[1:1] = [Configuration(BLOCK_K, 1, warps, stages, {"maxnreg": most}) for warps, stages, most in limited]
    for one in tried[:1] if options.quick else tried:
        name = f"{BLOCK_Q} x ({one.group} x {one.step}), {one.warps} warps, {one.stages} stages"
        name += "".join(f", {key} {value}" for key, value in one.options.items())
        yield name, {"forward_configuration": lambda *about, one=one: one}


def _as_in_memory(lists: BlockLists, special: int, heads: object = None) -> Tensor:
    work = lists.batch * lists.heads * (lists.query_blocks + special)
    return torch.arange(work, dtype=torch.int32, device=lists.device)


def _longest_first(lists: BlockLists, special: int, heads: object = None) -> Tensor:
    cost = lists.counts()
    extra = cost.new_full((*cost.shape[:2], special), lists.key_blocks + 1)
    return torch.cat([cost, extra], -1).flatten().argsort(descending=True).to(torch.int32)


def _time(
    name: str,
    launch: Any,
    change: dict[str, Callable[..., Any]],
    tokens: tuple[Tensor, Tensor, Tensor],
    lists: BlockLists,
    clock: Clock,
    sheet: Sheet,
) -> float | None:
    """Milliseconds with a change, which must not change the result; None, and a note, where that fails."""
    q, k, v = tokens
    try:
        with torch.inference_mode():
            usual, _ = launch.forward(q, k, v, lists, WIDTH**-0.5, None)
            with mock.patch.multiple(launch, **change) if change else contextlib.nullcontext():
                out, _ = launch.forward(q, k, v, lists, WIDTH**-0.5, None)
                if not bool(((out - usual).abs() <= 0.02).all()):
                    sheet.note(f"{name}: the result is another.")
                    return None
                return clock(lambda: launch.forward(q, k, v, lists, WIDTH**-0.5, None)).ms
    except Exception as error:  # a configuration may need more registers or shared memory than there are
        sheet.note(f"{name}: {told(error)}")
        return None
