"""Harm curves of a profile: checked, and made into one comparable curve for every head of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .exceptions import ProfileError

if TYPE_CHECKING:
    from .profiles import Profile

HARM_NAMES = ("camera", "points", "shares")


def check_harm(harm: Mapping[str, Tensor], scenes: int, layers: int, heads: int) -> None:
    """Check the curves of a profile; none at all is fine.

    Args:
        harm: as `Profile.harm`.
        scenes: scenes of the profile.
        layers: sites L.
        heads: heads H.

    Raises:
        ProfileError: naming what is wrong.
    """
    if not harm:
        return
    if set(harm) != set(HARM_NAMES):
        raise ProfileError(f"harm curves are {', '.join(HARM_NAMES)}; this profile has {sorted(harm)}.")
    shares = harm["shares"]
    points = shares.shape[-1] if shares.ndim == 2 else 0
    wanted = {"shares": (scenes, points)} | dict.fromkeys(("camera", "points"), (scenes, layers, heads, points))
    for name, shape in wanted.items():
        if points < 1 or tuple(harm[name].shape) != shape:
            raise ProfileError(
                f"harm {name!r} has shape {list(harm[name].shape)}, wanted [scenes, L, H, K] = {[*shape]} and shares "
                "[scenes, K] with K of at least 1."
            )
        if bool((harm[name] < 0).any() | harm[name].isinf().any()):
            raise ProfileError(f"harm {name!r} holds a negative or infinite value; calibrate again.")
        empty = harm[name].isnan().flatten(1)
        if not torch.equal(empty.any(1), empty.all(1)):
            raise ProfileError(f"harm {name!r} is partly not a number in a scene; calibrate again.")
    measured = ~shares.isnan().all(1)
    known = shares[measured]
    if bool((known <= 0).any() | (known > 1).any() | (known[:, 1:] < known[:, :-1]).any()):
        raise ProfileError("harm 'shares' do not ascend from above 0 to at most 1; calibrate again.")
    for name in ("camera", "points"):
        if bool((~harm[name].isnan().flatten(1).all(1) & ~measured).any()):
            raise ProfileError(f"harm {name!r} has a curve in a scene without shares; calibrate again.")


def has_curves(profile: Profile) -> bool:
    """Whether some scene has curves of an error that the profile's camera weight selects."""
    parts = {"camera": profile.camera_weight, "points": 1.0 - profile.camera_weight}
    return profile.has_harm and any(
        part > 0.0 and not bool(profile.harm[error].isnan().flatten(1).any(1).all()) for error, part in parts.items()
    )


def model_curves(profile: Profile, camera_weight: float | None = None) -> tuple[Tensor, Tensor]:
    """Make the curves of both errors and all scenes into one for each head, comparable over the whole model.

    In every scene each error's curves are divided by their sum over all layers, heads and shares, so that neither the
    unit of an error nor a single scene decides; what is left are the heads' parts in the harm of sparsification. They
    are averaged over the scenes that have the error, then mixed by the camera weight. Where scenes were measured at
    different shares (another number of blocks), curves are taken to be straight between shares.

    Args:
        profile: with curves.
        camera_weight: lambda, from 0 (points only) to 1 (camera only); None for the profile's own.

    Returns:
        Kept shares, float64 ``[K]``, strictly ascending, and harm at them, ``[L, H, K]``.

    Raises:
        ProfileError: the profile has no curves, or none of the errors that the weight selects.
    """
    if not profile.has_harm:
        raise ProfileError(
            "allocation 'harm' needs harm curves and this profile was calibrated without them; calibrate again with "
            "--harm (calibrate(..., harm=HarmSettings())), or take allocation 'hess'."
        )
    weight = profile.camera_weight if camera_weight is None else camera_weight
    shares = profile.harm["shares"].double()
    known = shares[~shares.isnan().any(1)]
    # Shares that are one number of blocks differ in their last digits.
    grid = np.unique(known.numpy().round(9))
    mixed = None
    for error, part in (("camera", weight), ("points", 1.0 - weight)):
        mean = _mean(profile.harm[error].double(), shares, grid) if part > 0 else None
        if mean is not None:
            mixed = part * mean + (0.0 if mixed is None else mixed)
    if mixed is None:
        raise ProfileError(
            f"with camera_weight {weight} the profile has no harm curves; calibrate on scenes that have the missing "
            "error and more blocks than every row keeps, or change camera_weight."
        )
    return torch.from_numpy(grid), torch.from_numpy(mixed)


def _mean(curves: Tensor, shares: Tensor, grid: np.ndarray) -> np.ndarray | None:
    """Each scene's curves ``[L, H, K]`` on the grid as parts of their sum, averaged; None if no scene has any."""
    found = []
    for scene, own in zip(curves.numpy(), shares.numpy(), strict=True):
        if np.isnan(scene).any():
            continue
        flat = np.stack([_on_grid(own, curve, grid) for curve in scene.reshape(-1, scene.shape[-1])])
        total = flat.sum()
        if total > 0:
            found.append(flat.reshape(*scene.shape[:-1], -1) / total)
    return np.mean(found, 0) if found else None


def _on_grid(shares: np.ndarray, curve: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """One curve at other shares: straight in between, to no harm at 1, with the first slope below the first share."""
    places, first = np.unique(shares, return_index=True)
    places, values = np.append(places, 1.0), np.append(curve[first], 0.0)
    if places[-2] == 1.0:  # all blocks were kept: no harm
        places, values = places[:-1], np.append(values[:-2], 0.0)
    slope = min(0.0, (values[1] - values[0]) / (places[1] - places[0])) if len(places) > 1 else 0.0
    below = (places[0] - grid).clip(min=0.0)
    return np.interp(grid, places, values) - slope * below
