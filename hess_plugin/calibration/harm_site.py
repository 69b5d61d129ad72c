"""The attention of one site while harm is measured: gradients by its output, and what leaving out blocks changes."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

import hess_plugin_cuda
from hess_plugin import sparsity
from hess_plugin.attention import ANY_KERNEL
from hess_plugin.exceptions import CalibrationError, PatchError
from hess_plugin.interception import SDPA
from hess_plugin.output_metric import OutputMetric
from hess_plugin.sites import Site
from hess_plugin.uncompiled import has_values

from .harm import HarmSettings

if TYPE_CHECKING:
    from .harm_meter import HarmMeter

GROUP = 2**23
"""Numbers of q in a group of heads that is worked on at once."""


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    patches: int,
    count: int,
    settings: HarmSettings,
    scale: float | None,
    root: Tensor | None,
) -> hess_plugin_cuda.BlockLists:
    """Choose the blocks that every row keeps, as a patch with equal budgets would.

    Args:
        q: queries ``[B, H, N, d]``, patches first, in block order.
        k: keys, likewise.
        v: values, likewise.
        patches: patch tokens.
        count: key blocks a row.
        settings: block sizes, pooling and selector.
        scale: of the attention.
        root: of the metric in which selectors compare outputs, ``[H, d, r]``; see `OutputMetric`.
    """
    rows = math.ceil(patches / settings.block_q)
    budgets = torch.full(q.shape[:2], rows * count, dtype=torch.int64, device=q.device)
    return sparsity.select(
        q,
        k,
        v,
        block_q=settings.block_q,
        block_k=settings.block_k,
        budgets=budgets,
        scale=scale,
        selector=settings.selector,
        head_totals=[rows * count] * q.shape[1],
        pool_q=settings.pool_q,
        pool_k=settings.pool_k,
        root=root,
        patches=patches,
    )


class SiteMeter:
    """The attention of one site while harm is measured: always the module's own, watched."""

    def __init__(self, site: Site, meter: HarmMeter) -> None:
        self._site, self._meter, self._output = site, meter, OutputMetric(site)
        self._metrics: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}
        self._roots: dict[str, tuple[Tensor, float]] = {}
        self._sums: dict[str, Tensor] = {}
        self._tokens = 0

    def begin(self, error: str) -> None:
        """Forget an error's gradients."""
        width = self._site.head_dim
        self._metrics[error] = torch.zeros(self._site.num_heads, width, width, dtype=torch.float64)
        self._rows[error] = 0

    def output_trace(self, error: str) -> Tensor:
        """Sum of squares of an error's gradients of each head: ``[H]``."""
        return self._metrics[error].diagonal(dim1=-2, dim2=-1).sum(-1).cpu()

    def settle(self, errors: Sequence[str]) -> None:
        """Make roots of the metrics: R with R R' = G, so that no harm is ever rounded to below zero.

        Raises:
            CalibrationError: a gradient is not finite.
        """
        for error in errors:
            metric = self._metrics[error].cpu() / max(1, self._rows[error])
            if not bool(torch.isfinite(metric).all()):
                raise CalibrationError(
                    f"the gradient by the attention of {self._site.name} is not finite; calibrate in float32, or "
                    "bfloat16 not float16."
                )
            values, vectors = torch.linalg.eigh(metric)
            root = vectors * values.clamp(min=0.0).sqrt().unsqueeze(-2)
            # Brought to order one: the products are of lower precision, whose range is small.
            size = float(root.abs().max()) or 1.0
            self._roots[error] = root / size, size

    def forget(self) -> None:
        """Let go of everything of one scene."""
        for held in (self._metrics, self._rows, self._roots, self._sums):
            held.clear()
        self._tokens = 0

    def curve(self, error: str, points: int, measured: bool) -> Tensor:
        """Harm ``[H, K]``: NaN where it was not measured, 0 where no gradient came or the site was not called.

        Raises:
            CalibrationError: it is not finite.
        """
        shape = (self._site.num_heads, points)
        if not measured:
            return torch.full(shape, torch.nan, dtype=torch.float64)
        if error not in self._sums:
            return torch.zeros(shape, dtype=torch.float64)
        curve = self._sums[error].cpu() / self._tokens
        if not bool(torch.isfinite(curve).all()):
            raise CalibrationError(
                f"a harm curve of {self._site.name} is not finite; calibrate in float32, or bfloat16 not float16."
            )
        return curve

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Answer the site's attention call as its module would have."""
        output = SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        plain = attn_mask is None and dropout_p == 0.0 and not is_causal and not enable_gqa
        if not plain or query.shape != key.shape or query.shape[1] != self._site.num_heads:
            raise PatchError(
                f"{self._site.name} called attention in another way than plain self-attention of "
                f"{self._site.num_heads} heads, of which no blocks can be left out; calibrate without harm curves."
            )
        layout = self._meter.layouts.of(query.shape[-2], self._site.name)
        order, _ = self._meter.layouts.order(layout, query.device)
        if self._meter.counts is not None:
            self._measure(query, key, value, output, order, layout.patch_tokens, scale)
        elif output.requires_grad:
            # Recomputed forwards of gradient checkpointing come here, too; no gradient reaches what they return.
            output.register_hook(functools.partial(self._collect, patches=order[: layout.patch_tokens]))
        return output

    def _collect(self, gradient: Tensor, *, patches: Tensor) -> None:
        """Add up g g' over patch tokens, one head at a time."""
        error = self._meter.error
        if error is None:
            return
        with torch.no_grad():
            self._metrics[error] = self._metrics[error].to(gradient.device)
            for head in range(gradient.shape[1]):
                rows = gradient[:, head].index_select(1, patches).flatten(0, 1).double()
                self._metrics[error][head] += rows.mT @ rows
        self._rows[error] += gradient.shape[0] * len(patches)

    def _measure(
        self, query: Tensor, key: Tensor, value: Tensor, dense: Tensor, order: Tensor, patches: int, scale: float | None
    ) -> None:
        """Add up the harm of every share, over some heads at a time."""
        settings, kind = self._meter.settings, query.device.type
        columns = math.ceil(patches / settings.block_k)
        counts = self._meter.kept(columns, self._site.name)
        if not counts or not self._roots:
            return
        self._tokens += query.shape[0] * patches
        dtype = value.dtype
        if torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)  # see SiteAttention
        heads = query.shape[1]
        step = max(1, GROUP * heads // query.numel())
        with torch.autocast(kind, enabled=False), sdpa_kernel(ANY_KERNEL):
            for start in range(0, heads, step):
                some = slice(start, start + step)
                q, k, v = (x[:, some].to(dtype).index_select(2, order) for x in (query, key, value))
                kept = _precise(dense[:, some].index_select(2, order[:patches]))
                found: dict[int, Mapping[str, Tensor]] = {}
                for index, count in enumerate(counts):
                    if count < columns:  # else nothing is left out
                        if count not in found:
                            sparse = self._sparse(q, k, v, patches, count, some, scale)[:, :, :patches]
                            found[count] = self._harm(_precise(sparse) - kept, some)
                        self._add(some, index, found[count])

    def _sparse(
        self, q: Tensor, k: Tensor, v: Tensor, patches: int, count: int, some: slice, scale: float | None
    ) -> Tensor:
        """Attention of some heads, every row keeping so many blocks."""
        settings = self._meter.settings
        if not has_values(q):  # a rehearsal: as much work, of blocks that nobody can choose
            keys = count * settings.block_k
            return SDPA(q, k[:, :, :keys], v[:, :, :keys], scale=scale)
        root = self._output.root(v.device)
        own = None if root is None else root[some]
        lists = choose(q, k, v, patches=patches, count=count, settings=settings, scale=scale, root=own)
        return hess_plugin_cuda.block_sparse_attention(q, k, v, lists, scale=scale)

    def _harm(self, change: Tensor, some: slice) -> dict[str, Tensor]:
        """Sums over patch tokens of do' G do by error, float64 ``[h]``, for a change ``[B, h, T, d]`` of some heads."""
        found = {}
        for error, (root, size) in self._roots.items():
            moved = change @ root[some].to(change)
            found[error] = moved.square().sum(-1).double().sum((0, 2)) * size**2
        return found

    def _add(self, some: slice, index: int, sums: Mapping[str, Tensor]) -> None:
        for error, part in sums.items():
            if error not in self._sums:
                shape = (self._site.num_heads, len(self._meter.settings.shares))
                self._sums[error] = torch.zeros(shape, dtype=torch.float64, device=part.device)
            self._sums[error][some, index] += part


def _precise(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
