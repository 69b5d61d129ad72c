"""How a score is made of raw traces: which traces, how the two errors are made comparable, how they are mixed."""

from __future__ import annotations

import dataclasses
import numbers
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .exceptions import ProfileError
from .sites import PROJECTIONS

if TYPE_CHECKING:
    from .profiles import Profile

ERROR_NAMES = ("camera", "points")
TRACES = (*PROJECTIONS, "output")
NORMALISATIONS = ("sum", "scene", "raw", "linear", "softmax", "log")
ROWS = ("all", "patch")


@dataclass(frozen=True)
class Scoring:
    """Which score to make of a profile's traces; checked when made.

    The method is the default. ``scene`` is ours; the others are ablations that HeSS names without a formula (sec. 4.7:
    raw traces; Table 1: linear, softmax, log), so what they compute is our reading. With ``t`` the mean trace of each
    head of a layer for one error, each error's heads get the values

    - ``sum``: ``t / sum(t)`` (HeSS, eq. 7 and 8);
    - ``scene``: the mean over scenes of ``t_s / sum(t_s)``, t_s the trace of scene s, so that no scene outweighs the
      others; a scene without gradient in a layer is left out there;
    - ``raw``: ``t``, so that the error with the larger gradients outweighs the other;
    - ``linear``: ``t / max(t)``;
    - ``softmax``: ``softmax(t / mean(t))``, very unequal where one head stands out;
    - ``log``: ``log(1 + t / mean(t))``, nearly equal for all heads.

    The score is ``camera_weight * camera values + (1 - camera_weight) * point values``, divided by its sum over the
    heads of the layer. All but ``raw`` are free of the size and unit of an error, and each gives shares of a layer.

    Attributes:
        camera_weight: lambda of HeSS, eq. 9, from 0 (points only) to 1 (camera only); None for the profile's own.
        projection: whose traces: ``q`` (the method), the published ablations ``k`` and ``v``, or ``output``, which
            asks no weight but what sparsification changes: the squared gradient by the head's attention output, summed
            over patch tokens.
        normalisation: ``sum`` (the method), ``scene``, ``raw``, ``linear``, ``softmax`` or ``log``.
        rows: ``all`` takes the gradient through every token's row (the method). ``patch`` takes what went through
            the rows of patch tokens alone: special queries stay dense whatever the sparsity, so their gradient says
            nothing about dropping blocks. ``output`` is of patch tokens by itself and leaves no such choice.
    """

    camera_weight: float | None = None
    projection: str = "q"
    normalisation: str = "sum"
    rows: str = "all"

    def __post_init__(self) -> None:
        weight = self.camera_weight
        if weight is not None and (
            not isinstance(weight, numbers.Real) or isinstance(weight, bool) or not 0.0 <= weight <= 1.0
        ):
            raise ProfileError(f"camera_weight {weight} was given, wanted a number from 0 (points) to 1 (camera).")
        for name, known in (("projection", TRACES), ("normalisation", NORMALISATIONS), ("rows", ROWS)):
            if getattr(self, name) not in known:
                raise ProfileError(f"{name} {getattr(self, name)!r} was given, wanted one of {', '.join(known)}.")
        if self.projection == "output" and self.rows != "all":
            raise ProfileError(
                f"rows {self.rows!r} was given with projection 'output', which is of patch tokens alone by itself; "
                "leave rows at 'all'."
            )

    def resolved(self, profile: Profile) -> Scoring:
        """Fill in the profile's own camera weight where none is given."""
        return (
            self if self.camera_weight is not None else dataclasses.replace(self, camera_weight=profile.camera_weight)
        )

    def __str__(self) -> str:
        weight = (
            "the profile's camera weight" if self.camera_weight is None else f"camera weight {self.camera_weight:g}"
        )
        return f"{weight}, projection {self.projection}, normalisation {self.normalisation}, rows {self.rows}"


def trace_name(error: str, projection: str, rows: str) -> str:
    """Name of a trace in a profile.

    ``<error>.<projection>``, with ``.patch`` for the gradient through patch rows; ``<error>.output``.
    """
    return f"{error}.{projection}" if rows == "all" else f"{error}.{projection}.{rows}"


