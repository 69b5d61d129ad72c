"""The attention every site calls while patched: dense by rule, else block lists and a backend."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hess_plugin_cuda

from . import sparsity
from .exceptions import PatchError
from .interception import SDPA
from .plans import Layouts, Plan, allocate, make_plan
from .report import Tally
from .settings import Settings
from .sites import Site, TokenLayout

_log = logging.getLogger(__name__)
_TOLD_SHORTFALL = 0.02
_ANY_KERNEL = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class SiteAttention:
    """The attention of one site: dense by rule, or over block lists chosen within each head's budget."""

    def __init__(self, site: Site, settings: Settings, scores: Tensor | None, layouts: Layouts, index: int) -> None:
        self.site = site
        self.settings = settings
        self.layouts = layouts
        self.tally = Tally(site)
        self._plans: dict[tuple[TokenLayout, torch.device], Plan] = {}
        self._weights: Tensor | None = None
        self._first = index == 0  # tells for all sites
        if settings.allocation != "uniform":
            even = torch.ones(site.num_heads, dtype=torch.float64)
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
            PatchError: the call is masked, causal, grouped, has dropout, or is not over the announced tokens.
        """
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
        key = (layout, query.device)
        plan = self._plans.get(key)
        if plan is None:
            plan = make_plan(layout, self.settings, self._weights, self.site.num_heads, query.device)
            self._plans[key] = plan
            if self._first:
                self._tell_shortfall(plan)
        return plan

    def _tell_shortfall(self, plan: Plan) -> None:
        """Say once a layout when the input has too few blocks for the sparsity asked for."""
        settings, cap = self.settings, self.site.num_heads * plan.pairs
        if plan.layout.patch_tokens < settings.dense_below:
            return  # dense because it is asked for
        reached = 0.0 if plan.dense else 1.0 - plan.kept / cap
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
        with torch.autocast(device_type, enabled=False):
            order, inverse = self.layouts.order(plan.layout, query.device)
            q, k, v = (t.to(dtype).index_select(2, order) for t in (query, key, value))
            lists = self._select(plan, q.detach(), k.detach(), scale)
            # Pi3 pins SDPA to kernels that the backend's own dense calls may not find: open the choice again.
            with sdpa_kernel(_ANY_KERNEL):
                output = hess_plugin_cuda.block_sparse_attention(
                    q, k, v, lists, scale=scale, backend=self.settings.backend
                )
        return output.index_select(2, inverse)

    def _select(self, plan: Plan, q: Tensor, k: Tensor, scale: float | None) -> hess_plugin_cuda.BlockLists:
        """Choose the kept blocks of one call and count them; no gradient flows through the choice."""
        settings, patches, batch = self.settings, plan.layout.patch_tokens, q.shape[0]
        with torch.no_grad():
            pooled = sparsity.pool(
                q[:, :, :patches], k[:, :, :patches], settings.block_q, settings.block_k, scale=scale
            )
            select = sparsity.SELECTORS[settings.selector]
            counts, budgets, total = None, plan.budgets, None
            if budgets is not None:
                # The settings alone decide the total: a Python integer, so that nothing waits for the device.
                budgets, total = budgets.expand(batch, -1), batch * plan.kept
            else:
                counts = sparsity.pooled_uniform_counts(
                    pooled, settings.sparse_ratio, settings.cdf_threshold, settings.minimum
                )
                if plan.weights is not None:
                    budgets = allocate(counts.sum((1, 2)), plan.weights, settings, plan.rows, plan.columns)
            if budgets is None:
                assert counts is not None
                lists, kept = select(pooled, counts=counts), counts.sum((0, 2))
            else:
                lists, kept = select(pooled, budgets=budgets, total=total), budgets.sum(0)
            self.tally.sparse(kept, batch * plan.pairs, batch * plan.rows * plan.special_columns)
        return lists
