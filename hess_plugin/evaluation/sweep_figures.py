"""The pictures of a sweep's report, one PNG file each, with what they show in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .ablations import PRUNING_ARMS
from .cloud_drawing import draw_clouds
from .cloud_picture import Clouds
from .plots import Point, difference_plot, head_sensitivity_map, layer_map, trade_off
from .shown import SHOWN
from .sweep_results import CLOUDS, SweepResults

CURVES = ("auc30", "auc5", "ate", "point_error", "chamfer", "f1")
PRUNING = ("auc30", "point_error")
DIFFERENCES = ("auc30", "auc5", "point_error", "chamfer")
SECTIONS = ("heads", "curves", "against", "ablations", "pruning", "layers", "clouds")
_ABLATION = "hess "  # how the names of arms with another score begin


@dataclass(frozen=True)
class Picture:
    """One picture of the report.

    Attributes:
        section: where it goes, one of `SECTIONS`.
        file: the PNG file.
        text: what it shows, for those who do not see it.
        wide: whether it has to be scrolled on a small screen.
    """

    section: str
    file: Path
    text: str
    wide: bool = False


def draw_pictures(results: SweepResults, stem: Path, threshold: float | None = None) -> Iterator[Picture]:
    """Draw all pictures that the sweep has the figures for.

    Args:
        results: the sweep.
        stem: files are called ``STEM-<name>.png``.
        threshold: error above which a point of the clouds is coloured; the clouds' own by default.

    Raises:
        SceneError: the clouds are damaged.
    """

    def file(name: str) -> Path:
        return stem.with_name(f"{stem.name}-{name}.png")

    if results.profile is not None:
        head_sensitivity_map(results.profile, path := file("heads"))
        yield Picture("heads", path, "Heat map of the score of every head, layers downwards.", wide=True)
    names = list(dict.fromkeys(s.arm for s in results.summaries if s.arm != "dense"))
    # Pruned heads cost so much that on one axis with them the other arms would fall together.
    pruned = [name for name in names if name in PRUNING_ARMS]
    main = [name for name in names if not name.startswith(_ABLATION) and name not in pruned]
    ablations = [name for name in names if name.startswith(_ABLATION)]
    for section, arms, metrics in (
        ("curves", main, results.known(CURVES)),
        ("pruning", [*(name for name in ("uniform", "hess") if name in main), *pruned], results.known(PRUNING)),
    ):
        chosen = [s for s in results.summaries if s.arm in arms or s.arm == "dense"]
        for metric in metrics if arms and (section == "curves" or pruned) else ():
            trade_off(chosen, path := file(metric if section == "curves" else f"{section}-{metric}"), metrics=(metric,))
            yield Picture(section, path, f"{SHOWN[metric].heading} against measured sparsity, one line an arm.")
    baseline = "hess" if "hess" in main else "uniform"
    for section, arms, base in (
        ("against", main, "uniform"),
        ("ablations", [*ablations, "uniform"] if ablations else [], baseline),
    ):
        for metric in results.known(DIFFERENCES)[:3]:
            lines = _differences(results, arms, base, metric)
            if lines:
                difference_plot(lines, path := file(f"{section}-{metric}"), metric, base)
                text = f"{SHOWN[metric].heading} minus that of {base}, against measured sparsity."
                yield Picture(section, path, text)
    layers = layers_of(results)
    if layers:
        layer_map(layers, path := file("layers"))
        yield Picture("layers", path, f"Measured sparsity of each layer, row {results.rows[-1]}.", wide=True)
    clouds = clouds_of(results)
    if clouds is not None:
        draw_clouds(clouds, path := file("clouds"), threshold)
        yield Picture("clouds", path, f"Predicted clouds of scene {clouds.scene}: {', '.join(clouds.arms)}.", wide=True)


def _differences(results: SweepResults, arms: Sequence[str], base: str, metric: str) -> dict[str, list[Point]]:
    """Points of each arm that was measured in the same rows as the baseline."""
    lines: dict[str, list[Point]] = {}
    for arm in arms:
        for row in results.rows:
            difference, summary = results.minus(arm, base, row), results.summary(arm, row)
            if arm != base and difference is not None and summary is not None and difference.count[metric]:
                point = summary.value.mean["sparsity"], difference.mean[metric], difference.error[metric]
                lines.setdefault(arm, []).append(point)
    return lines


def layers_of(results: SweepResults) -> dict[str, tuple[float, ...]]:
    """Measured sparsity of each layer at the sparsest row, by arm; arms that do not tell it are left out."""
    if not results.rows:
        return {}
    found = {s.arm: s.layers for s in results.summaries if s.row == results.rows[-1] and s.layers}
    length = max(map(len, found.values()), default=0)
    return {arm: layers for arm, layers in found.items() if len(layers) == length}


def clouds_of(results: SweepResults) -> Clouds | None:
    """The clouds that were captured at the end of the sweep, if they were."""
    path = results.folder.path / CLOUDS
    return Clouds.load(path) if path.is_file() else None
