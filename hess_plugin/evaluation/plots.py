"""Pictures of a profile and of a comparison, as PNG files."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hess_plugin.exceptions import HessError, MissingDependency
from hess_plugin.files import atomic_path
from hess_plugin.scoring import Scoring, error_shares, head_scores

if TYPE_CHECKING:
    from hess_plugin.agreement import Agreement
    from hess_plugin.profiles import Profile

    from .comparison import Summary

_COLOURS = {"dense": "black", "uniform": "tab:blue", "hess": "tab:red", "reverse": "tab:green"}


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


def trade_off(summaries: Sequence[Summary], path: str | Path, caption: str = "") -> None:
    """Draw accuracy against measured sparsity, one line for each arm (the picture of HeSS, fig. 6).

    Bars are one standard error of the paired difference to dense: what sparsity did to the same scenes.
    """
    panels = (("auc30", 100.0, "camera AUC@30, points (higher is better)"), ("point_error", 1.0, "point error (lower)"))
    figure = _figure(10, 4.6)
    axes = figure.subplots(1, len(panels))
    dense = next((s for s in summaries if s.arm == "dense"), None)
    for axis, (metric, factor, label) in zip(axes, panels, strict=True):
        for arm in dict.fromkeys(s.arm for s in summaries if s.target > 0.0):
            points = sorted((s for s in summaries if s.arm == arm), key=lambda s: s.target)
            bars = [s.against.get("dense", s.value).error[metric] * factor for s in points]
            axis.errorbar(
                [s.value.mean["sparsity"] for s in points],
                [s.value.mean[metric] * factor for s in points],
                yerr=bars,
                label=arm,
                color=_COLOURS.get(arm),
                marker="o",
                capsize=3,
            )
        if dense is not None:
            axis.axhline(
                dense.value.mean[metric] * factor, color=_COLOURS["dense"], linestyle="--", linewidth=1, label="dense"
            )
        axis.set_xlabel("measured sparsity (dropped share of patch-block pairs)")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    text = f"{caption} Bars: one standard error of the paired difference to dense.".strip()
    figure.suptitle(textwrap.fill(text, 150), fontsize=8)
    _save(figure, path)


def _ticks(count: int) -> list[int]:
    return list(range(0, count, max(1, count // 12)))


def _save(figure: Any, path: str | Path) -> None:
    if Path(path).suffix.lower() != ".png":
        raise HessError(f"{path} cannot be written: pictures are PNG files; end the name with .png.")
    with atomic_path(path) as temporary:
        # No version inside: the same figures give the same file.
        figure.savefig(temporary, dpi=130, metadata={"Software": None})


def _figure(width: float, height: float) -> Any:
    """Make a figure without pyplot, whose global state and backend belong to the user."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency("pictures need matplotlib; pip install matplotlib.") from error
    return Figure(figsize=(width, height), layout="constrained")
