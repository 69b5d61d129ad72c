"""The report of a sweep: one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import importlib.resources
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hess_plugin.exceptions import MissingDependency
from hess_plugin.files import write_bytes

from .shown import SHOWN, looks
from .statistics import Summary
from .sweep import Cell
from .sweep_figures import SECTIONS, Picture, clouds_of, draw_pictures
from .sweep_results import SweepResults, direction
from .sweep_words import (
    calibration_command,
    calibration_facts,
    clouds_caption,
    definitions,
    facts,
    no_clouds,
    protocol,
    warnings,
)

TEMPLATE = "report.html"


@dataclass(frozen=True)
class Entry:
    """One figure of the table.

    Attributes:
        value: mean and standard error.
        difference: to uniform, likewise; empty where there is none.
        verdict: ``better``, ``worse`` or nothing.
    """

    value: str
    difference: str = ""
    verdict: str = ""


def write_report(path: Path, output: Path | None = None, *, threshold: float | None = None) -> list[Path]:
    """Write the report of a sweep, finished or not, and its pictures beside it.

    The same folder gives the same bytes.

    Args:
        path: the sweep's folder.
        output: HTML file to write; ``report.html`` in the folder by default.
        threshold: error above which points of the clouds are coloured, in the clouds' unit; their own by default.

    Returns:
        The files, the page first.

    Raises:
        SceneError: no sweep, no finished cell, or a damaged file.
        ProfileError: the copy of the profile is damaged.
        MissingDependency: matplotlib or Jinja is not installed.
    """
    output = output or path / "report.html"
    results = SweepResults.load(path)
    pictures = list(draw_pictures(results, output.with_suffix(""), threshold))
    command = shlex.join(["hess-patch", "report", str(path), "-o", str(output)])
    command += "" if threshold is None else f" --threshold {threshold:g}"
    write_bytes(output, _page(results, pictures, threshold, command).encode())
    return [output, *(picture.file for picture in pictures)]


def _page(results: SweepResults, pictures: list[Picture], threshold: float | None, command: str) -> str:
    plan, clouds = results.folder.plan, clouds_of(results)
    metrics = results.known([metric for metric in SHOWN if metric != "sparsity"])
    shown: dict[str, Any] = {
        "title": f"{plan.get('model', 'a model')} on {plan.get('data', 'scenes')}",
        "headline": results.headline,
        "warnings": warnings(results),
        "facts": facts(results),
        "pictures": {
            section: [(picture, _embedded(picture)) for picture in pictures if picture.section == section]
            for section in SECTIONS
        },
        "sparsest": results.rows[-1] if results.rows else "",
        "metrics": [SHOWN[metric] for metric in metrics],
        "rows": _rows(results, metrics),
        "clouds": no_clouds(results) if clouds is None else clouds_caption(clouds, threshold),
        "definitions": definitions(results),
        "protocol": protocol(results),
        "commands": _commands(results, command),
        "calibration": {} if results.profile is None else calibration_facts(results.profile),
    }
    return _render(shown)


def _commands(results: SweepResults, command: str) -> dict[str, str]:
    calibrate = None if results.profile is None else calibration_command(results.profile)
    found = {"Calibrate (put together from what the profile records)": calibrate}
    found |= {"Sweep": results.folder.about.get("command"), "Report": command}
    return {title: str(text) for title, text in found.items() if text}


def _rows(results: SweepResults, metrics: tuple[str, ...]) -> list[dict[str, Any]]:
    """The table: dense, then each row with its arms."""
    colours = {arm: look.colour for arm, look in looks(s.arm for s in results.summaries).items()}
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell, summary in zip(results.cells, results.summaries, strict=True):
        label = "dense" if cell.arm.dense else f"row {summary.row}"
        line = {
            "arm": summary.arm,
            "colour": colours[summary.arm],
            "sparsity": _with_error(summary, "sparsity").removesuffix(" ± 0.0000"),
            "unmatched": _unmatched(cell),
            "entries": [_entry(summary, metric) for metric in metrics],
        }
        groups.setdefault(label, []).append(line)
    return [{"label": label, "arms": arms} for label, arms in groups.items()]


def _unmatched(cell: Cell) -> str:
    return "" if cell.matched else f"not matched, {cell.gap:+.4f}"


def _entry(summary: Summary, metric: str) -> Entry:
    against = summary.against.get("uniform")
    value = _with_error(summary, metric)
    # Passes of a sweep follow one another, so that seconds of two arms are not side by side.
    if summary.arm == "dense" or metric == "seconds" or against is None or not against.count[metric]:
        return Entry(value)
    shown, where = SHOWN[metric], direction(against, metric)
    text = shown.number(against.mean[metric], signed=True)
    if not math.isnan(against.error[metric]):
        text += f" ± {shown.number(against.error[metric])}"
    return Entry(value, text + (" *" if where else ""), {1: "better", -1: "worse", 0: ""}[where])


def _with_error(summary: Summary, metric: str) -> str:
    shown, value = SHOWN[metric], summary.value
    if math.isnan(value.mean[metric]):
        return "–"  # noqa: RUF001 (a dash is what a table has where nothing is known)
    text = shown.number(value.mean[metric])
    return text if math.isnan(value.error[metric]) else f"{text} ± {shown.number(value.error[metric])}"


def _embedded(picture: Picture) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.file.read_bytes()).decode()}"


def _render(shown: dict[str, Any]) -> str:
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependency("a report needs Jinja; pip install jinja2.") from error
    text = importlib.resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    # Names of scenes, arms and files come from anywhere: everything is escaped.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text).render(shown)
