"""Arms: the ways to run a model that are compared; rows: the amounts at which they are."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

from hess_plugin.exceptions import PatchError
from hess_plugin.scoring import Scoring

WITHOUT_PROFILE = ("uniform", "equal")


@dataclass(frozen=True)
class Row:
    """How much is kept, by one of the two kinds of rule; what the arms of a comparison have in common.

    Attributes:
        sparsity: dropped share of patch-block pairs, 0 (dense) to below 1; or None for the rule of SparseVGGT.
        sparse_ratio: rho of SparseVGGT, the share of key blocks a row may drop; or None.
        cdf_threshold: tau of SparseVGGT, the attention mass a row keeps; or None.
    """

    sparsity: float | None = None
    sparse_ratio: float | None = None
    cdf_threshold: float | None = None

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.sparse_ratio is None and self.cdf_threshold is None):
            raise PatchError(
                f"a row of sparsity {self.sparsity}, rho {self.sparse_ratio}, tau {self.cdf_threshold} was given; give "
                "either a sparsity or rho and/or tau."
            )

    @property
    def label(self) -> str:
        """Short name, which tells rows apart: ``0.73``, or ``rho 0.8 tau 0.4``."""
        if self.sparsity is not None:
            return f"{self.sparsity:g}"
        parts = (("rho", self.sparse_ratio), ("tau", self.cdf_threshold))
        return " ".join(f"{name} {value:g}" for name, value in parts if value is not None)

    @property
    def knob(self) -> float:
        """The row as a number that grows with sparsity; see `turned`."""
        if self.sparsity is not None:
            return self.sparsity
        if self.cdf_threshold is not None:
            return 1.0 - self.cdf_threshold
        assert self.sparse_ratio is not None
        return self.sparse_ratio

    @property
    def knob_range(self) -> tuple[float, float]:
        """Least and largest value of the knob."""
        both = self.sparse_ratio is not None and self.cdf_threshold is not None
        return 0.0, (1.999 if both else 0.999)

    def turned(self, knob: float) -> Row:
        """The same kind of rule at another value of its knob.

        A sparsity or rho alone is turned itself. Of rho and tau together tau goes first, from 1 (knob 0, dense) down
        to 0 (knob 1: rho alone decides), then rho towards 1 (knob 2). Measured sparsity never falls as the knob grows.
        """
        low, high = self.knob_range
        knob = min(max(knob, low), high)
        if self.sparsity is not None:
            return replace(self, sparsity=knob)
        if self.cdf_threshold is None:
            return replace(self, sparse_ratio=knob)
        if knob <= 1.0 or self.sparse_ratio is None:
            return replace(self, cdf_threshold=1.0 - knob)
        return replace(
            self, sparse_ratio=self.sparse_ratio + (knob - 1.0) * (1.0 - self.sparse_ratio), cdf_threshold=0.0
        )


PAPER_ROWS = tuple(
    Row(sparse_ratio=rho, cdf_threshold=tau)
    for rho, tau in (
        (0.1, 0.97), (0.3, 0.97), (0.5, 0.97), (0.4, 0.95), (0.6, 0.93), (0.5, 0.90), (0.5, 0.88), (0.5, 0.85),
        (0.5, 0.80), (0.5, 0.75), (0.5, 0.70), (0.7, 0.70), (0.6, 0.60), (0.6, 0.40), (0.8, 0.50), (0.8, 0.40),
    )
)  # fmt: skip
"""The settings of HeSS, Tables S1 and S2, from sparsity .07 to .75."""


@dataclass(frozen=True)
class Arm:
    """One way to run the model.

    Attributes:
        name: shown in tables.
        sparsity: target sparsity; 0 is the unpatched model. None: by `sparse_ratio` and `cdf_threshold`.
        allocation: how budgets are divided among heads (see `hess_plugin.patch`).
        sparse_ratio: rho of SparseVGGT; or None.
        cdf_threshold: tau of SparseVGGT; or None.
        scoring: which score the budgets follow; None for the comparison's own.
        pruning: baseline that prunes whole heads to `sparsity` instead of dropping blocks; see
            `hess_plugin.baselines`. None for block sparsity.
        group: name of the row that it is compared in; its own amount by default.
        turned_to: knob of that row it was made with; its own amount's by default.
        preset: how it chooses blocks; None for the comparison's own.
    """

    name: str
    sparsity: float | None = 0.0
    allocation: str = "uniform"
    sparse_ratio: float | None = None
    cdf_threshold: float | None = None
    scoring: Scoring | None = None
    pruning: str | None = None
    group: str | None = None
    turned_to: float | None = None
    preset: str | None = None

    @property
    def row(self) -> Row:
        """How much it keeps."""
        return Row(self.sparsity, self.sparse_ratio, self.cdf_threshold)

    @property
    def label(self) -> str:
        """The row it is compared in."""
        return self.group if self.group is not None else self.row.label

    @property
    def dense(self) -> bool:
        """Whether it is the unpatched model."""
        return self.sparsity == 0.0 and self.pruning is None

    @property
    def guided(self) -> bool:
        """Whether it divides budgets by the scores of a profile."""
        return not self.dense and self.pruning is None and self.allocation not in WITHOUT_PROFILE

    def goes_to_sparsity(self, row: Row) -> bool:
        """Whether in a row it is set to the sparsity that others reached, because it cannot follow the row's rule.

        It prunes heads, or divides one total over all layers, which rho and tau leave open.
        """
        return self.pruning is not None or (self.allocation == "harm" and row.sparsity is None)

    @property
    def knob(self) -> float:
        """The amount as a number; see `Row.knob`."""
        return self.row.knob if self.turned_to is None else self.turned_to

    def at(self, row: Row, knob: float | None = None) -> Arm:
        """The same arm in a row, with the row's knob turned if one is given."""
        amount = row if knob is None or knob == row.knob else row.turned(knob)
        return replace(
            self,
            sparsity=amount.sparsity,
            sparse_ratio=amount.sparse_ratio,
            cdf_threshold=amount.cdf_threshold,
            group=row.label,
            turned_to=knob,
        )

    def set_to(self, sparsity: float, row: Row) -> Arm:
        """The same arm at a sparsity of its own, compared in a row."""
        return replace(self, sparsity=sparsity, group=row.label, turned_to=sparsity)


def scene_seed(scene: str) -> int:
    """Seed of the ``random`` allocation in one scene: its spread over scenes then holds that over shufflings, too."""
    return zlib.crc32(scene.encode())
