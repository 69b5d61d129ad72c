"""What is measured: cells, each one way to patch the model, and the parts of the experiment they belong to."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hess_plugin import Profile
from hess_plugin.calibration.harm import HarmSettings
from hess_plugin.scoring import Scoring
from hess_plugin.sparsity import target_total

BLOCK = 8
MINIMUM = 2
MOST_ROUNDS = 5
OTHER_ROUNDS = ", rounds "
"""In the names of cells whose rounds are not those that the selector makes of itself."""
SPARSITIES = (0.65, 0.75, 0.85)
SCORES: dict[str, dict[str, Any]] = {
    "W_Q": {},
    "W_K": {"projection": "k"},
    "W_V": {"projection": "v"},
    "patch rows": {"rows": "patch"},
    "by scene": {"normalisation": "scene"},
    "by scene, patch rows": {"normalisation": "scene", "rows": "patch"},
    "output": {"projection": "output"},
    "output by scene": {"projection": "output", "normalisation": "scene"},
    "points alone": {"camera_weight": 0.0},
    "camera alone": {"camera_weight": 1.0},
}
"""Sensitivity variants by name: options of the score that differ from the method's."""


@dataclass(frozen=True)
class Cell:
    """One way to patch the model.

    Attributes:
        sparsity: dropped share of the block pairs of the whole model; 0 is the unpatched model.
        selector: rule that fills a budget.
        allocation: how budgets are divided.
        pool_q: queries pooled together for the block map.
        pool_k: keys likewise.
        order: block order.
        score: name in `SCORES`, for the allocation ``hess``.
        curves: how harm was measured, for the allocation ``harm``: by ``mass`` selection of whole blocks in raster
            order, or by the cell's ``own`` selection.
        rounds: of swaps, for the selector ``restore``; None for as many as it makes of itself.
    """

    sparsity: float = 0.0
    selector: str = "mass"
    allocation: str = "uniform"
    pool_q: int = BLOCK
    pool_k: int = BLOCK
    order: str = "raster"
    score: str = "W_Q"
    curves: str = "mass"
    rounds: int | None = None

    @property
    def combination(self) -> str:
        """Name without the sparsity; what is as in the method stays unsaid."""
        if self.sparsity == 0.0:
            return "dense"
        details = [self.score] if self.allocation == "hess" and self.score != "W_Q" else []
        details += ["own curves"] if self.allocation == "harm" and self.curves == "own" else []
        budgets = f"{self.allocation} ({', '.join(details)})" if details else self.allocation
        order = "" if self.order == "raster" else f" {self.order}"
        rounds = "" if self.rounds is None else f"{OTHER_ROUNDS}{self.rounds}"
        return f"{budgets} + {self.selector} {self.pool_q}.{self.pool_k}{order}{rounds}"

    @property
    def name(self) -> str:
        """What tells it from every other cell."""
        return "dense" if self.sparsity == 0.0 else f"{self.combination} @ {self.sparsity:g}"

    @property
    def reference(self) -> tuple[Cell, Cell]:
        """What it is compared with: mass selection by uniform and by HeSS budgets at its sparsity."""
        return Cell(self.sparsity), Cell(self.sparsity, allocation="hess")

    @property
    def most_rounds(self) -> Cell:
        """The same with as many rounds of swaps as are compared."""
        return dataclasses.replace(self, rounds=MOST_ROUNDS)

    @property
    def profile(self) -> HarmSettings | None:
        """The profile it needs, by how harm was measured; None for none."""
        if self.sparsity == 0.0 or self.allocation == "uniform":
            return None
        settings = HarmSettings(block_q=BLOCK, block_k=BLOCK, minimum=MINIMUM)
        if self.allocation != "harm" or self.curves == "mass":
            return settings
        return dataclasses.replace(settings, selector=self.selector, block_order=self.order, **self._pools())

    def _pools(self) -> dict[str, Any]:
        """As a patch takes them: None for whole blocks."""
        pools = {"pool_q": self.pool_q, "pool_k": self.pool_k}
        return {name: None if pooled == BLOCK else pooled for name, pooled in pools.items()}

    def options(self, profile: Profile | None, heads: int, blocks: int) -> dict[str, Any]:
        """Arguments of `hess_plugin.patch`.

        Args:
            profile: what `profile` names.
            heads: heads of a layer.
            blocks: blocks that patch tokens make, on either side.
        """
        options: dict[str, Any] = {
            "sparsity": exact(self.sparsity, heads, blocks),
            "allocation": self.allocation,
            "selector": self.selector,
            "block_q": BLOCK,
            "block_k": BLOCK,
            "block_order": self.order,
            "minimum": MINIMUM,
            **self._pools(),
            # As in every evaluation: what was asked for, and equal totals.
            "verdict": "ignore",
            "dense_below": 0,
            "dense_from": 1.0,
        }
        if self.profile is not None:
            options["profile"] = profile
        if self.allocation == "hess":
            options |= dataclasses.asdict(Scoring(**SCORES[self.score]))
        return options


