"""How the blocks of a profile's harm curves were chosen: in words, and against those of a patch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .exceptions import PatchError
from .settings import Settings

if TYPE_CHECKING:
    from .profiles import Profile

KEY = "harm"  # in Profile.metadata: what `HarmSettings.to_json` returns


def measured_settings(profile: Profile) -> Settings | None:
    """The settings of a patch whose blocks are chosen as those were that the curves were measured with.

    Returns:
        None for a profile without curves, or one that does not record them in a way that this version knows.
    """
    facts: Any = profile.metadata.get(KEY)
    if not profile.has_harm or not isinstance(facts, Mapping):
        return None
    known = {name: value for name, value in facts.items() if name in Settings.__dataclass_fields__}
    try:
        return Settings(**{"sparsity": 0.5, "sparse_ratio": None, "cdf_threshold": None, "allocation": "harm"} | known)
    except PatchError:
        return None


def blocks_text(settings: Settings) -> str:
    """Size of the blocks and how they are chosen, in words."""
    return f"blocks of {settings.block_q} x {settings.block_k} chosen by {settings.selection}"


def warn_of_other_blocks(profile: Profile, settings: Settings) -> None:
    """Warn in a sentence where a patch divides by harm and chooses blocks otherwise than the curves were measured with.

    Selector, parts of a block that are pooled each on its own, and the order that fills blocks have to agree. Another
    size of blocks alone is no reason: curves are in shares of the pairs.

    Args:
        profile: of the patch.
        settings: of the patch.
    """
    measured = measured_settings(profile)
    if settings.allocation != "harm" or measured is None or _choice(measured) == _choice(settings):
        return
    warnings.warn(
        f"Budgets go by harm curves that were measured with {blocks_text(measured)}, and this patch has "
        f"{blocks_text(settings)}: heads suffer otherwise from these; choose blocks as the curves have it, calibrate "
        "again, or take allocation 'hess'.",
        stacklevel=3,
    )


def _choice(settings: Settings) -> tuple[Any, ...]:
    parts = (settings.block_q // (settings.pool_q or settings.block_q),)
    parts += (settings.block_k // (settings.pool_k or settings.block_k),)
    return settings.selector, settings.block_order, parts
