"""The arms of a sweep by name: ways to divide budgets, and ablations of the score."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from hess_plugin.profiles import Profile
from hess_plugin.scoring import NORMALISATIONS, Scoring
from hess_plugin.sites import PROJECTIONS

from .arms import Arm

BLOCK_ARMS = ("uniform", "equal", "hess", "harm", "reverse", "uncapped", "random")
PRUNING_ARMS = ("michel", "kwon", "kwon-tuned")
CAMERA_WEIGHTS = (0.0, 0.5, 1.0)


def named_arms(names: Sequence[str]) -> list[Arm]:
    """One arm for each name: an allocation, or a baseline that prunes heads."""
    return [
        Arm(name, pruning=name) if name in PRUNING_ARMS else Arm(name, allocation=name) for name in dict.fromkeys(names)
    ]


def ablations(
    profile: Profile,
    *,
    camera_weights: Iterable[float] = (),
    projections: Iterable[str] = (),
    normalisations: Iterable[str] = (),
    patch_rows: bool = False,
) -> list[Arm]:
    """Arms with budgets by another score, changed in one respect from the profile's own (HeSS, sec. 4.7).

    What changes nothing is left out.

    Args:
        profile: whose camera weight the others have.
        camera_weights: lambdas.
        projections: whose traces.
        normalisations: how the errors are made comparable.
        patch_rows: whether to add the score of the gradient through patch rows alone.
    """
    own = Scoring().resolved(profile)
    changed = {
        **{f"hess camera {weight:g}": replace(own, camera_weight=weight) for weight in camera_weights},
        **{_by(name): replace(own, projection=name) for name in projections},
        **{f"hess {name}": replace(own, normalisation=name) for name in normalisations},
        **({"hess patch rows": replace(own, rows="patch")} if patch_rows else {}),
    }
    return [Arm(name, allocation="hess", scoring=score) for name, score in changed.items() if score != own]


def _by(projection: str) -> str:
    """Name of an arm by these traces."""
    return f"hess W_{projection.upper()}" if projection in PROJECTIONS else f"hess {projection}"


def all_ablations(profile: Profile) -> list[Arm]:
    """Every ablation that the profile has the traces for."""
    return ablations(
        profile,
        camera_weights=CAMERA_WEIGHTS,
        projections=(*PROJECTIONS, *(["output"] if profile.has_outputs else [])),
        normalisations=NORMALISATIONS,
        patch_rows=profile.has_patch_rows,
    )
