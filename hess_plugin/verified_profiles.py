"""The verdicts of a profile: recorded in its metadata, listed, and the one that applies to a patch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .exceptions import ProfileError
from .profiles import Profile
from .scoring import Scoring
from .verdict_records import from_dict, to_dict
from .verification import Verification

if TYPE_CHECKING:
    from .settings import Settings

KEY = "verdicts"  # in Profile.metadata: a list of what `to_dict` returns
DISTANCE = 0.1  # between the sparsity asked for and one that was verified


def traces_digest(profile: Profile) -> str:
    """Digest the traces exactly, so that a verdict does not outlive them.

    Returns:
        16 hexadecimal digits.
    """
    return _digest(profile, profile.traces)


def harm_digest(profile: Profile) -> str:
    """Digest the harm curves exactly; a verdict on budgets by score outlives them.

    Returns:
        16 hexadecimal digits.
    """
    return _digest(profile, profile.harm)


def _digest(profile: Profile, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    digest.update(f"{profile.adapter}{profile.sites}".encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().double().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def record_verification(profile: Profile, verification: Verification) -> Profile:
    """Copy a profile with a verdict added.

    It takes the place of an older one of the same sparsity, score, blocks and weights. Others stay; those of other
    traces, which can never apply again, and damaged ones go.

    Raises:
        ProfileError: other traces were verified than the profile has.
    """
    digest = traces_digest(profile)
    if verification.traces != digest:
        raise ProfileError(
            f"other traces were verified ({verification.traces}) than the profile has ({digest}); verify it again."
        )
    records = [to_dict(verification)]
    for record in reversed(_records(profile)):
        try:
            older = from_dict(record)
        except ProfileError:
            continue
        if older.traces == digest and older.setting != verification.setting:
            records.insert(0, record)
    return dataclasses.replace(profile, metadata={**profile.metadata, KEY: records})


def write_verifications(path: str | Path, verifications: Iterable[Verification]) -> Profile:
    """Add verdicts to a profile file, atomically; what else was written into it meanwhile stays.

    Raises:
        ProfileError: the file cannot be read any more, or holds other traces by now.
    """
    target = Path(path).resolve()  # the file that a link points to is replaced, not the link
    profile = Profile.load(target)
    for verification in verifications:
        profile = record_verification(profile, verification)
    profile.save(target)
    return profile


def verifications(profile: Profile) -> list[Verification]:
    """Read a profile's verdicts, oldest first; those of other traces, too.

    Raises:
        ProfileError: one is damaged.
    """
    return [from_dict(record) for record in _records(profile)]


def find_verification(
    profile: Profile, settings: Settings, scoring: Scoring, fingerprint: str | None = None
) -> Verification | None:
    """Find the verdict that applies to a patch.

    It is about the profile's present traces, the same score and the same weights, and about a sparsity at most
    `DISTANCE` from the one asked for: the nearest, of two as near the sparser one. One of the patch's own block sizes
    goes before nearer ones of other block sizes, and without one those are taken: which heads need how much changes
    little with the size of blocks. Only budgets by score (``hess``) at a plain sparsity were verified, so nothing
    applies to other allocations and rules.

    Args:
        profile: the profile.
        settings: of the patch.
        scoring: of the patch.
        fingerprint: of the model's weights; the profile's own by default.

    Raises:
        ProfileError: a verdict is damaged.
    """
    asked = settings.sparsity
    if asked is None or asked == 0.0 or settings.allocation != "hess" or not _records(profile):
        return None
    digest, scoring = traces_digest(profile), scoring.resolved(profile)
    applying = [
        (_distance(found.sparsity, asked), found)
        for found in verifications(profile)
        if found.traces == digest
        and found.scoring == scoring
        and found.fingerprint == (fingerprint or profile.fingerprint)
    ]
    blocks = (settings.block_q, settings.block_k)

    def rank(pair: tuple[float, Verification]) -> tuple[bool, float, float]:
        distance, found = pair
        return (found.block_q, found.block_k) != blocks, distance, -found.sparsity

    return min((pair for pair in applying if pair[0] <= DISTANCE), key=rank, default=(0.0, None))[1]


def verified_lines(profile: Profile) -> list[str]:
    """Tell every verdict of a profile in a line, or that it has none."""
    records = _records(profile)
    if not records:
        return ["verified: no; `hess-patch verify` measures on held-out scenes whether it beats uniform budgets."]
    return [f"verified: {_line(profile, record)}" for record in records]


def _line(profile: Profile, record: object) -> str:
    try:
        found = from_dict(record)
    except ProfileError as error:
        return f"damaged: {error}"
    if found.traces != traces_digest(profile):
        return f"for other traces than these, which says nothing of them ({found.outcome} at {found.sparsity:g})."
    other = "" if found.fingerprint == profile.fingerprint else f"with other weights ({found.fingerprint}), "
    return (
        f"{other}{found.text} Measured {found.date[:10]} on {found.data or 'scenes of no known source'}, blocks "
        f"{found.block_q} x {found.block_k}; score: {found.scoring}."
    )


def _distance(first: float, second: float) -> float:
    return round(abs(first - second), 9)  # 0.83 is not 0.1 from 0.73 in binary


def _records(profile: Profile) -> list[Any]:
    records = profile.metadata.get(KEY, [])
    return records if isinstance(records, list) else [records]  # damaged, which `from_dict` will say
