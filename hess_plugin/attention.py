"""The attention every site calls while patched: dense by rule, else block lists and a backend."""

from __future__ import annotations

import functools
import logging
import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hess_plugin_cuda

from . import sparsity
from .exceptions import PatchError
from .interception import SDPA
from .model_budgets import LayerBudgets
from .output_metric import OutputMetric
from .place import Place
from .plans import Layouts, Plan, allocate, make_plan
from .report import Tally
from .settings import Settings
from .sites import Site, TokenLayout
from .uncompiled import has_values, is_traced

GROUP = 2**23
"""Numbers of q in a group of heads that a lean patch works on at once."""

_log = logging.getLogger(__name__)
_TOLD_SHORTFALL = 0.02
ANY_KERNEL = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class _Ordered(NamedTuple):
    """Queries, keys and values `[B, H, N, d]` of a call, from which copies in block order are made as needed."""

    query: Tensor
    key: Tensor
    value: Tensor
    dtype: torch.dtype
    order: Tensor

    def heads(self, name: str, some: slice) -> Tensor:
        """Some heads of one of them."""
        tensor: Tensor = getattr(self, name)
        return tensor[:, some].to(self.dtype).index_select(2, self.order)

    def all(self, some: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Some heads of all three."""
        return self.heads("query", some), self.heads("key", some), self.heads("value", some)


class SiteAttention:
    """The attention of one site: dense by rule, or over block lists chosen within each head's budget."""

    def __init__(
        self,
        site: Site,
        settings: Settings,
        scores: Tensor | None,
        layouts: Layouts,
        index: int,
        place: Place | None = None,
        layered: LayerBudgets | None = None,
    ) -> None:
        # Its module holds this object: a strong reference back would keep dropped models, and originals of copies.
        self.site = replace(site, module=cast(nn.Module, weakref.proxy(site.module)))
        self.settings = settings
        self.place = place
        self.layered = layered
        self.layouts = layouts
        self.tally = Tally(site)
        self._plans: dict[tuple[TokenLayout, torch.device, bool], Plan] = {}
        self._weights: Tensor | None = None
        self._metric = OutputMetric(self.site)
        self._first = index == 0  # tells for all sites
        if settings.allocation not in ("uniform", "harm"):
            even = torch.tensor([1.0] * site.num_heads, dtype=torch.float64, device="cpu")  # whatever context this is
            seed = settings.seed * 1009 + index  # every site shuffles differently
            self._weights = sparsity.head_weights(even if scores is None else scores, settings.allocation, seed=seed)

    def __call__(
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
        """Answer one ``scaled_dot_product_attention`` call on q, k, v ``[B, H, N, d]``.

        Raises:
            PatchError: the call is masked, causal, grouped, has dropout, is not over the announced tokens, or is being
                traced.
        """
        if is_traced():
            raise PatchError(
                f"{self.site.name} chooses blocks by the values of its input, which a trace or an export would freeze; "
                "call remove() on the model's patch and export it without."
            )
        if not has_values(query):  # only the shape is asked for; nothing of it may be kept for later calls
            return SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        plan = self._plan(query)
        if not plan.dense:
            self._check_plain(query, key, attn_mask, dropout_p, is_causal, enable_gqa)
        started = self.tally.start(query.device)
        if plan.dense:
            # The module's own call, argument for argument: bit for bit what the unpatched model computes.
            output = SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            self.tally.dense(query.shape[0] * plan.pairs, query.shape[0] * plan.rows * plan.special_columns)
        else:
            output = self._sparse(plan, query, key, value, scale)
        self.tally.stop(started, query.device)
        return output

    def _check_plain(
        self, query: Tensor, key: Tensor, mask: Tensor | None, dropout: float, causal: bool, grouped: bool
    ) -> None:
        asked = [
            n for n, on in (("attn_mask", mask is not None), ("dropout", dropout > 0), ("is_causal", causal)) if on
        ]
        if asked or grouped or query.shape != key.shape or query.shape[1] != self.site.num_heads:
            raise PatchError(
                f"{self.site.name} called attention with {', '.join(asked) or 'unusual shapes'} (query "
                f"{list(query.shape)}, key {list(key.shape)}), wanted plain self-attention of "
                f"{self.site.num_heads} heads over all tokens; sparsity 0 passes such calls through unchanged."
            )

    def _plan(self, query: Tensor) -> Plan:
        layout = self.layouts.of(query.shape[-2], self.site.name)
        key = (layout, query.device, torch.is_autocast_enabled(query.device.type))
        plan = self._plans.get(key)
        if plan is None:
            settings = self.settings if self.place is None else self.place.settle(self.site, query.device)
            plan = make_plan(layout, settings, self._weights, self.site.num_heads, query.device, self.layered)
            self._plans[key] = plan
            if self._first:
                self._tell_shortfall(plan, settings)
        return plan

    def _tell_shortfall(self, plan: Plan, settings: Settings) -> None:
        """Say once a layout when the input has too few blocks for the sparsity asked for."""
        cap = self.site.num_heads * plan.pairs
        if plan.layout.patch_tokens < settings.dense_below:
            return  # dense because it is asked for
        reached = 0.0 if plan.dense and not plan.spared else 1.0 - (plan.kept - plan.spared) / cap
        if plan.model_sparsity is not None:  # single layers are to differ from what was asked for
            reached = plan.model_sparsity
        asked = None if settings.allocation == "uncapped" else settings.sparsity  # uncapped loses surplus by design
        if asked is not None and abs(asked - reached) > _TOLD_SHORTFALL:
            _log.warning(
                "sparsity %g asked for, %.2f reached: %d patch tokens are %d x %d blocks of %d x %d, every row keeps "
                "%d; give smaller block_q and block_k, or more views",
                asked, reached, plan.layout.patch_tokens, plan.rows, plan.columns, settings.block_q,
                settings.block_k, settings.minimum,
            )  # fmt: skip

    def _sparse(self, plan: Plan, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        device_type = query.device.type
        dtype = value.dtype
        if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
            # What autocast does to scaled_dot_product_attention: VGGT leaves q and k in float32 beside a bfloat16 v.
            dtype = torch.get_autocast_dtype(device_type)
        groups = self._groups(query)
        # Pi3 pins SDPA to kernels that the backend's own dense calls may not find: open the choice again.
        with torch.autocast(device_type, enabled=False), sdpa_kernel(ANY_KERNEL):
            order, inverse = self.layouts.order(plan.layout, query.device)
            ordered = _Ordered(query, key, value, dtype, order)
            if len(groups) > 1:
                return self._by_groups(plan, ordered, groups, scale)
            q, k, v = ordered.all(groups[0])
            pooled = self._pool(plan, q, k, scale)
            amounts = self._amounts(plan, groups, [pooled], len(q))
            return self._attend(q, k, v, pooled, amounts[0], groups[0], scale).index_select(2, inverse)

    def _groups(self, query: Tensor) -> list[slice]:
        """Heads to work on together: all of them, or few enough to copy in little memory."""
        heads = query.shape[1]
        # Autograd keeps what a call reads, so that groups would save nothing.
        if self.settings.memory == "plain" or torch.is_grad_enabled():
            return [slice(0, heads)]
        count = math.ceil(heads / max(1, GROUP * heads // query.numel()))
        return [slice(heads * i // count, heads * (i + 1) // count) for i in range(count)]

    def _by_groups(self, plan: Plan, ordered: _Ordered, groups: list[slice], scale: float | None) -> Tensor:
        """Work on groups of heads one after the other: copies in block order exist of one group at a time."""
        batch, heads, tokens, width = ordered.query.shape
        # The heads of a token lie side by side: to join them is what every module does next, without a copy then.
        output = ordered.query.new_empty((batch, tokens, heads, width), dtype=ordered.dtype).transpose(1, 2)
        pooled: list[sparsity.PooledTokens] | None = None
        if plan.budgets is None:  # what a head gets depends on the values in all heads
            pooled = [
                self._pool(plan, ordered.heads("query", some), ordered.heads("key", some), scale) for some in groups
            ]
        amounts = self._amounts(plan, groups, pooled, batch)
        for index, some in enumerate(groups):
            q, k, v = ordered.all(some)
            own = self._pool(plan, q, k, scale) if pooled is None else pooled[index]
            output[:, some].index_copy_(2, ordered.order, self._attend(q, k, v, own, amounts[index], some, scale))
        return output

    @torch.no_grad()
    def _pool(self, plan: Plan, q: Tensor, k: Tensor, scale: float | None) -> sparsity.PooledTokens:
        patches, settings = plan.layout.patch_tokens, self.settings
        return sparsity.pool(
            q[:, :, :patches],
            k[:, :, :patches],
            settings.block_q,
            settings.block_k,
            scale=scale,
            pool_q=settings.pool_q,
            pool_k=settings.pool_k,
            special=k[:, :, patches:],
        )

    def _pool_values(self, k: Tensor, v: Tensor, patches: int, some: slice) -> sparsity.PooledValues:
        """Values of some heads in the metric of what the layer makes of them."""
        root = self._metric.root(v.device)
        own = None if root is None else root[some]
        return sparsity.pool_values(k, v, patches, self.settings.block_k, pool_k=self.settings.pool_k, root=own)

    @torch.no_grad()
    def _amounts(
        self, plan: Plan, groups: list[slice], pooled: list[sparsity.PooledTokens] | None, batch: int
    ) -> list[dict[str, Any]]:
        """How much each group of heads keeps, as its selector wants it; counted for the report.

        Args:
            plan: of the call.
            groups: of heads.
            pooled: tokens of every group; may be None where the plan has budgets.
            batch: items B.
        """
        if plan.budgets is not None:
            # The settings alone decide the totals: Python integers, so that nothing waits for the device.
            self._count(plan, [batch * kept for kept in plan.head_budgets], batch)
            budgets = plan.budgets.expand(batch, -1)
            return [{"budgets": budgets[:, some], "head_totals": plan.head_budgets[some]} for some in groups]
        assert pooled is not None
        rule = self.settings.sparse_ratio, self.settings.cdf_threshold, self.settings.minimum
        counts = torch.cat([sparsity.pooled_uniform_counts(part, *rule) for part in pooled], 1)
        if plan.weights is None:
            self._count(plan, counts.sum((0, 2)), batch)
            return [{"counts": counts[:, some]} for some in groups]
        budgets = allocate(counts.sum((1, 2)), plan.weights, self.settings, plan.rows, plan.columns)
        self._count(plan, budgets.sum(0), batch)
        return [{"budgets": budgets[:, some]} for some in groups]

    def _count(self, plan: Plan, kept: Tensor | Sequence[int], batch: int) -> None:
        self.tally.sparse(kept, batch * plan.pairs, batch * plan.rows * plan.special_columns)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pooled: sparsity.PooledTokens,
        amounts: dict[str, Any],
        some: slice,
        scale: float | None,
    ) -> Tensor:
        """Choose the kept blocks of some heads, through which no gradient flows, and attend to them."""
        values = functools.partial(self._pool_values, k, v, pooled.key_tokens, some)
        lists = sparsity.SELECTORS[self.settings.selector](pooled, values=values, **amounts)
        return hess_plugin_cuda.block_sparse_attention(q, k, v, lists, scale=scale, backend=self.settings.backend)
