"""The attention every site calls while patched: token layout, budgets, block lists, backend."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hess_plugin_cuda

from . import sparsity
from .block_order import BLOCK_ORDERS
from .exceptions import PatchError
from .interception import SDPA
from .report import Tally
from .sites import Site, TokenLayout

ALLOCATIONS = ("uniform", "equal", "hess", "reverse", "uncapped", "random")
_ANY_KERNEL = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True)
class Settings:
    """How much to keep and how to divide it; checked when made.

    Attributes:
        sparsity: dropped share of patch-block pairs of every layer, 0 to below 1; or None.
        sparse_ratio: rho of SparseVGGT, the share of key blocks a row may drop; or None.
        cdf_threshold: tau of SparseVGGT, the attention mass a row keeps; or None.
        allocation: ``uniform`` (the rule's own counts), ``equal`` (same total, the same budget for every
            head), ``hess`` (budgets by score), and the checks of the method: ``reverse`` (inverted ranking),
            ``uncapped`` (surplus over a full head is lost), ``random`` (scores shuffled among heads).
        selector: the rule that fills a budget.
        backend: the code that computes attention over block lists.
        block_q: patch queries in a block.
        block_k: patch keys in a block.
        minimum: key blocks every row keeps at least.
        seed: of the ``random`` allocation.
        block_order: order in which the patches of a frame fill blocks, a name of `BLOCK_ORDERS`.
    """

    sparsity: float | None
    sparse_ratio: float | None
    cdf_threshold: float | None
    allocation: str
    selector: str = "mass"
    backend: str = "auto"
    block_q: int = 128
    block_k: int = 64
    minimum: int = 2
    seed: int = 0
    block_order: str = "raster"

    def __post_init__(self) -> None:
        rule = self.sparse_ratio is not None or self.cdf_threshold is not None
        if (self.sparsity is None) == (not rule):
            raise PatchError(
                f"sparsity={self.sparsity}, sparse_ratio={self.sparse_ratio}, cdf_threshold={self.cdf_threshold}: give "
                "either a sparsity, or sparse_ratio and/or cdf_threshold."
            )
        for name in ("sparsity", "sparse_ratio"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise PatchError(f"{name} is {value}, wanted a number from 0 (dense) to below 1.")
        if self.cdf_threshold is not None and not 0.0 <= self.cdf_threshold <= 1.0:
            raise PatchError(f"cdf_threshold is {self.cdf_threshold}, wanted a number from 0 to 1.")
        if self.allocation not in ALLOCATIONS:
            raise PatchError(f"allocation is {self.allocation!r}, wanted one of {', '.join(ALLOCATIONS)}.")
        if self.block_order not in BLOCK_ORDERS:
            raise PatchError(f"block_order is {self.block_order!r}, wanted one of {', '.join(BLOCK_ORDERS)}.")
        if self.selector not in sparsity.SELECTORS:
            raise PatchError(f"selector is {self.selector!r}, wanted one of {', '.join(sparsity.SELECTORS)}.")
        for name in ("block_q", "block_k", "minimum"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise PatchError(f"{name} is {getattr(self, name)}, wanted a whole number of at least 1.")

    @property
    def keeps_all(self) -> bool:
        """Whether the rule drops nothing, whatever the input."""
        return self.sparsity == 0.0 or self.sparse_ratio == 0.0 or (self.cdf_threshold or 0.0) >= 1.0


@dataclass(frozen=True)
class Plan:
    """Everything about one token layout that does not depend on values; made once, from Python integers.

    Attributes:
        layout: the token layout.
        rows: patch query blocks T_q.
        columns: patch key blocks T_k.
        special_columns: special key blocks, always kept.
        dense: whether every block is kept.
        budgets: kept pairs of every head ``[H]`` int64 on the device of the last call when the settings alone decide
            them, else None.
        kept: sum of `budgets`.
        order: token index ``[tokens]`` that puts patches first, on the device of the last call.
        inverse: the index that undoes `order`.
    """

    layout: TokenLayout
    rows: int
    columns: int
    special_columns: int
    dense: bool
    budgets: Tensor | None
    kept: int
    order: Tensor
    inverse: Tensor

    @property
    def pairs(self) -> int:
        """Patch-block pairs of one head."""
        return self.rows * self.columns


class Layouts:
    """Token layouts seen by the forwards of one patched model, by sequence length.

    The length is what an attention call can know of its forward. A call recomputed by gradient checkpointing
    runs after its forward has returned, perhaps after another forward of another shape, and still finds its own.
    """

    def __init__(self) -> None:
        self._by_tokens: dict[int, TokenLayout] = {}

    def see(self, layout: TokenLayout) -> None:
        """Note the layout of the forward that starts."""
        self._by_tokens[layout.tokens] = layout

    def of(self, tokens: int, site: str) -> TokenLayout:
        """Find the layout of a sequence.

        Raises:
            PatchError: no forward of this length was announced.
        """
        layout = self._by_tokens.get(tokens)
        if layout is None:
            known = ", ".join(str(n) for n in sorted(self._by_tokens)) or "none"
            raise PatchError(
                f"{site} got a sequence of {tokens} tokens, but the model's inputs announced {known}; "
                "call the model on images (or its adapter's layout module), or check the adapter's hess_token_layout."
            )
        return layout


class SiteAttention:
    """The attention of one site: dense by rule, or over block lists chosen within each head's budget."""

    def __init__(self, site: Site, settings: Settings, scores: Tensor | None, layouts: Layouts, index: int) -> None:
        self.site = site
        self.settings = settings
        self.layouts = layouts
        self.tally = Tally(site)
        self._plans: dict[tuple[TokenLayout, torch.device], Plan] = {}
        self._weights: Tensor | None = None
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
        started = self.tally.start(query.device)
        if plan.dense:
            # The module's own call, argument for argument: bit for bit what the unpatched model computes.
            output = SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            self.tally.dense(query.shape[0] * plan.pairs, query.shape[0] * plan.rows * plan.special_columns)
        else:
            self._check_plain(query, key, attn_mask, dropout_p, is_causal, enable_gqa)
            output = self._sparse(plan, query, key, value, scale)
        self.tally.stop(started)
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
            # Cached tensors must not be born as inference tensors: a later training step could not save them.
            with torch.inference_mode(False), torch.no_grad():
                plan = self._plans[key] = self._make_plan(layout, query.device)
        return plan

    def _make_plan(self, layout: TokenLayout, device: torch.device) -> Plan:
        settings, heads = self.settings, self.site.num_heads
        rows = math.ceil(layout.patch_tokens / settings.block_q)
        columns = math.ceil(layout.patch_tokens / settings.block_k)
        dense, budgets = settings.keeps_all or columns <= settings.minimum, None
        if settings.sparsity is not None and not dense:
            total = sparsity.target_total(settings.sparsity, heads, rows, columns, minimum=settings.minimum)
            dense = total == heads * rows * columns
            weights = torch.ones(heads, dtype=torch.float64) if self._weights is None else self._weights
            budgets = self._allocate(total, weights, rows, columns)
        order = self._order(layout)
        return Plan(
            layout=layout,
            rows=rows,
            columns=columns,
            special_columns=math.ceil(layout.special_tokens / settings.block_k),
            dense=dense,
            budgets=None if budgets is None else budgets.to(device),
            kept=0 if budgets is None else int(budgets.sum()),
            order=order.to(device),
            inverse=torch.argsort(order).to(device),
        )

    def _order(self, layout: TokenLayout) -> Tensor:
        """Token index that puts patches first, in the block order of the settings."""
        if layout.grid is None and self.settings.block_order != "raster":
            raise PatchError(
                f"block_order {self.settings.block_order!r} needs the patch grid and the adapter's token layout of "
                f"{self.site.name} has none; use block_order='raster'."
            )
        if layout.grid is None:
            return layout.patches_first()
        return layout.patches_first(BLOCK_ORDERS[self.settings.block_order](*layout.grid, self.settings.block_k))

    def _allocate(self, total: int | Tensor, weights: Tensor, rows: int, columns: int) -> Tensor:
        return sparsity.allocate(
            total,
            weights,
            rows=rows,
            columns=columns,
            minimum=self.settings.minimum,
            capped=self.settings.allocation != "uncapped",
        )

    def _sparse(self, plan: Plan, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        device_type = query.device.type
        dtype = value.dtype
        if torch.is_autocast_enabled(device_type):
            # What autocast does to scaled_dot_product_attention: VGGT leaves q and k in float32 beside a bfloat16 v.
            dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            q, k, v = (t.to(dtype).index_select(2, plan.order) for t in (query, key, value))
            lists = self._select(plan, q.detach(), k.detach(), scale)
            # Pi3 pins SDPA to kernels that the backend's own dense calls may not find: open the choice again.
            with sdpa_kernel(_ANY_KERNEL):
                output = hess_plugin_cuda.block_sparse_attention(
                    q, k, v, lists, scale=scale, backend=self.settings.backend
                )
        return output.index_select(2, plan.inverse)

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
                if self._weights is not None:
                    budgets = self._allocate(counts.sum((1, 2)), self._weights.to(q.device), plan.rows, plan.columns)
            if budgets is None:
                assert counts is not None
                lists, kept = select(pooled, counts=counts), counts.sum((0, 2))
            else:
                lists, kept = select(pooled, budgets=budgets, total=total), budgets.sum(0)
            self.tally.sparse(kept, batch * plan.pairs, batch * plan.rows * plan.special_columns)
        return lists
