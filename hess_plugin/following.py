"""What a patch does where its profile was shown not to help."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

from .exceptions import PatchError, ProfileError
from .profiles import Profile, weights_fingerprint
from .scoring import Scoring
from .settings import Settings
from .sites import Site
from .verification import Verification
from .verified_profiles import KEY, find_verification

VERDICTS = ("follow", "refuse", "ignore")


def follow(
    profile: Profile, settings: Settings, scoring: Scoring, sites: Sequence[Site], verdict: str, strict: bool
) -> tuple[Settings, str | None]:
    """Step aside to uniform budgets, warn or refuse, as the profile's own verdict has it.

    Args:
        profile: checked against the sites.
        settings: of the patch.
        scoring: of the patch.
        sites: of the model.
        verdict: one of `VERDICTS`; see `hess_plugin.patch`.
        strict: whether the model is known to have the profile's weights.

    Returns:
        The settings to patch with, and why they are not those asked for; None where they are.

    Raises:
        ProfileError: the profile was shown to harm and `verdict` is ``refuse``, or a verdict in it is damaged.
    """
    if verdict == "ignore" or KEY not in profile.metadata:
        return settings, None
    fingerprint = profile.fingerprint if strict else weights_fingerprint(sites)
    found = find_verification(profile, settings, scoring, fingerprint)
    if found is None or found.outcome not in ("harms", "mixed"):
        return settings, None
    text = found.text.removesuffix(".")
    text += _other_blocks(found, settings)
    if found.outcome == "mixed":
        warnings.warn(
            f"Budgets follow this profile, which helps and harms: {text}; leave the profile out for uniform budgets, "
            "or pass verdict='ignore' to hear no more of it.",
            stacklevel=3,
        )
        return settings, None
    if verdict == "refuse":
        raise ProfileError(
            f"this profile {text}; leave it out for uniform budgets, calibrate again, or pass verdict='ignore'."
        )
    warnings.warn(
        f"Budgets are uniform, because this profile {text}; leave it out or calibrate again, or pass verdict='ignore' "
        "to use it all the same.",
        stacklevel=3,
    )
    return dataclasses.replace(settings, allocation="uniform"), text


def _other_blocks(found: Verification, settings: Settings) -> str:
    """What a verdict's blocks were, where they are not those of the patch."""
    size = f"blocks of {found.block_q} x {found.block_k}"
    if found.selection != settings.selection:
        return f" (verified with {size} chosen by {found.selection}, not {settings.selection})"
    same = (found.block_q, found.block_k) == (settings.block_q, settings.block_k)
    return "" if same else f" (verified with {size})"


def check_verdict(verdict: str) -> None:
    """Refuse what is not one of `VERDICTS`.

    Raises:
        PatchError: it is not.
    """
    if verdict not in VERDICTS:
        raise PatchError(f"verdict is {verdict!r}, wanted one of {', '.join(VERDICTS)}.")
