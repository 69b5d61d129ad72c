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
from .verification import VERIFIED, Verification

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

    It takes the place of an older one of the same sparsity, allocation, score, blocks, selection and weights. Others
    stay; those of other traces or harm curves, which can never apply again, and damaged ones go.

    Raises:
        ProfileError: other traces or harm curves were verified than the profile has.
    """
    digest = traces_digest(profile)
    if verification.traces != digest:
        raise ProfileError(
            f"other traces were verified ({verification.traces}) than the profile has ({digest}); verify it again."
        )
    if not _current(profile, verification):
        raise ProfileError(
            f"other harm curves were verified ({verification.harm}) than the profile has ({harm_digest(profile)}); "
            "verify it again."
        )
    records = [to_dict(verification)]
    for record in reversed(_records(profile)):
        try:
            older = from_dict(record)
        except ProfileError:
            continue
        if _current(profile, older) and older.setting != verification.setting:
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

    It is about the same allocation, the profile's present traces (and harm curves, where budgets go by them), the same
    score (of which harm takes the camera weight alone) and the same weights, and about a sparsity at most `DISTANCE`
    from the one asked for: the nearest, of two as near the sparser one. One of blocks chosen as in the patch goes
    before nearer ones of blocks chosen otherwise, then one of the patch's own block sizes before those of other sizes,
    and without one the others are taken: which heads need how much changes little with the blocks. Only budgets by
    score (``hess``) and by harm at a plain sparsity are verified, so nothing applies to other allocations and rules.

    Args:
        profile: the profile.
        settings: of the patch.
        scoring: of the patch.
        fingerprint: of the model's weights; the profile's own by default.

    Raises:
        ProfileError: a verdict is damaged.
    """
    asked = settings.sparsity
    if asked is None or asked == 0.0 or settings.allocation not in VERIFIED or not _records(profile):
        return None
    score = _what_counts(settings.allocation, scoring.resolved(profile))
    applying = [
        (_distance(found.sparsity, asked), found)
        for found in verifications(profile)
        if found.allocation == settings.allocation
        and _what_counts(found.allocation, found.scoring) == score
        and found.fingerprint == (fingerprint or profile.fingerprint)
        and _current(profile, found)
    ]
    blocks = (settings.block_q, settings.block_k)

    def rank(pair: tuple[float, Verification]) -> tuple[bool, bool, float, float]:
        distance, found = pair
        other = (found.block_q, found.block_k) != blocks
        return found.selection != settings.selection, other, distance, -found.sparsity

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
    if not _current(profile, found):
        what = "traces" if found.traces != traces_digest(profile) else "harm curves"
        return f"for other {what} than these, which says nothing of them ({found.outcome} at {found.sparsity:g})."
    other = "" if found.fingerprint == profile.fingerprint else f"with other weights ({found.fingerprint}), "
    return (
        f"{other}{found.text} Measured {found.date[:10]} on {found.data or 'scenes of no known source'}, blocks "
        f"{found.block_q} x {found.block_k} chosen by {found.selection}; budgets by "
        f"{'harm' if found.allocation == 'harm' else 'score'}: {found.scoring}."
    )


def _current(profile: Profile, found: Verification) -> bool:
    """Whether a verdict is about the traces that the profile has, and about its harm curves if it is about curves."""
    return found.traces == traces_digest(profile) and (found.harm is None or found.harm == harm_digest(profile))


def _what_counts(allocation: str, scoring: Scoring) -> Scoring:
    """The options of a score that an allocation goes by: harm has curves of its own, and needs their mixture only."""
    return Scoring(scoring.camera_weight) if allocation == "harm" else scoring


def _distance(first: float, second: float) -> float:
    return round(abs(first - second), 9)  # 0.83 is not 0.1 from 0.73 in binary


def _records(profile: Profile) -> list[Any]:
    records = profile.metadata.get(KEY, [])
    return records if isinstance(records, list) else [records]  # damaged, which `from_dict` will say
