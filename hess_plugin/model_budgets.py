"""Budgets of all heads of all sites at once, made once for each number of blocks and shared by the sites of a patch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import sparsity
from .settings import Settings


class ModelBudgets:
    """Divides one total over a whole model by harm curves.

    Args:
        shares: kept shares ``[K]``, strictly ascending.
        curves: harm at them, ``[L, H, K]``, comparable over the model.
    """

    def __init__(self, shares: Tensor, curves: Tensor) -> None:
        self._knots, self._heights = sparsity.convex_curves(shares, curves)
        self._made: dict[tuple[float, int, int, int], Tensor] = {}

    def of(self, settings: Settings, rows: int, columns: int) -> Tensor:
        """Budgets of every head: int64 ``[L, H]`` on the CPU.

        Args:
            settings: with a plain sparsity.
            rows: patch query blocks T_q of every site.
            columns: patch key blocks T_k of every site.
        """
        assert settings.sparsity is not None
        key = (settings.sparsity, rows, columns, settings.minimum)
        if key not in self._made:
            layers, heads, _ = self._heights.shape
            total = sparsity.target_total(settings.sparsity, layers * heads, rows, columns, minimum=settings.minimum)
            # Cached tensors must not be born as inference tensors: a later training step could not save them.
            with torch.inference_mode(False), torch.no_grad():
                self._made[key] = sparsity.allocate_convex(
                    total, self._knots, self._heights, rows=rows, columns=columns, minimum=settings.minimum
                )
        return self._made[key]


@dataclass(frozen=True)
class LayerBudgets:
    """What one site has of `ModelBudgets`.

    Attributes:
        model: shared by all sites of a patch.
        index: of the site.
    """

    model: ModelBudgets
    index: int

    def of(self, settings: Settings, rows: int, columns: int) -> tuple[Tensor, float]:
        """Budgets of the site's heads, int64 ``[H]`` on the CPU, and the sparsity of the whole model."""
        budgets = self.model.of(settings, rows, columns)
        return budgets[self.index].clone(), 1.0 - int(budgets.sum()) / (budgets.numel() * rows * columns)
