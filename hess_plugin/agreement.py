"""How far two scores of the same heads agree: their ranks, their most sensitive heads, the budget that moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .exceptions import ProfileError, ProfileMismatch
from .scoring import Scoring, head_scores

if TYPE_CHECKING:
    from .profiles import Profile


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Correlate the ranks of two rows; tied values share their average rank (Spearman's rho with ties).

    Args:
        first: ``[..., H]``.
        second: ``[..., H]``.

    Returns:
        ``[...]`` float64, -1 to 1; NaN where a row has a NaN or all its values are the same.
    """
    one, other = _centred_ranks(first), _centred_ranks(second)
    return (one * other).sum(-1) / (one.square().sum(-1) * other.square().sum(-1)).sqrt()


def _centred_ranks(values: Tensor) -> Tensor:
    """Rank of each value of a row counted from the largest, minus the mean rank."""
    above, tied = _above_and_tied(values)
    # Halves throughout, so a row of equal values gives exact zeros, and a correlation of 0/0.
    return above + (tied + 1) / 2 - (values.shape[-1] + 1) / 2


def top_overlap(first: Tensor, second: Tensor, top: int) -> Tensor:
    """Share of the `top` largest of one row that are among the `top` largest of the other.

    Where a tie straddles the last place, its members share the places left equally: the result is what breaking
    the tie by lot would give in the mean, so rows without any order overlap by ``top / H`` and not by luck.

    Args:
        first: ``[..., H]``.
        second: ``[..., H]``.
        top: how many, 1 to H.

    Returns:
        ``[...]`` float64, 0 to 1; NaN where a row has a NaN.

    Raises:
        ProfileError: `top` is not between 1 and H.
    """
    heads = first.shape[-1]
    if not 1 <= top <= heads:
        raise ProfileError(f"top is {top}, wanted a number of heads from 1 to {heads}.")
    places = [((top - above) / tied).clamp(0, 1) for above, tied in map(_above_and_tied, (first, second))]
    return (places[0] * places[1]).sum(-1) / top


def total_variation(first: Tensor, second: Tensor) -> Tensor:
    """Share of a layer's budget that moves to other heads between two shares: half the sum of the differences.

    Args:
        first: ``[..., H]``, each row summing to 1.
        second: likewise.

    Returns:
        ``[...]``, 0 to 1.
    """
    return (first - second).abs().sum(-1) / 2


def default_top(heads: int) -> int:
    """Number of heads of a layer that count as its most sensitive ones: a quarter, at least one."""
    return max(1, heads // 4)


def _above_and_tied(values: Tensor) -> tuple[Tensor, Tensor]:
    """For each value of a row, how many are larger and how many equal (itself included); NaN in a row with a NaN."""
    values = values.double()
    mine, others = values[..., :, None], values[..., None, :]
    unknown = values.isnan().any(-1, keepdim=True)
    above, tied = ((others > mine).sum(-1).double(), (others == mine).sum(-1).double())
    return above.masked_fill(unknown, torch.nan), tied.masked_fill(unknown, torch.nan)


@dataclass(frozen=True)
class Agreement:
    """How far two profiles of the same sites agree.

    Attributes:
        sites: names of the L sites.
        scores: the two scores, float64 ``[L, H]`` each.
        top: how many heads of a layer count as its most sensitive ones.
        spearman: rank correlation of the heads of each layer, ``[L]``; NaN where all heads of a layer are tied.
        overlap: share of the `top` most sensitive heads that both have, ``[L]``.
        moved: share of the layer's budget that goes to other heads under the other profile, ``[L]`` (before any
            head's budget is capped).
        from_uniform: the same between each profile and equal shares, ``[2, L]``: what there is to agree on.
        notes: what differs between the profiles without making them incomparable, in sentences.
    """

    sites: tuple[str, ...]
    scores: tuple[Tensor, Tensor]
    top: int
    spearman: Tensor
    overlap: Tensor
    moved: Tensor
    from_uniform: Tensor
    notes: tuple[str, ...]


def compare_profiles(
    first: Profile, second: Profile, scoring: Scoring | None = None, top: int | None = None
) -> Agreement:
    """Compare the scores of two profiles of the same sites (the question of HeSS, fig. S1: does the data matter?).

    Args:
        first: one profile.
        second: another, of the same sites and heads; other weights, scenes or errors are noted, not refused.
        scoring: which score of both; the method with each profile's own camera weight by default.
        top: how many heads count as the most sensitive ones; a quarter of the layer by default.

    Raises:
        ProfileMismatch: sites or heads differ; says the first difference.
        ProfileError: a profile has no such score.
    """
    _check_same_sites(first, second)
    scores = head_scores(first, scoring), head_scores(second, scoring)
    top = default_top(first.num_heads) if top is None else top
    uniform = torch.full_like(scores[0], 1 / first.num_heads)
    return Agreement(
        sites=first.sites,
        scores=scores,
        top=top,
        spearman=spearman(*scores),
        overlap=top_overlap(*scores, top),
        moved=total_variation(*scores),
        from_uniform=torch.stack([total_variation(score, uniform) for score in scores]),
        notes=_notes(first, second, scoring or Scoring()),
    )


def _check_same_sites(first: Profile, second: Profile) -> None:
    if len(first.sites) != len(second.sites):
        raise ProfileMismatch(
            f"the first profile has {len(first.sites)} sites, the second {len(second.sites)}; only profiles of the "
            "same model can be compared."
        )
    for index, (one, other) in enumerate(zip(first.sites, second.sites, strict=True)):
        if one != other:
            raise ProfileMismatch(
                f"site {index} is {one!r} in the first profile and {other!r} in the second; only profiles of the same "
                "model can be compared."
            )
    if first.num_heads != second.num_heads:
        raise ProfileMismatch(
            f"the first profile has {first.num_heads} heads a site, the second {second.num_heads}; only profiles of "
            "the same model can be compared."
        )


def _notes(first: Profile, second: Profile, scoring: Scoring) -> tuple[str, ...]:
    notes = []
    if first.adapter != second.adapter:
        notes.append(f"The adapters differ ({first.adapter}, {second.adapter}).")
    if first.fingerprint != second.fingerprint:
        notes.append(
            f"The profiles were calibrated on different weights ({first.fingerprint}, {second.fingerprint}), so the "
            "weights may differ in sensitivity as much as the scenes do."
        )
    weights = [scoring.resolved(profile).camera_weight for profile in (first, second)]
    if weights[0] != weights[1]:
        notes.append(
            f"Each is scored with its own camera weight ({weights[0]:g}, {weights[1]:g}); one can be given for both."
        )
    targets = [profile.metadata.get("target") for profile in (first, second)]
    if "self" in targets and targets[0] != targets[1]:
        notes.append("One was calibrated without ground truth, against the model's own prediction.")
    shared = len(set(first.scenes) & set(second.scenes))
    if shared:
        named = f"{shared} scene names are" if shared > 1 else "1 scene name is"
        notes.append(f"{named} in both, so the two may agree for having seen the same scenes.")
    return tuple(notes)
