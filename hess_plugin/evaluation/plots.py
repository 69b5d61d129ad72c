"""Pictures of a profile and of a comparison, as PNG files."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hess_plugin.scoring import Scoring, error_shares, head_scores

from .canvas import new_figure as _figure
from .canvas import plain
from .canvas import save_figure as _save
from .shown import DENSE, SHOWN, looks

if TYPE_CHECKING:
    from hess_plugin.agreement import Agreement
    from hess_plugin.profiles import Profile

    from .statistics import Summary


def head_sensitivity_map(profile: Profile, path: str | Path, scoring: Scoring | None = None) -> None:
    """Draw the score of every head, layers downwards (the picture of HeSS, fig. 4), and what it is made of.

    Panels: the score, the share of each error that was measured, and the score sorted within each layer, which shows
    how unequal heads are. All have one colour scale; its steps are finer for small shares.

    Args:
        profile: the profile.
        path: PNG file to write.
        scoring: which score; the method with the profile's own camera weight by default.
    """
    scoring = (scoring or Scoring()).resolved(profile)
    scores = head_scores(profile, scoring)
    names = {"camera": "camera error alone", "points": "point error alone"}
    panels = {"score": scores} | {names[error]: share for error, share in error_shares(profile, scoring).items()}
    panels["score, sorted in each layer"] = scores.sort(dim=1, descending=True).values
    figure = _figure(2 + 3.4 * len(panels), max(2.8, 0.22 * len(profile.sites) + 1.5))
    axes = figure.subplots(1, len(panels), sharey=True)
    _heat_maps(figure, axes, list(panels.items()))
    axes[-1].set_xlabel("rank")
    figure.suptitle(f"Head sensitivity: {profile.adapter}, {len(profile.scenes)} scenes; {scoring}", fontsize=11)
    _save(figure, path)


def agreement_map(agreement: Agreement, labels: Sequence[str], path: str | Path) -> None:
    """Draw the scores of two profiles side by side and head against head (the question of HeSS, fig. S1).

    Args:
        agreement: the comparison.
        labels: what to call the two profiles.
        path: PNG file to write.
    """
    figure = _figure(15, max(4.2, 0.22 * len(agreement.sites) + 1.5))
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    _heat_maps(figure, axes[:2], list(zip(labels, agreement.scores, strict=True)))
    axis, (first, second) = axes[2], agreement.scores
    layers = torch.arange(len(first))[:, None].expand_as(first)
    dots = axis.scatter(first.flatten(), second.flatten(), c=layers.flatten(), cmap="viridis", s=16, alpha=0.7)
    largest = 1.05 * max(first.max().item(), second.max().item())
    axis.axline((0, 0), slope=1, color="grey", linewidth=1, linestyle="--")
    axis.set(xlim=(0, largest), ylim=(0, largest), xlabel=f"score, {labels[0]}", ylabel=f"score, {labels[1]}")
    axis.set_box_aspect(1)
    means = f"Spearman {agreement.spearman.nanmean():.2f}, budget moved {agreement.moved.mean():.1%}"
    axis.set_title(f"{means}\n(means of the layers)", fontsize=10)
    figure.colorbar(dots, ax=axis, label="layer", ticks=_ticks(len(first)), shrink=0.7)
    _save(figure, path)


def _heat_maps(figure: Any, axes: Sequence[Any], panels: Sequence[tuple[str, Tensor]]) -> None:
    """Draw shares ``[L, H]`` side by side in one colour scale; grey where a layer has none."""
    from matplotlib.colors import PowerNorm

    scale = PowerNorm(0.5, vmin=0.0, vmax=max(values.nan_to_num().max().item() for _, values in panels))
    for axis, (title, values) in zip(axes, panels, strict=True):
        axis.set_facecolor("lightgrey")
        image = axis.imshow(values.numpy(), aspect="auto", cmap="magma", norm=scale)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("head")
        axis.set_xticks(_ticks(values.shape[1]))
        axis.set_yticks(_ticks(values.shape[0]))
    axes[0].set_ylabel("global attention layer")
    figure.colorbar(image, ax=axes, label="share of the layer", pad=0.01, aspect=30)


def trade_off(
    summaries: Sequence[Summary],
    path: str | Path,
    caption: str = "",
    metrics: Sequence[str] = ("auc30", "point_error"),
) -> None:
    """Draw metrics against measured sparsity, one panel a metric, one line an arm (the picture of HeSS, fig. 6).

    Bars are one standard error of the paired difference to dense: what sparsity did to the same scenes.

    Args:
        summaries: of every arm at every row, and of dense where it was measured.
        path: PNG file to write.
        caption: put above.
        metrics: what to draw.
    """
    figure = _figure(5.2 * len(metrics), 4.6)
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    dense = next((s for s in summaries if s.arm == "dense"), None)
    arms = [arm for arm in dict.fromkeys(s.arm for s in summaries) if arm != "dense"]
    for axis, metric in zip(axes, metrics, strict=True):
        lines = {arm: [_against_dense(s, metric) for s in summaries if s.arm == arm] for arm in arms}
        _curves(axis, lines, SHOWN[metric].factor)
        if dense is not None and not math.isnan(dense.value.mean[metric]):
            height = dense.value.mean[metric] * SHOWN[metric].factor
            axis.axhline(height, color=DENSE.colour, linestyle=DENSE.line, linewidth=1, label="dense")
        axis.set_ylabel(SHOWN[metric].label())
    _legend(figure, axes)
    if caption:
        text = f"{caption} Bars: one standard error of the paired difference to dense."
        figure.suptitle(textwrap.fill(text, 30 * math.ceil(5.2 * len(metrics) / 2)), fontsize=8)
    _save(figure, path)


Point = tuple[float, float, float]
"""Measured sparsity, a figure, and its standard error (NaN where it has none)."""


def difference_plot(lines: Mapping[str, Sequence[Point]], path: str | Path, metric: str, baseline: str) -> None:
    """Draw a metric minus that of a baseline, paired by scene, against measured sparsity.

    Args:
        lines: by arm, in any order of sparsity.
        path: PNG file to write.
        metric: which one.
        baseline: the arm that was taken off, drawn as the line at 0.
    """
    figure = _figure(5.2, 4.6)
    axis = figure.subplots()
    _curves(axis, lines, SHOWN[metric].factor)
    line = looks([baseline])[baseline]
    axis.axhline(0.0, color=line.colour, linewidth=1.5, label=plain(baseline))
    axis.set_ylabel(plain(SHOWN[metric].label(f" minus {baseline}")))
    _legend(figure, [axis])
    _save(figure, path)


def layer_map(layers: Mapping[str, Sequence[float]], path: str | Path) -> None:
    """Draw the measured sparsity of every layer, arms downwards.

    Args:
        layers: by arm, one number for each layer, as many for all.
        path: PNG file to write.
    """
    values = torch.tensor([list(row) for row in layers.values()], dtype=torch.float64)
    figure = _figure(max(5.2, 2.2 + 0.34 * values.shape[1]), 1.5 + 0.3 * len(values))
    axis = figure.subplots()
    image = axis.imshow(values.numpy(), aspect="auto", cmap="viridis", vmin=0.0, vmax=1.0)
    for row, column in torch.cartesian_prod(*map(torch.arange, values.shape)).tolist():
        value = values[row, column].item()
        colour = "black" if value > 0.6 else "white"
        axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    axis.set_yticks(range(len(layers)), [plain(arm) for arm in layers])
    axis.set_xticks(_ticks(values.shape[1]))
    axis.set_xlabel("global attention layer")
    figure.colorbar(image, ax=axis, label="sparsity", pad=0.01, ticks=(0, 0.5, 1))
    _save(figure, path)


def _against_dense(summary: Summary, metric: str) -> Point:
    error = summary.against.get("dense", summary.value).error[metric]
    return summary.value.mean["sparsity"], summary.value.mean[metric], error


def _curves(axis: Any, lines: Mapping[str, Sequence[Point]], factor: float) -> None:
    """Draw one line an arm with its error bars; an arm of which nothing is known is left out."""
    for arm, look in looks(lines).items():
        points = sorted(point for point in lines[arm] if not math.isnan(point[1]))
        if not points:
            continue
        x, y, bars = zip(*points, strict=True)
        axis.errorbar(
            x,
            [factor * value for value in y],
            # A missing bar is a bar of no length: matplotlib warns of NaN.
            yerr=[0.0 if math.isnan(bar) else factor * bar for bar in bars],
            label=plain(arm),
            color=look.colour,
            marker=look.marker,
            linestyle=look.line,
            markerfacecolor=look.colour if look.line == "-" else "none",
            markersize=5,
            linewidth=1.4,
            capsize=2.5,
        )
    axis.set_xlabel("measured sparsity (dropped share of patch-block pairs)")
    axis.grid(alpha=0.3)


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    """One legend for all panels, below them, where it hides no line."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if found:
        shape: dict[str, Any] = {"ncols": 3 * len(axes), "fontsize": 9, "frameon": False}
        figure.legend(found.values(), found.keys(), loc="outside lower center", **shape)


def _ticks(count: int) -> list[int]:
    return list(range(0, count, max(1, count // 12)))
