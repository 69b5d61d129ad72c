"""How blocks are chosen: told in words, recorded beside a result, and compared with how harm curves were measured."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .exceptions import PatchError
from .presets import DEFAULT
from .settings import Settings

if TYPE_CHECKING:
    from .profiles import Profile

_MEASURED = "harm"  # in Profile.metadata: what `HarmSettings.to_json` returns
_CHOICE = ("block_q", "block_k", "minimum", "selector", "block_order", "pool_q", "pool_k")


def choice_text(settings: Settings) -> str:
    """Size of the blocks and how they are chosen, in words."""
    return f"blocks of {settings.block_q} x {settings.block_k} chosen by {settings.selection}"


def choice_facts(settings: Settings) -> dict[str, Any]:
    """What to record beside a result: selector, patches pooled together (of a whole block, its own) and block order.

    A preset's name is not among them: it may mean something else in another version.
    """
    return {
        "selector": settings.selector,
        "pool_q": settings.pool_q or settings.block_q,
        "pool_k": settings.pool_k or settings.block_k,
        "block_order": settings.block_order,
    }


def with_choice(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded facts with those that earlier versions left out of the method as published: most mass of whole blocks.

    Args:
        facts: with ``block_q`` and ``block_k``, if anything was recorded of blocks.
    """
    published = {
        "selector": "mass",
        "pool_q": facts.get("block_q"),
        "pool_k": facts.get("block_k"),
        "block_order": "raster",
    }
    return published | {name: value for name, value in facts.items() if (name, value) != ("preset", DEFAULT)}


def measured_choice(profile: Profile) -> Settings | None:
    """The settings of a patch that chooses blocks as those were chosen that harm curves were measured with.

    Returns:
        None for a profile without curves, or one that records nothing of it that this version knows.
    """
    facts: Any = profile.metadata.get(_MEASURED)
    if not profile.has_harm or not isinstance(facts, Mapping):
        return None
    try:
        return Settings(0.5, None, None, "harm", **{name: facts[name] for name in _CHOICE if name in facts})
    except PatchError:
        return None


def warn_of_other_blocks(profile: Profile, settings: Settings) -> None:
    """Warn in a sentence where a patch divides by harm and chooses blocks otherwise than the curves were measured with.

    Selector, parts of a block that are pooled each on its own, and the order that fills blocks have to agree. Another
    size of blocks alone is no reason: curves are in shares of the pairs.

    Args:
        profile: of the patch.
        settings: of the patch.
    """
    measured = measured_choice(profile)
    if settings.allocation != "harm" or measured is None or _choice(measured) == _choice(settings):
        return
    warnings.warn(
        f"Budgets go by harm that was measured with {choice_text(measured)}, and this patch has "
        f"{choice_text(settings)}, by which heads may suffer otherwise; choose them as they were measured, calibrate "
        "again, or take allocation='hess'.",
        stacklevel=3,
    )


def _choice(settings: Settings) -> tuple[Any, ...]:
    """What has to agree."""
    parts_q = settings.block_q // (settings.pool_q or settings.block_q)
    parts_k = settings.block_k // (settings.pool_k or settings.block_k)
    return settings.selector, settings.block_order, parts_q, parts_k
