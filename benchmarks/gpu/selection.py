"""Section "selection": choosing the kept blocks, whole and in parts, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hess_plugin import sparsity
from hess_plugin_cuda import block_sparse_attention

from .checks import told
from .clock import Clock
from .kernels import _clean, _gib, _timed
from .options import BLOCK_K, BLOCK_Q, Options
from .problems import Size, head_shares
from .sheet import Sheet

HEADS = {10: 16, 50: 16, 100: 16, 300: 16, 1000: 16}
_SHARE = 0.1
_BLOCKS = {"block_q": BLOCK_Q, "block_k": BLOCK_K}


def time_selection(options: Options, sheet: Sheet) -> None:
    """Time the selection at 10 % kept, ragged over the heads, and with the attention that it feeds."""
    clock = Clock(options.device, quick=options.quick)
    for views in options.views or ((2,) if options.quick else tuple(HEADS)):
        size = Size.of(options, views, 2 if options.quick else 16)
        try:
            _time_views(size, clock, options, sheet)
        except torch.OutOfMemoryError as error:
            sheet.note(f"selection at {views} views: {told(error)}")
        _clean()


def _time_views(size: Size, clock: Clock, options: Options, sheet: Sheet) -> None:
    q, k = (_tokens(size, options, seed) for seed in (1, 2))
    rows, columns = size.grid
    budgets = torch.tensor(head_shares(size, _SHARE, "ragged"), dtype=torch.float64).mul(rows * columns).round().long()
    budgets = budgets.clamp(rows, rows * columns)
    total = int(budgets.sum())
    asked: dict[str, Any] = {"budgets": budgets[None].to(options.device), "head_totals": budgets.tolist()}
    patches = q[:, :, : size.patches], k[:, :, : size.patches]
    pooled = sparsity.pool(*patches, **_BLOCKS)
    calls: dict[str, Callable[[], object]] = {
        "pooling": lambda: sparsity.pool(*patches, **_BLOCKS),
        "choice": lambda: sparsity.SELECTORS["mass"](pooled, **asked),
        "whole": lambda: sparsity.select(*patches, **_BLOCKS, **asked),
        "counts of a CDF threshold": lambda: sparsity.pooled_uniform_counts(pooled, cdf_threshold=0.9),
    }
    few = size.views <= 100
    if few:
        v = _tokens(size, options, 3)
        calls["attention"] = lambda: block_sparse_attention(q, k, v, lists)
        calls["selection and attention"] = lambda: block_sparse_attention(
            q, k, v, sparsity.select(*patches, **_BLOCKS, **asked)
        )
    lists = sparsity.select(*patches, **_BLOCKS, **asked)
    for part, call in calls.items():
        time = _timed(f"selection, {part}, {size.views} views", call, clock, 0.2, options, sheet)
        if time is not None:
            sheet.row("selection times", views=size.views, heads=size.heads,
                      share=total / (size.heads * rows * columns), part=part, ms=time.ms, repeats=time.repeats,
                      peak_gib=_gib(time), lists_gib=lists.col.numel() * 4 / 2**30)  # fmt: skip
    if options.device.type == "cuda" and size.views == 100:
        _profile(calls["whole"], size, sheet)


def _tokens(size: Size, options: Options, seed: int) -> Tensor:
    """Random tokens `[1, H, N, d]`; those of a block share a centre, so that blocks differ as those of a model do."""
    generator = torch.Generator(options.device).manual_seed(seed)
    shape = (1, size.heads, size.tokens, 64)
    tokens = torch.randn(shape, generator=generator, device=options.device, dtype=options.half)
    blocks = -(-size.tokens // BLOCK_K)
    centres = torch.randn((1, size.heads, blocks, 64), generator=generator, device=options.device, dtype=options.half)
    for head in range(size.heads):  # head by head: 1000 views fill much memory
        tokens[:, head] += centres[:, head].repeat_interleave(BLOCK_K, 1)[:, : size.tokens]
    return tokens


def _profile(call: Callable[[], object], size: Size, sheet: Sheet) -> None:
    """The kernels of one selection, by time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        call()
        torch.cuda.synchronize()
    events = [event for event in found.key_averages() if event.self_device_time_total > 0]
    for event in sorted(events, key=lambda event: -event.self_device_time_total)[:12]:
        sheet.row("selection kernels", views=size.views, kernel=event.key[:80], calls=event.count,
                  ms=event.self_device_time_total / 1e3)  # fmt: skip
