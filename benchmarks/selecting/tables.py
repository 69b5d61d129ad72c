"""Tables of the experiment, in Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .cells import BLOCK, MOST_ROUNDS, OTHER_ROUNDS, PARTS, Cell, cells_of
from .comparing import (
    AUC,
    DRIFT,
    POINTS,
    RECALL,
    SECONDS,
    SURE,
    ByScene,
    Estimate,
    Metric,
    difference,
    rank_correlation,
    value,
)
from .records import ABOUT, Journal

_ACCURACY = (AUC, POINTS)


def of_model(
    journal: Journal, about: Mapping[str, Any], parts: Sequence[str], sparsities: Sequence[float] | None, command: str
) -> str:
    """Every table of one model."""
    found = journal.lines
    lines = [
        f"# Selectors, budgets and block maps: {about['file']}",
        "",
        f"{about['calibration_scenes']} calibration rooms, {_scenes(found)} test rooms x {about['views']} views, "
        f"blocks of {BLOCK} x {BLOCK}. AUC@30 in points, point error x 1000; differences paired by scene, mean ± "
        "standard error. Cells of one sparsity keep exactly the same number of block pairs. `restore 4.8`: map of 4 "
        "queries and 8 keys pooled. Drift: mean over patch tokens and layers of what sparsification changes in the "
        "heads' outputs, squared in the metric of W_O and summed over heads; recall: share of the patch queries' true "
        f"attention on patch keys that falls on kept blocks; both on the first {_probed(found)} rooms. ms: attention "
        "of all layers with selection, one thread of a machine that others used as well.",
        f"{about['machine']}; hess-plugin {about['hess_plugin']}. Command: `{command}`",
        "",
    ]
    for part in parts:
        cells = cells_of(part, sparsities)
        lines += [f"## {PARTS[part].title}", ""]
        for sparsity in dict.fromkeys(cell.sparsity for cell in cells if cell.sparsity):
            lines += [*_table(found, [c for c in cells if c.sparsity in (0.0, sparsity)], sparsity), ""]
    return "\n".join([*lines, *_following(found)]) + "\n"


def _scenes(found: Mapping[str, ByScene]) -> int:
    return max((len(lines) for lines in found.values()), default=0)


def _probed(found: Mapping[str, ByScene]) -> int:
    return max((sum(bool(line.drift) for line in lines.values()) for lines in found.values()), default=0)


def _of_usual_rounds(found: Mapping[str, ByScene]) -> dict[str, ByScene]:
    """Without cells that a user cannot choose."""
    return {name: lines for name, lines in found.items() if OTHER_ROUNDS not in name}


def _table(found: Mapping[str, ByScene], cells: Sequence[Cell], sparsity: float) -> list[str]:
    """One sparsity of one part."""
    by_uniform, by_hess = (reference.name for reference in Cell(sparsity).reference)
    references: dict[str, Callable[[Cell], str]] = {
        "uniform + mass": lambda _: by_uniform,
        "hess + mass": lambda _: by_hess,
        "dense": lambda _: "dense",
    }
    if any(cell.rounds is not None for cell in cells):
        references[f"{MOST_ROUNDS} rounds"] = lambda cell: cell.most_rounds.name
    headings = ["cell"]
    for metric in _ACCURACY:
        headings += [metric.heading, *(f"- {name}" for name in references)]
    headings += [DRIFT.heading, f"{RECALL.heading} %", SECONDS.heading]
    rows = []
    for cell in cells:
        lines = found.get(cell.name)
        if not lines:
            continue
        partly = f" ({len(lines)} scenes)" if len(lines) < _scenes(found) else ""
        shown = [cell.combination + partly]
        for metric in _ACCURACY:
            shown.append(_shown(value(lines, metric), metric))
            shown += [
                "-"
                if (name := reference(cell)) == cell.name or name not in found
                else _signed(difference(lines, found[name], metric), metric)
                for reference in references.values()
            ]
        shown += ["-" if cell.sparsity == 0 else _plain(lines, metric) for metric in (DRIFT, RECALL, SECONDS)]
        rows.append(shown)
    return [f"### Sparsity {sparsity:g}", "", *_markdown(headings, rows)]


def _following(found: Mapping[str, ByScene]) -> list[str]:
    """Does accuracy follow drift?"""
    found = _of_usual_rounds(found)
    whole = _scenes(found)  # a cell on other scenes than the rest has no place among their ranks
    cells = {name: lines for name, lines in found.items() if name != "dense" and len(lines) == whole}
    layers = max((len(line.drift) for lines in cells.values() for line in lines.values()), default=0)
    groups: dict[tuple[str, str], list[ByScene]] = {}
    for name, lines in cells.items():
        combination, _, sparsity = name.partition(" @ ")
        for budgets in ("all", combination.split()[0]):
            groups.setdefault((sparsity, budgets), []).append(lines)
    rows = []
    for (sparsity, budgets), members in sorted(groups.items()):
        if len(members) < 3:
            continue
        for metric in _ACCURACY:
            rhos = [rank_correlation(members, metric, layer) for layer in (None, *range(layers))]
            rows.append([sparsity, budgets, str(len(members)), metric.heading, *(f"{rho:+.2f}" for rho in rhos)])
    headings = ["sparsity", "budgets", "cells", "metric", "all layers", *(f"layer {i}" for i in range(layers))]
    about = (
        "Spearman's correlation over cells of accuracy with realised drift, from 1 (the less drift, the more accurate) "
        "to -1."
    )
    return ["## Does accuracy follow drift?", "", about, "", *_markdown(headings, rows)]


def both(*folders: Path) -> str:
    """What wins on both models by more than three standard errors, and what it loses."""
    found = [_of_usual_rounds(Journal(folder).lines) for folder in folders]
    abouts = [json.loads((folder / ABOUT).read_text()) for folder in folders]
    shared = [name for name in found[0] if name in found[1] and name != "dense"]
    lines = [
        "# What wins on both models",
        "",
        f"Model 1: {abouts[0]['file']}; model 2: {abouts[1]['file']}; {abouts[0]['machine']}; hess-plugin "
        f"{abouts[0]['hess_plugin']}. Differences in AUC@30 points and in point error x 1000, paired by scene, mean ± "
        f"standard error. A combination is listed where on both models the same metric is better by more than "
        f"{SURE:g} standard errors, and neither metric on either model is worse by as much; \\* marks what is sure.",
        "",
    ]
    for reference in ("uniform", "hess"):
        rows = _winners(found, shared, reference)
        headings = ["cell", "sparsity", *(f"{m.heading}, model {i}" for m in _ACCURACY for i in (1, 2)), "wins in"]
        lines += [f"## Against {reference} + mass", "", *_markdown(headings, rows), "", *_always(rows, shared), ""]
    return "\n".join([*lines, *_aims(found, shared)]) + "\n"


def _always(rows: Sequence[Sequence[str]], shared: Iterable[str]) -> list[str]:
    """The combinations among winners that win at every sparsity that both models were measured at."""
    sparsities = {name.partition(" @ ")[2] for name in shared}
    won: dict[str, set[str]] = {}
    for combination, sparsity, *_ in rows:
        won.setdefault(combination, set()).add(sparsity)
    names = [f"`{combination}`" for combination, where in won.items() if where == sparsities]
    return [f"At every sparsity ({', '.join(sorted(sparsities))}): {', '.join(names) or 'none'}."]


def _winners(found: Sequence[Mapping[str, ByScene]], shared: Iterable[str], reference: str) -> list[list[str]]:
    rows = []
    for name in shared:
        combination, _, sparsity = name.partition(" @ ")
        baseline = Cell(float(sparsity), allocation=reference).name
        if name == baseline or any(baseline not in lines for lines in found):
            continue
        gaps = {m: [difference(lines[name], lines[baseline], m) for lines in found] for m in _ACCURACY}
        won = [metric.heading for metric, both in gaps.items() if all(gap.better(metric) for gap in both)]
        if won and not any(gap.worse(metric) for metric, both in gaps.items() for gap in both):
            shown = [_signed(gap, metric, mark=True) for metric, both in gaps.items() for gap in both]
            least = min(gap.mean for gap in gaps[AUC])
            rows.append((sparsity, -least, [combination, sparsity, *shown, ", ".join(won)]))
    return [row for _, _, row in sorted(rows)]


def _aims(found: Sequence[Mapping[str, ByScene]], shared: Iterable[str]) -> list[str]:
    """The best cell of each sparsity, by the smaller of its two AUCs against HeSS + mass, against dense."""
    rows = []
    by_sparsity: dict[str, list[str]] = {}
    for name in shared:
        by_sparsity.setdefault(name.partition(" @ ")[2], []).append(name)
    for sparsity, names in sorted(by_sparsity.items()):
        baseline = Cell(float(sparsity), allocation="hess").name
        if any(key not in lines for lines in found for key in (baseline, "dense")):
            continue

        def least(name: str, baseline: str = baseline) -> float:
            return min(difference(lines[name], lines[baseline], AUC).mean for lines in found)

        best = max(names, key=least)
        row = [best.partition(" @ ")[0], sparsity]
        for metric in _ACCURACY:
            for other in (baseline, "dense"):
                row += [_signed(difference(lines[best], lines[other], metric), metric, mark=True) for lines in found]
        rows.append(row)
    columns = [
        f"{metric.heading} - {other}, model {i}"
        for metric in _ACCURACY
        for other in ("hess + mass", "dense")
        for i in (1, 2)
    ]
    about = "The cell of each sparsity with the largest AUC over HeSS + mass on the model where it gains less."
    return ["## The best of each sparsity", "", about, "", *_markdown(["cell", "sparsity", *columns], rows)]


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def _plain(lines: ByScene, metric: Metric) -> str:
    mean = value(lines, metric).mean
    return "-" if math.isnan(mean) else f"{mean:.{metric.decimals}f}"


def _shown(found: Estimate, metric: Metric) -> str:
    return f"{found.mean:.{metric.decimals}f} ± {found.error:.{metric.decimals}f}"


def _signed(found: Estimate, metric: Metric, mark: bool = False) -> str:
    text = f"{found.mean:+.{metric.decimals}f} ± {found.error:.{metric.decimals}f}"
    return f"{text} \\*" if mark and (found.better(metric) or found.worse(metric)) else text
