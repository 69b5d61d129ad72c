"""Choosing views and scenes with a seed, the same on every machine."""

from __future__ import annotations

import random

from hess_plugin.exceptions import SceneError


def choose(available: int, wanted: int | None, seed: int) -> list[int]:
    """At most `wanted` of `available` indices, drawn without replacement with `seed`, ascending; None = all.

    Raises:
        SceneError: when fewer than one is wanted.
    """
    if wanted is not None and wanted < 1:
        raise SceneError(f"{wanted} views or scenes were asked for, at least 1 was wanted.")
    if wanted is None or wanted >= available:
        return list(range(available))
    # Python's generator, not torch's: its sequence is the same whatever library versions are installed.
    return sorted(random.Random(seed).sample(range(available), wanted))