def exact(sparsity: float, heads: int, blocks: int) -> float:
    """The nearest sparsity whose pairs are whole in every layer, so that a total over all layers is the same number."""
    return 1.0 - target_total(sparsity, heads, blocks, blocks, MINIMUM) / (heads * blocks * blocks)


def total(sparsity: float, layers: int, heads: int, blocks: int) -> int:
    """Pairs that a cell keeps in all layers together."""
    if sparsity == 0.0:
        return layers * heads * blocks * blocks
    return layers * target_total(sparsity, heads, blocks, blocks, MINIMUM)


def main_cells(sparsity: float) -> Iterable[Cell]:
    """Selectors by allocations, with whole blocks pooled and with smaller pieces."""
    pools = {"mass": ((8, 8), (4, 8), (2, 2)), "drift": ((8, 8),), "restore": ((8, 8), (4, 8), (2, 2))}
    for selector, allocation in itertools.product(pools, ("uniform", "hess", "harm")):
        for pool_q, pool_k in pools[selector]:
            yield Cell(sparsity, selector, allocation, pool_q, pool_k)


def map_cells(sparsity: float) -> Iterable[Cell]:
    """Block maps: poolings, and the orders with some of them; uniform budgets."""
    some = ((8, 8), (4, 8), (2, 2))
    pools = {"raster": (*some, (8, 4), (8, 2), (4, 4), (2, 8)), "hilbert": some, "tiles": some}
    for order, selector in itertools.product(pools, ("mass", "restore")):
        for pool_q, pool_k in pools[order]:
            yield Cell(sparsity, selector, "uniform", pool_q, pool_k, order)


def sensitivity_cells(sparsity: float) -> Iterable[Cell]:
    """HeSS budgets by every variant of the score."""
    for selector, score in itertools.product(("mass", "restore"), SCORES):
        yield Cell(sparsity, selector, "hess", score=score)


def combined_cells(sparsity: float) -> Iterable[Cell]:
    """What may be the best: restoration by fine maps in Hilbert order, and harm curves of their own."""
    for allocation, (pool_q, pool_k) in itertools.product(("hess", "harm"), ((4, 8), (2, 2))):
        yield Cell(sparsity, "restore", allocation, pool_q, pool_k, "hilbert")
    for pool_q, pool_k, order in ((4, 8, "hilbert"), (2, 2, "raster")):  # the presets
        yield Cell(sparsity, "restore", "harm", pool_q, pool_k, order, curves="own")
    yield Cell(sparsity, "restore", "harm", 1, 1)


def rounds_cells(sparsity: float) -> Iterable[Cell]:
    """Restoration by 1 to 5 rounds of swaps: as published, and as by the presets."""
    kinds = (
        Cell(sparsity, "restore", "hess"),
        Cell(sparsity, "restore", "harm", 4, 8, "hilbert"),
        Cell(sparsity, "restore", "harm", 2, 2),
    )
    for kind, rounds in itertools.product(kinds, range(1, MOST_ROUNDS + 1)):
        yield dataclasses.replace(kind, rounds=rounds)


@dataclass(frozen=True)
class Part:
    """A part of the experiment: its heading, its cells at one sparsity, and the sparsities it is made for."""

    title: str
    cells: Callable[[float], Iterable[Cell]]
    sparsities: Sequence[float]


PARTS = {
    "main": Part("Selectors and allocations", main_cells, SPARSITIES),
    "maps": Part("Block maps", map_cells, (0.75,)),
    "combined": Part("Combinations", combined_cells, SPARSITIES),
    "sensitivity": Part("Sensitivity variants", sensitivity_cells, (0.85,)),
    "rounds": Part("Rounds of swaps", rounds_cells, (0.75, 0.85)),
}


def cells_of(part: str, sparsities: Sequence[float] | None = None) -> list[Cell]:
    """Cells of a part, once each, after what they are compared with."""
    chosen = PARTS[part]
    found = [Cell()]
    for sparsity in sparsities or chosen.sparsities:
        found += [*Cell(sparsity).reference, *chosen.cells(sparsity)]
    return list(dict.fromkeys(found))
