"""Comparisons and profiles as plain text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hess_plugin.profiles import Profile

    from .comparison import Summary

# metric, heading, factor, decimals
_COLUMNS = (
    ("auc30", "AUC@30", 100.0, 1),
    ("ate", "ATE", 1.0, 4),
    ("point_error", "point error", 1.0, 4),
    ("sparsity", "sparsity", 1.0, 4),
    ("seconds", "seconds", 1.0, 3),
)


def comparison_table(summaries: Sequence[Summary]) -> str:
    """Format a comparison as a Markdown table: mean ± standard error, and AUC@30 paired against uniform.

    AUC is in points (0 to 100); ATE and point error are in units of the normalised scene (mean distance of
    true points to the first camera is 1).
    """
    headings = ["arm", "target", *(heading for _, heading, _, _ in _COLUMNS), "AUC@30 - uniform"]
    rows = [headings, ["---"] * len(headings)]
    for s in sorted(summaries, key=lambda s: s.target):
        cells = [s.arm, f"{s.target:g}"]
        for metric, _, factor, decimals in _COLUMNS:
            cells.append(_with_error(s.value.mean[metric] * factor, s.value.error[metric] * factor, decimals))
        uniform = s.against.get("uniform")
        cells.append(
            ""
            if uniform is None
            else _with_error(100 * uniform.mean["auc30"], 100 * uniform.error["auc30"], 1, signed=True)
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


def profile_summary(profile: Profile, camera_weight: float | None = None, count: int = 8) -> str:
    """Describe a profile in plain text: provenance, how unequal the heads are, the most and least sensitive ones."""
    scores = profile.scores(camera_weight)
    weight = profile.camera_weight if camera_weight is None else camera_weight
    heads = profile.num_heads
    flat = sorted(
        ((scores[layer, head].item(), layer, head) for layer in range(len(scores)) for head in range(heads)),
        reverse=True,
    )
    effective = (-(scores * scores.clamp(min=1e-300).log()).sum(1)).exp()
    lines = [
        f"adapter {profile.adapter}, {len(profile.sites)} sites of {heads} heads, {len(profile.scenes)} scenes, "
        f"camera weight {weight:g}",
        f"weights fingerprint {profile.fingerprint}",
    ]
    for key, value in sorted(profile.metadata.items()):
        if key != "measured" and value not in (None, "", {}, []):
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            lines.append(f"{key}: {text}")
    for name, facts in profile.metadata.get("measured", {}).items():
        lines.append(f"scene {name}: " + "; ".join(f"{k} {_short(v)}" for k, v in facts.items()))
    lines.append(
        f"effective heads in a layer (exp of the score's entropy): {effective.min():.2f} to {effective.max():.2f} "
        f"of {heads}"
    )
    for title, chosen in (("most sensitive", flat[:count]), ("least sensitive", flat[: -count - 1 : -1])):
        lines.append(f"{title} heads (share of the layer's score; {1 / heads:.4f} is average):")
        lines += [f"  {profile.sites[layer]} head {head}: {score:.4f}" for score, layer, head in chosen]
    return "\n".join(lines)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