def mix(camera: Tensor, points: Tensor, camera_weight: float, normalisation: str) -> Tensor:
    """Mix the mean traces of both errors into shares of a layer (see `Scoring`).

    Where an error has no gradient in a layer, its 0/0 would tell nothing about the heads: the other error's share
    alone is the score there.

    Args:
        camera: mean traces ``[..., L, H]`` float64, NaN throughout a layer where there are none; for ``scene`` the
            mean of `scene_shares`.
        points: likewise.
        camera_weight: lambda, 0 to 1.
        normalisation: one of `NORMALISATIONS`.

    Returns:
        ``[..., L, H]``, each row summing to 1; NaN in a layer without gradient in an error that the weight selects.
    """
    mixed = camera_weight * _values(camera, normalisation) + (1.0 - camera_weight) * _values(points, normalisation)
    return mixed / mixed.sum(-1, keepdim=True)


def _values(trace: Tensor, normalisation: str) -> Tensor:
    """Make one error comparable: ``[..., H]``, zero where the layer has no gradient."""
    total = trace.sum(-1, keepdim=True)
    if normalisation in ("sum", "scene"):
        values = trace / total
    elif normalisation == "raw":
        values = trace
    elif normalisation == "linear":
        values = trace / trace.amax(-1, keepdim=True)
    else:
        relative = trace / trace.mean(-1, keepdim=True)
        values = relative.softmax(-1) if normalisation == "softmax" else relative.log1p()
    return torch.where(_is_known(total), values, 0.0)


def _is_known(total: Tensor) -> Tensor:
    """Whether shares of a total tell anything."""
    # A comparison with NaN is false, too. Below the smallest normal number a quotient has lost its digits.
    return total >= sys.float_info.min


def scene_shares(traces: Tensor) -> Tensor:
    """Shares of the heads in each layer of each scene: ``[scenes, L, H]``, NaN where a layer has no gradient.

    Args:
        traces: ``[scenes, L, H]``, NaN throughout a scene without the error.
    """
    total = traces.sum(-1, keepdim=True)
    return torch.where(_is_known(total), traces / total, torch.nan)


def head_scores(profile: Profile, scoring: Scoring | None = None) -> Tensor:
    """Compute the score of every head (HeSS, eq. 7 to 9, by default).

    Args:
        profile: the traces.
        scoring: which score; the method with the profile's own camera weight by default.

    Returns:
        float64 ``[L, H]``, each row summing to 1.

    Raises:
        ProfileError: the profile lacks the traces, or a layer has no gradient in the errors that the weight selects.
    """
    scoring = (scoring or Scoring()).resolved(profile)
    scores = _mixed_means(profile, scoring)
    empty = scores.isnan().any(-1).tolist()
    if any(empty):
        raise ProfileError(
            f"with camera_weight {scoring.camera_weight} the profile has no gradient at "
            f"{profile.sites[empty.index(True)]} ({sum(empty)} of {len(empty)} sites); calibrate on scenes that have "
            "the missing error or change camera_weight."
        )
    return scores


def error_shares(profile: Profile, scoring: Scoring | None = None) -> dict[str, Tensor]:
    """Score the heads by each measured error alone.

    Args:
        profile: the traces.
        scoring: which score; its camera weight plays no part.

    Returns:
        By error (``camera``, ``points``; one that no scene has is left out) float64 ``[L, H]``, each row summing to 1,
        or NaN where the layer has no gradient.
    """
    scoring = scoring or Scoring()
    alone = {"camera": 1.0, "points": 0.0}
    return {
        error: _mixed_means(profile, dataclasses.replace(scoring, camera_weight=alone[error]))
        for error in ERROR_NAMES
        if profile.mean_traces(error, scoring.projection, scoring.rows) is not None
    }


def _mixed_means(profile: Profile, scoring: Scoring) -> Tensor:
    means = [_mean(profile, error, scoring) for error in ERROR_NAMES]
    missing = torch.full((len(profile.sites), profile.num_heads), torch.nan, dtype=torch.float64)
    camera, points = (missing if mean is None else mean.double() for mean in means)
    assert scoring.camera_weight is not None
    return mix(camera, points, scoring.camera_weight, scoring.normalisation)


def _mean(profile: Profile, error: str, scoring: Scoring) -> Tensor | None:
    """What `mix` takes of one error, ``[L, H]``, or None if no scene has it."""
    mean = profile.mean_traces(error, scoring.projection, scoring.rows)
    if mean is None or scoring.normalisation != "scene":
        return mean
    traces = profile.scene_traces(error, scoring.projection, scoring.rows).double()
    return scene_shares(traces).nanmean(0).nan_to_num(0.0)
