"""Presets: settings that were measured to go well together, under one name; see benchmarks/RESULTS.md."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .exceptions import PatchError, ProfileError
from .harm_curves import has_curves

if TYPE_CHECKING:
    from .profiles import Profile

KEY = "preset"  # in Profile.metadata
DEFAULT = "hess"


@dataclass(frozen=True)
class Preset:
    """How blocks are chosen, and how budgets are divided where there is a profile.

    Attributes:
        selector: the rule that fills a budget.
        parts_q: parts of a query block that are pooled each on its own.
        parts_k: parts of a key block likewise.
        block_order: order in which the patches of a frame fill blocks.
        by_harm: whether budgets go over the whole model by harm, where the profile has curves and the total is known.
    """

    selector: str = "mass"
    parts_q: int = 1
    parts_k: int = 1
    block_order: str = "raster"
    by_harm: bool = False

    def selection(self, block_q: int, block_k: int) -> dict[str, Any]:
        """Arguments of `hess_plugin.patch` that say how blocks of some size are chosen."""
        pool_q, pool_k = block_q // math.gcd(self.parts_q, block_q), block_k // math.gcd(self.parts_k, block_k)
        return {
            "selector": self.selector,
            "pool_q": None if pool_q == block_q else pool_q,
            "pool_k": None if pool_k == block_k else pool_k,
            "block_order": self.block_order,
        }

    def allocation(self, profile: Profile | None, sparsity: float | None) -> str:
        """How budgets are divided.

        Args:
            profile: of the patch.
            sparsity: asked for; None where a rule decides.
        """
        if profile is None:
            return "uniform"
        return "harm" if self.by_harm and has_curves(profile) and sparsity is not None else "hess"


PRESETS = {
    "hess": Preset(),
    "balanced": Preset("restore", parts_q=2, block_order="hilbert", by_harm=True),
    "accurate": Preset("restore", parts_q=4, parts_k=4, by_harm=True),
}
"""``hess`` is the method as published. The others lose less at the same sparsity and take more time to choose blocks:
on a CPU ``balanced`` a few percent of the attention that it feeds, ``accurate`` a fifth to a quarter
(results/selection_cost.md)."""


def preset_name(profile: Profile | None) -> str:
    """Name of the preset that a profile was calibrated for; the published method's where it says none."""
    recorded = None if profile is None else profile.metadata.get(KEY)
    return DEFAULT if recorded is None else str(recorded)


def find_preset(name: str | None, profile: Profile | None) -> Preset:
    """The preset of a patch: the one asked for, else the one recorded in the profile, else the published method.

    Raises:
        PatchError: there is no such preset.
        ProfileError: the profile's is none that this version knows.
    """
    if name is None and profile is not None:
        recorded = preset_name(profile)
        if recorded not in PRESETS:
            raise ProfileError(
                f"the profile was calibrated for the preset {recorded!r}, which this version does not know; upgrade "
                f"hess-plugin, or choose one of {', '.join(PRESETS)}."
            )
        return PRESETS[recorded]
    name = DEFAULT if name is None else name
    if not isinstance(name, str) or name not in PRESETS:
        raise PatchError(f"preset is {name!r}, wanted one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def chosen(preset: Preset, block_q: Any, block_k: Any, given: dict[str, Any]) -> dict[str, Any]:
    """How blocks are chosen: as given, what was left open (None) as the preset has it.

    Whoever names a selector also says what is pooled: a preset's pieces belong to its own.
    """
    sizes = (block_q, block_k)
    fits = all(isinstance(size, int) and size >= 1 for size in sizes)  # settings refuse the others
    by_preset = preset.selection(*sizes) if fits else Preset().selection(1, 1)
    if given.get("selector") not in (None, preset.selector):
        by_preset |= {"pool_q": None, "pool_k": None}
    return by_preset | {name: value for name, value in given.items() if value is not None}
