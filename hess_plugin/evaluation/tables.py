"""Comparisons and profiles as plain text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from hess_plugin.block_choice import choice_text, measured_choice
from hess_plugin.exceptions import ProfileError
from hess_plugin.harm_curves import model_curves
from hess_plugin.presets import PRESETS, preset_name
from hess_plugin.recorded_break_evens import break_evens
from hess_plugin.scoring import ERROR_NAMES, Scoring, error_shares, head_scores
from hess_plugin.settings import DEFAULT_SPARSITY
from hess_plugin.stability import DRAWS, Bootstrap, Halves, bootstrap, split_half
from hess_plugin.verdict import judge
from hess_plugin.verified_profiles import verified_lines

if TYPE_CHECKING:
    from hess_plugin.agreement import Agreement
    from hess_plugin.profiles import Profile

    from .statistics import Summary

Column = tuple[str, str, float, int]
"""Metric, heading, factor, decimals."""
_MIXED: tuple[Column, ...] = (
    ("auc30", "AUC@30", 100.0, 1),
    ("ate", "ATE", 1.0, 4),
    ("point_error", "point error", 1.0, 4),
    ("sparsity", "sparsity", 1.0, 4),
    ("seconds", "seconds", 1.0, 3),
)
_CAMERAS: tuple[Column, ...] = (
    ("sparsity", "sparsity", 1.0, 4),
    *((f"auc{degrees}", f"AUC@{degrees}", 100.0, 1) for degrees in (30, 15, 5, 3)),
    ("ate", "ATE", 1.0, 4),
    ("seconds", "seconds", 1.0, 3),
)
_CLOUDS: tuple[Column, ...] = (
    ("point_error", "point error", 1.0, 4),
    ("accuracy", "accuracy", 1.0, 4),
    ("completeness", "completeness", 1.0, 4),
    ("chamfer", "Chamfer", 1.0, 4),
    ("f1", "F1", 1.0, 3),
)


def comparison_table(summaries: Sequence[Summary]) -> str:
    """Format a comparison as a Markdown table: mean ± standard error, and AUC@30 paired against uniform.

    AUC is in points (0 to 100); ATE and point error are in units of the normalised scene (mean distance of
    true points to the first camera is 1), or in mm by DTU's protocol.
    """
    return _table(summaries, _MIXED, ("auc30", "AUC@30 - uniform", 100.0, 1))


def camera_table(summaries: Sequence[Summary]) -> str:
    """Format what was measured of cameras, AUC in points; paired against uniform."""
    return _table(summaries, _CAMERAS, ("auc30", "AUC@30 - uniform", 100.0, 1))


def cloud_table(summaries: Sequence[Summary]) -> str | None:
    """Format what was measured of clouds, paired against uniform; None where no scene has a true cloud."""
    columns = [column for column in _CLOUDS if any(not math.isnan(s.value.mean[column[0]]) for s in summaries)]
    if not columns:
        return None
    metric = "point_error" if columns[0][0] == "point_error" else "chamfer"
    return _table(summaries, columns, (metric, f"{metric.replace('_', ' ').replace('ch', 'Ch')} - uniform", 1.0, 4))


def _table(summaries: Sequence[Summary], columns: Sequence[Column], paired: Column) -> str:
    headings = ["arm", "target", *(heading for _, heading, _, _ in columns), paired[1]]
    rows = [headings, ["---"] * len(headings)]
    for s in sorted(summaries, key=lambda s: math.inf if math.isnan(s.target) else s.target):
        cells = [s.arm, s.row]
        for metric, _, factor, decimals in columns:
            cells.append(_with_error(s.value.mean[metric] * factor, s.value.error[metric] * factor, decimals))
        uniform, (metric, _, factor, decimals) = s.against.get("uniform"), paired
        cells.append(
            ""
            if uniform is None
            else _with_error(factor * uniform.mean[metric], factor * uniform.error[metric], decimals, signed=True)
        )
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(headings))]
    lines = []
    for row in rows:
        cells = ["-" * w if cell == "---" else cell.ljust(w) for cell, w in zip(row, widths, strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _with_error(value: float, error: float, decimals: int, signed: bool = False) -> str:
    if math.isnan(value):
        return "-"
    text = f"{value:+.{decimals}f}" if signed else f"{value:.{decimals}f}"
    return text if math.isnan(error) else f"{text} ± {error:.{decimals}f}"


def profile_summary(
    profile: Profile, scoring: Scoring | None = None, count: int = 8, draws: int = DRAWS, seed: int = 0
) -> str:
    """Describe a profile in plain text: provenance, how unequal the heads are, which stand out, how sure that is.

    Args:
        profile: the profile.
        scoring: which score; the method with the profile's own camera weight by default.
        count: heads to list at each end.
        draws: resamples of the scenes behind the intervals and the verdict.
        seed: of the resamples.

    Raises:
        ProfileError: the profile has no such score.
    """
    scoring = (scoring or Scoring()).resolved(profile)
    scores, sample = head_scores(profile, scoring), bootstrap(profile, scoring, draws=draws, seed=seed)
    lines = [*_provenance(profile), f"score: {scoring}"]
    effective = (-(scores * scores.clamp(min=1e-300).log()).sum(1)).exp()
    lines.append(
        f"effective heads in a layer (exp of the score's entropy): {effective.min():.2f} to {effective.max():.2f} "
        f"of {profile.num_heads}"
    )
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    shares = error_shares(profile, scoring)
    for title, chosen in (("most", order[:count]), ("least", order[: -count - 1 : -1])):
        lines.append(f"{title} sensitive heads (shares of a layer, {1 / profile.num_heads:.4f} is average):")
        lines += _head_lines(profile, chosen, scores, shares, sample)
    lines.append(_stability_line(profile, split_half(profile, scoring, seed=seed)))
    lines.append(f"scenes: {judge(profile, scoring, sample).text}")
    lines += [_harm_line(profile, scoring)] if profile.has_harm else []
    lines += verified_lines(profile)
    lines += [f"break-even: {one.describe()}" for one in break_evens(profile)]
    return "\n".join(lines)


def _lacking(profile: Profile) -> str:
    """Say how many scenes have one error only: the verdict rests on the others."""
    missing = {error: int(profile.scene_traces(error, "q").isnan().flatten(1).all(1).sum()) for error in ERROR_NAMES}
    parts = [f"{number} without {error} error" for error, number in missing.items() if number]
    return f" ({', '.join(parts)})" if parts else ""


def _provenance(profile: Profile) -> list[str]:
    lines = [
        f"adapter {profile.adapter}, {len(profile.sites)} sites of {profile.num_heads} heads, "
        f"{len(profile.scenes)} scenes{_lacking(profile)}, camera weight {profile.camera_weight:g}",
        f"weights fingerprint {profile.fingerprint}",
    ]
    for key, value in sorted(profile.metadata.items()):
        if key not in ("measured", "verdicts", "break_even", "preset", "harm") and value not in (None, "", {}, []):
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            lines.append(f"{key}: {text}")
    lines.append(_preset_line(profile))
    for name, facts in profile.metadata.get("measured", {}).items():
        lines.append(f"scene {name}: " + "; ".join(f"{k} {_short(v)}" for k, v in facts.items()))
    return lines


def _preset_line(profile: Profile) -> str:
    """Tell how a patch with this profile chooses blocks and divides budgets, if it names no other preset."""
    name = preset_name(profile)
    if name not in PRESETS:
        return f"preset: {name}, which this version does not know; upgrade hess-plugin, or name another at every patch."
    preset = PRESETS[name]
    parts = [f"{side} blocks in {n} parts" for side, n in (("query", preset.parts_q), ("key", preset.parts_k)) if n > 1]
    budgets = "harm" if preset.allocation(profile, DEFAULT_SPARSITY) == "harm" else "score"
    order = [] if preset.block_order == "raster" else [f"{preset.block_order} order"]
    return f"preset: {name} (blocks chosen by {', '.join([preset.selector, *parts, *order])}; budgets by {budgets})"


def _head_lines(
    profile: Profile, chosen: Sequence[int], scores: Tensor, shares: Mapping[str, Tensor], sample: Bootstrap
) -> list[str]:
    """List heads, given by their index in the flattened ``[L, H]``, with their score, its interval, both shares."""
    rows = [["site", "head", "score", f"{sample.level:.0%} interval", *shares]]
    for index in chosen:
        layer, head = divmod(index, profile.num_heads)
        low, high = sample.low[layer, head].item(), sample.high[layer, head].item()
        rows.append(
            [
                profile.sites[layer],
                str(head),
                f"{scores[layer, head]:.4f}",
                "-" if math.isnan(low) else f"{low:.4f} to {high:.4f}",
                *(_share(share[layer, head].item()) for share in shares.values()),
            ]
        )
    return ["  " + line for line in _columns(rows)]


def _stability_line(profile: Profile, halves: Halves) -> str:
    if math.isnan(halves.mean_spearman):
        return "rank stability: cannot tell, there are no two halves of the scenes whose heads could be ordered."
    ordered = halves.spearman.nan_to_num(nan=math.inf)
    worst = int(ordered.argmin())
    return (
        f"rank stability: random halves of the scenes order the heads alike with Spearman {halves.mean_spearman:.2f} "
        f"in the mean of the layers (lowest {ordered[worst]:.2f}, {profile.sites[worst]}) and share "
        f"{halves.mean_overlap:.0%} of the {halves.top} most sensitive heads of a layer; by Spearman-Brown all scenes "
        f"would agree with as many others at {halves.mean_expected:.2f}."
    )


def _harm_line(profile: Profile, scoring: Scoring) -> str:
    try:
        shares, curves = model_curves(profile, scoring.camera_weight)
    except ProfileError as error:
        return f"harm: {error}"
    measured = measured_choice(profile)
    blocks = "blocks (the profile does not tell which)" if measured is None else choice_text(measured)
    parts = curves.sum((1, 2)) / curves.sum()
    return (
        f"harm: of what leaving out {blocks} does, keeping {shares[0]:.3f} to {shares[-1]:.3f} of the pairs, the "
        f"layers have {', '.join(f'{part:.0%}' for part in parts.tolist())}."
    )


def agreement_table(agreement: Agreement, labels: Sequence[str]) -> str:
    """Format how far two profiles agree, layer by layer and in the mean.

    Args:
        agreement: the comparison.
        labels: what to call the two profiles.
    """
    apart = [f"{label} from uniform" for label in labels]
    rows = [["site", "Spearman", f"top {agreement.top} shared", "budget moved", *apart]]
    columns = [agreement.spearman, agreement.overlap, agreement.moved, *agreement.from_uniform]
    for index, site in enumerate(agreement.sites):
        rows.append([site, *(_cell(column[index].item(), i) for i, column in enumerate(columns))])
    rows.append(["mean", *(_cell(column.nanmean().item(), i) for i, column in enumerate(columns))])
    return "\n".join([*_columns(rows), *agreement.notes])


def _cell(value: float, column: int) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:+.2f}" if column == 0 else f"{value:.1%}"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align a table of plain text: the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
