"""What is known about a forward before its values: token layouts, and the plan each site makes of one."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from . import sparsity
from .block_order import BLOCK_ORDERS
from .exceptions import PatchError
from .model_budgets import LayerBudgets
from .settings import Settings
from .sites import TokenLayout

_KEPT_ORDERS = 8


class Layouts:
    """Token layouts seen by the forwards of one patched model, and the token orders made of them for all sites.

    Layouts are found by sequence length, which is what an attention call can know of its forward. A call recomputed
    by gradient checkpointing runs after its forward has returned, perhaps after another forward of another shape, and
    still finds its own. Of two layouts of one length (2 frames of 40 tokens and 4 of 20) the later one counts: that of
    the calling thread, or of any thread where this one announced none (autograd recomputes in threads of its own).
    """

    def __init__(self, block_order: str, block_k: int) -> None:
        self._block_order, self._block_k = block_order, block_k
        self._by_tokens: dict[int, TokenLayout] = {}
        self._own = threading.local()
        self._orders: OrderedDict[tuple[TokenLayout, torch.device], tuple[Tensor, Tensor]] = OrderedDict()

    def see(self, layout: TokenLayout) -> None:
        """Note the layout of the forward that starts."""
        self._by_tokens[layout.tokens] = layout
        self._of_thread()[layout.tokens] = layout

    def of(self, tokens: int, site: str) -> TokenLayout:
        """Find the layout of a sequence.

        Raises:
            PatchError: no forward of this length was announced.
        """
        layout = self._of_thread().get(tokens) or self._by_tokens.get(tokens)
        if layout is None:
            known = ", ".join(str(n) for n in sorted(self._by_tokens)) or "none"
            raise PatchError(
                f"{site} got a sequence of {tokens} tokens, but the model's inputs announced {known}; "
                "call the model on images (or its adapter's layout module), or check the adapter's hess_token_layout."
            )
        return layout

    def _of_thread(self) -> dict[int, TokenLayout]:
        if not hasattr(self._own, "by_tokens"):
            self._own.by_tokens = {}
        return self._own.by_tokens

    def order(self, layout: TokenLayout, device: torch.device) -> tuple[Tensor, Tensor]:
        """Token index ``[tokens]`` that puts patches first in block order, and the index that undoes it.

        Raises:
            PatchError: the block order needs a patch grid and the layout has none.
        """
        key = (layout, device)
        found = self._orders.get(key)
        if found is None:
            # Cached tensors must not be born as inference tensors: a later training step could not save them.
            with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
                order = layout.patches_first(self._within(layout))
                found = self._orders[key] = (order.to(device), order.argsort().to(device))
            if len(self._orders) > _KEPT_ORDERS:  # inputs of ever new shapes must not fill the memory
                self._orders.popitem(last=False)
        return found

    def _within(self, layout: TokenLayout) -> Tensor | None:
        if self._block_order == "raster":
            return None
        if layout.grid is None:
            raise PatchError(
                f"block_order {self._block_order!r} needs the patch grid, which the adapter's token layout does not "
                "tell; use block_order='raster'."
            )
        return BLOCK_ORDERS[self._block_order](*layout.grid, self._block_k)


@dataclass(frozen=True)
class Plan:
    """Everything about one token layout that does not depend on values; made once, from Python integers.

    Attributes:
        layout: the token layout.
        rows: patch query blocks T_q.
        columns: patch key blocks T_k.
        special_columns: special key blocks, always kept.
        dense: whether every block is kept.
        budgets: kept pairs of every head ``[H]`` int64 when the settings alone decide them, else None.
        head_budgets: `budgets` as Python integers, so that nothing waits for the device; empty where it is None.
        weights: shares of the heads ``[H]`` on that device, or None for the rule's own counts.
        spared: pairs that are kept beyond the budgets, by heads that a GPU computes dense.
        model_sparsity: of all sites together, where a total is divided over them; else None.
    """

    layout: TokenLayout
    rows: int
    columns: int
    special_columns: int
    dense: bool
    budgets: Tensor | None
    head_budgets: tuple[int, ...]
    weights: Tensor | None
    spared: int = 0
    model_sparsity: float | None = None

    @property
    def kept(self) -> int:
        """Sum of `budgets`."""
        return sum(self.head_budgets)

    @property
    def pairs(self) -> int:
        """Patch-block pairs of one head."""
        return self.rows * self.columns


def make_plan(
    layout: TokenLayout,
    settings: Settings,
    weights: Tensor | None,
    heads: int,
    device: torch.device,
    layered: LayerBudgets | None = None,
) -> Plan:
    """Plan one site's attention over a layout.

    Args:
        layout: the token layout.
        settings: of the patch.
        weights: shares of the heads ``[H]``, or None for the rule's own counts.
        heads: heads H.
        device: where the budgets are used.
        layered: the site's part in the budgets of the whole model; None for budgets of its own.
    """
    rows = math.ceil(layout.patch_tokens / settings.block_q)
    columns = math.ceil(layout.patch_tokens / settings.block_k)
    asked = settings.keeps_all or layout.patch_tokens < settings.dense_below
    dense, budgets, spared = asked or columns <= settings.minimum, None, 0
    model_sparsity = None
    # See Layouts.order: not inference tensors.
    with torch.inference_mode(False), torch.no_grad():
        moved = None if weights is None else weights.to(device)
    if settings.sparsity is not None and not dense:
        with torch.inference_mode(False), torch.no_grad():
            if layered is None:
                total = sparsity.target_total(settings.sparsity, heads, rows, columns, minimum=settings.minimum)
                shares = torch.ones(heads, dtype=torch.float64, device="cpu") if weights is None else weights
                budgets = allocate(total, shares, settings, rows, columns)
            else:
                budgets, model_sparsity = layered.of(settings, rows, columns)
            dense = int(budgets.min()) == rows * columns
            if device.type == "cuda":
                budgets, spared = _with_dense_heads(budgets, rows * columns, settings.dense_from)
                dense = dense or int(budgets.min()) == rows * columns
    return Plan(
        layout=layout,
        rows=rows,
        columns=columns,
        special_columns=math.ceil(layout.special_tokens / settings.block_k),
        dense=dense,
        budgets=None if budgets is None else budgets.to(device),
        head_budgets=() if budgets is None else tuple(budgets.tolist()),
        weights=moved,
        spared=spared,
        model_sparsity=model_sparsity,
    )


def _with_dense_heads(budgets: Tensor, pairs: int, share: float) -> tuple[Tensor, int]:
    """Let heads that keep at least a share of their pairs keep all of them, and count what that adds.

    A GPU's dense kernels take less time a pair than its block-sparse ones, so that leaving out so little saves nothing.
    """
    raised = torch.where(budgets >= share * pairs, pairs, budgets)
    return raised, int((raised - budgets).sum())


def allocate(total: int | Tensor, weights: Tensor, settings: Settings, rows: int, columns: int) -> Tensor:
    """Divide a layer's total among its heads as the settings say: int64 ``[..., H]``."""
    capped = settings.allocation != "uncapped"
    return sparsity.allocate(total, weights, rows=rows, columns=columns, minimum=settings.minimum, capped=capped)
