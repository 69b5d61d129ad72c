"""How harm curves are measured: block sizes, selector and kept shares, recorded in the profile."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hess_plugin.exceptions import CalibrationError, PatchError
from hess_plugin.presets import chosen, find_preset
from hess_plugin.settings import Settings

SHARES = (0.005, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.75)
"""Closer where harm falls fastest. The lowest stand for the fewest blocks a row may keep, in all but long scenes."""


@dataclass(frozen=True)
class HarmSettings:
    """What the blocks are whose leaving out is measured; checked when made.

    Blocks should be those that will be used: of other sizes, or chosen by another selector, heads suffer otherwise.

    Attributes:
        block_q: patch queries in a block.
        block_k: patch keys in a block.
        minimum: key blocks every row keeps at least.
        selector: the rule that fills a budget.
        block_order: order in which the patches of a frame fill blocks, a name of `hess_plugin.block_order`.
        pool_q: patch queries pooled together where blocks are compared; None for a whole block.
        pool_k: patch keys pooled together likewise.
        shares: kept shares of the block pairs to measure at, ascending, above 0 and below 1. Every row keeps the
            nearest whole number of blocks, so that the profile's shares differ a little.

    Raises:
        CalibrationError: a value out of range.
    """

    block_q: int = 128
    block_k: int = 64
    minimum: int = 2
    selector: str = "mass"
    block_order: str = "raster"
    pool_q: int | None = None
    pool_k: int | None = None
    shares: tuple[float, ...] = SHARES

    def __post_init__(self) -> None:
        try:  # what a patch would refuse
            Settings(0.5, None, None, "uniform", **self.of_patch())
        except PatchError as error:
            raise CalibrationError(f"harm settings: {error}") from error
        if not isinstance(self.shares, Sequence) or not all(isinstance(share, numbers.Real) for share in self.shares):
            raise CalibrationError(f"harm shares are {self.shares!r}, wanted a sequence of numbers.")
        shares = tuple(self.shares)
        rising = all(low < high for low, high in zip((0.0, *shares), (*shares, 1.0), strict=True))
        if not shares or not rising:
            raise CalibrationError(f"harm shares are {shares}, wanted some ascending, above 0 and below 1.")
        object.__setattr__(self, "shares", shares)

    @classmethod
    def of_preset(cls, name: str, **given: Any) -> HarmSettings | None:
        """What a preset has measured: with its own way to choose blocks; None if it does not go by harm.

        Args:
            name: of the preset.
            **given: fields that go before the preset's.

        Raises:
            PatchError: there is no such preset.
            CalibrationError: a value out of range.
        """
        preset = find_preset(name, None)
        if not preset.by_harm:
            return None
        block_q, block_k = given.get("block_q", cls.block_q), given.get("block_k", cls.block_k)
        return cls(**{**given, **chosen(preset, block_q, block_k, given)})

    def of_patch(self) -> dict[str, Any]:
        """The settings that a patch has as well."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "shares"}

    def to_json(self) -> dict[str, Any]:
        """As it is recorded: JSON types."""
        return {**self.of_patch(), "shares": list(self.shares)}

    def counts(self, columns: int) -> list[int]:
        """Blocks that every row keeps of so many, for each share."""
        return [min(columns, max(self.minimum, int(share * columns + 0.5))) for share in self.shares]
