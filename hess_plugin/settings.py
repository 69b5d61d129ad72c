"""How much a patched model keeps and how it is divided: the settings of one patch, checked when made."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import sparsity
from .block_order import BLOCK_ORDERS
from .exceptions import PatchError
from .presets import chosen, find_preset

if TYPE_CHECKING:
    from .profiles import Profile

MEMORY = ("plain", "lean")
DEFAULT_SPARSITY = 0.73
DENSE_FROM = 0.8
UNFIT = ("raise", "dense")
ALLOCATIONS = ("uniform", "equal", "hess", "harm", "reverse", "uncapped", "random")


@dataclass(frozen=True)
class Settings:
    """How much to keep and how to divide it; checked when made.

    Attributes:
        sparsity: dropped share of patch-block pairs of every layer, 0 to below 1; or None.
        sparse_ratio: rho of SparseVGGT, the share of key blocks a row may drop; or None.
        cdf_threshold: tau of SparseVGGT, the attention mass a row keeps; or None.
        allocation: ``uniform`` (the rule's own counts), ``equal`` (same total, the same budget for every
            head), ``hess`` (budgets by score), ``harm`` (over the whole model, by measured harm; with a sparsity only),
            and the checks of the method: ``reverse`` (inverted ranking), ``uncapped`` (surplus over a full head is
            lost), ``random`` (scores shuffled among heads).
        selector: the rule that fills a budget.
        backend: the code that computes attention over block lists.
        block_q: patch queries in a block.
        block_k: patch keys in a block.
        minimum: key blocks every row keeps at least.
        seed: of the ``random`` allocation.
        block_order: order in which the patches of a frame fill blocks, a name of `BLOCK_ORDERS`.
        dense_below: patch tokens of a forward below which nothing is dropped; 0 for no such limit.
        memory: ``plain``, or ``lean`` for inference in less memory.
        dense_from: share of its pairs from which on a head keeps all of them on a GPU; 1 for budgets as they are.
        pool_q: patch queries pooled together where blocks are compared, a divisor of `block_q`; None for a whole block.
        pool_k: patch keys pooled together likewise, a divisor of `block_k`.
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
    dense_below: int = 0
    memory: str = "plain"
    dense_from: float = DENSE_FROM
    pool_q: int | None = None
    pool_k: int | None = None

    def __post_init__(self) -> None:
        rule = self.sparse_ratio is not None or self.cdf_threshold is not None
        if (self.sparsity is None) == (not rule):
            raise PatchError(
                f"sparsity={self.sparsity}, sparse_ratio={self.sparse_ratio}, cdf_threshold={self.cdf_threshold}: give "
                "either a sparsity, or sparse_ratio and/or cdf_threshold."
            )
        for name in ("sparsity", "sparse_ratio"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0.0 <= value < 1.0):
                raise PatchError(f"{name} is {value!r}, wanted a number from 0 (dense) to below 1.")
        tau = self.cdf_threshold
        if tau is not None and not (_is_number(tau) and 0.0 <= tau <= 1.0):
            raise PatchError(f"cdf_threshold is {tau!r}, wanted a number from 0 to 1.")
        if not (_is_number(self.dense_from) and 0.0 < self.dense_from <= 1.0):
            raise PatchError(f"dense_from is {self.dense_from!r}, wanted a number above 0, to 1.")
        if self.allocation not in ALLOCATIONS:
            raise PatchError(f"allocation is {self.allocation!r}, wanted one of {', '.join(ALLOCATIONS)}.")
        if self.allocation == "harm" and self.sparsity is None:
            raise PatchError(
                "allocation 'harm' divides one total over all layers, which sparse_ratio and cdf_threshold leave open; "
                "give a sparsity."
            )
        if not isinstance(self.block_order, str) or self.block_order not in BLOCK_ORDERS:
            raise PatchError(f"block_order is {self.block_order!r}, wanted one of {', '.join(BLOCK_ORDERS)}.")
        if self.memory not in MEMORY:
            raise PatchError(f"memory is {self.memory!r}, wanted one of {', '.join(MEMORY)}.")
        if not isinstance(self.selector, str) or self.selector not in sparsity.SELECTORS:
            raise PatchError(f"selector is {self.selector!r}, wanted one of {', '.join(sparsity.SELECTORS)}.")
        for name, least in (("block_q", 1), ("block_k", 1), ("minimum", 1), ("dense_below", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise PatchError(f"{name} is {value!r}, wanted a whole number of at least {least} (an int).")
        for name, block in (("pool_q", self.block_q), ("pool_k", self.block_k)):
            value = getattr(self, name)
            if value is not None and (
                not isinstance(value, int) or isinstance(value, bool) or value < 1 or block % value
            ):
                raise PatchError(f"{name} is {value!r}, wanted a divisor of the {block} tokens of its block, or None.")

    @property
    def selection(self) -> str:
        """How blocks are chosen, in words: the selector, what it pools if not whole blocks, and their order."""
        pools = (self.pool_q or self.block_q, self.pool_k or self.block_k)
        pooled = "" if pools == (self.block_q, self.block_k) else f", parts of {pools[0]} x {pools[1]}"
        return f"{self.selector}{pooled}{'' if self.block_order == 'raster' else f', {self.block_order} order'}"

    @property
    def keeps_all(self) -> bool:
        """Whether the rule drops nothing, whatever the input."""
        return self.sparsity == 0.0 or self.sparse_ratio == 0.0 or (self.cdf_threshold or 0.0) >= 1.0


def make_settings(
    *,
    profile: Profile | None,
    preset: str | None = None,
    sparsity: float | None = None,
    sparse_ratio: float | None = None,
    cdf_threshold: float | None = None,
    allocation: str | None = None,
    selector: str | None = None,
    block_q: int = 128,
    block_k: int = 64,
    pool_q: int | None = None,
    pool_k: int | None = None,
    block_order: str | None = None,
    **others: Any,
) -> Settings:
    """Fill in what `patch` takes by default.

    Args:
        profile: of the patch.
        preset: as in `patch`.
        sparsity: as in `patch`.
        sparse_ratio: as in `patch`.
        cdf_threshold: as in `patch`.
        allocation: as in `patch`.
        selector: as in `patch`.
        block_q: as in `patch`.
        block_k: as in `patch`.
        pool_q: as in `patch`.
        pool_k: as in `patch`.
        block_order: as in `patch`.
        **others: further fields of `Settings`.

    Raises:
        PatchError: a setting is out of range.
        ProfileError: the profile's preset is unknown.
    """
    by = find_preset(preset, profile)
    if sparsity is None and sparse_ratio is None and cdf_threshold is None:
        sparsity = DEFAULT_SPARSITY
    if allocation is None:
        allocation = by.allocation(profile, sparsity)
    given = {"selector": selector, "pool_q": pool_q, "pool_k": pool_k, "block_order": block_order}
    return Settings(
        sparsity,
        sparse_ratio,
        cdf_threshold,
        allocation,
        block_q=block_q,
        block_k=block_k,
        **chosen(by, block_q, block_k, given),
        **others,
    )


def check_unfit(unfit: str) -> None:
    """Refuse what is not one of `UNFIT`.

    Raises:
        PatchError: it is not.
    """
    if unfit not in UNFIT:
        raise PatchError(f"unfit is {unfit!r}, wanted one of {', '.join(UNFIT)}.")


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
