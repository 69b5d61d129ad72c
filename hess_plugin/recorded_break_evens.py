"""The break-evens of a profile: recorded in its metadata, listed, and the limit that applies to a patch."""

from __future__ import annotations

import contextlib
import dataclasses

from .break_even import BreakEven, Conditions
from .exceptions import ProfileError
from .profiles import Profile

METADATA_KEY = "break_even"
MAX_DISTANCE = 0.05  # sparsity further from the measured one than this is not taken to have the same break-even


def break_evens(profile: Profile) -> list[BreakEven]:
    """Read every break-even of a profile.

    Raises:
        ProfileError: a record is damaged.
    """
    stored = profile.metadata.get(METADATA_KEY, [])
    if not isinstance(stored, list):
        raise _damaged(f"wanted a list of them, got {type(stored).__name__}")
    return [_read(record) for record in stored]


def record_break_even(profile: Profile, entry: BreakEven) -> Profile:
    """Copy a profile with a break-even, in the place of an earlier one of the same conditions and sparsity.

    Damaged records, which nothing can use, are dropped.
    """
    stored = profile.metadata.get(METADATA_KEY, [])
    kept: list[BreakEven] = []
    for record in stored if isinstance(stored, list) else []:
        with contextlib.suppress(ProfileError):
            kept.append(_read(record))
    key = (entry.conditions, entry.sparsity)
    place = next((i for i, old in enumerate(kept) if (old.conditions, old.sparsity) == key), len(kept))
    kept[place : place + 1] = [entry]
    records = [one.to_json() for one in kept]
    return dataclasses.replace(profile, metadata={**profile.metadata, METADATA_KEY: records})


def recorded_limit(profile: Profile, conditions: Conditions, sparsity: float | None) -> int:
    """Look up below how many patch tokens the dense path is the faster one; 0 where that is unknown.

    A record counts if machine, dtype, backend and block sizes are the same and its sparsity is at most `MAX_DISTANCE`
    away; the nearest sparsity is taken. A record under the same autocast goes before others, which count too, because
    autocast may be entered after the model is patched. Between equals the larger limit is taken. Versions are not
    compared: measure again after an upgrade.

    Args:
        profile: whose records are read.
        conditions: what the model is about to run under.
        sparsity: asked for; None where a rule decides it, for which no record was made.

    Raises:
        ProfileError: a record is damaged.
    """
    if sparsity is None or METADATA_KEY not in profile.metadata:
        return 0
    ranked = []
    for entry in break_evens(profile):
        distance = round(abs(entry.sparsity - sparsity), 9)
        other = entry.conditions.autocast != conditions.autocast
        if dataclasses.replace(entry.conditions, autocast=conditions.autocast) == conditions:
            ranked.append((other, distance, -entry.dense_below))
    usable = [rank for rank in ranked if rank[1] <= MAX_DISTANCE]
    return -min(usable)[2] if usable else 0


def _read(record: object) -> BreakEven:
    try:
        return BreakEven.from_json(record)
    except ProfileError as error:
        raise _damaged(str(error).rstrip(".")) from error


def _damaged(reason: str) -> ProfileError:
    return ProfileError(
        f"a break-even in the profile is damaged ({reason}); run `hess-patch bench --end-to-end` again, which replaces "
        "it, or patch with dense_below=0."
    )
