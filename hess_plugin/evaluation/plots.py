"""Pictures of a profile and of a comparison, as PNG files."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hess_plugin.exceptions import HessError, MissingDependency
from hess_plugin.files import atomic_path

if TYPE_CHECKING:
    from hess_plugin.profiles import Profile

    from .comparison import Summary

_COLOURS = {"dense": "black", "uniform": "tab:blue", "hess": "tab:red", "reverse": "tab:green"}


def head_sensitivity_map(profile: Profile, path: str | Path, camera_weight: float | None = None) -> None:
    """Draw the score of every head, layers downwards (the picture of HeSS, fig. 4).

    Heads are sorted within each layer in a second panel, which shows how unequal they are.
    """
    scores = profile.scores(camera_weight)
    weight = profile.camera_weight if camera_weight is None else camera_weight
    height = max(2.6, 0.22 * len(profile.sites) + 1.4)
    figure = _figure(10, height)
    axes = figure.subplots(1, 2, sharey=True)
    ordered = scores.sort(dim=1, descending=True).values
    for axis, values, title in ((axes[0], scores, "by head index"), (axes[1], ordered, "sorted in each layer")):
        image = axis.imshow(values.numpy(), aspect="auto", cmap="magma", vmin=0.0)
        axis.set_title(title)
        axis.set_xlabel("head" if axis is axes[0] else "rank")
        axis.set_xticks(_ticks(profile.num_heads))
    axes[0].set_ylabel("global attention layer")
    axes[0].set_yticks(_ticks(len(profile.sites)))
    figure.colorbar(image, ax=axes, label="HeSS (share of the layer)")
    figure.suptitle(
        f"Head sensitivity: {profile.adapter}, {len(profile.scenes)} scenes, camera weight {weight:g}", fontsize=11
    )
    _save(figure, path)


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
