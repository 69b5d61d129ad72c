"""The report: what all sections found, as JSON and as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hess_plugin.files import write_bytes

from .sheet import write_json
from .verdicts import verdicts

TITLES = {
    "correctness": "Correctness: largest error / largest number, outputs poisoned, two runs",
    "gradients": "Gradients",
    "selection": "Selection against the CPU's",
    "waiting": "Waiting for the GPU inside a patched layer",
    "dense": "Dense attention",
    "attention": "Attention over lists (r: time / (kept x fastest dense))",
    "calls": "Calls of the public function, host included",
    "work order": "Order of work",
    "selection times": "Selection",
    "selection kernels": "Kernels of one selection",
    "tuning": "Tuning: 50 views, ragged, .25 kept",
    "models": "Whole forwards, random weights",
}


def merged(jobs: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Tables of all jobs, those of one name joined."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for job in jobs.values():
        for name, rows in job["tables"].items():
            tables.setdefault(name, []).extend(rows)
    return tables


def write(folder: Path, about: dict[str, Any], jobs: dict[str, dict[str, Any]]) -> None:
    """Write gpu_suite.json and gpu_suite.md atomically."""
    tables = merged(jobs)
    found = verdicts(tables)
    write_json(folder / "gpu_suite.json", {"about": about, "verdicts": found, "jobs": jobs})
    text = "\n".join(_markdown(about, jobs, tables, found)) + "\n"
    write_bytes(folder / "gpu_suite.md", text.encode())


def _markdown(
    about: dict[str, Any],
    jobs: dict[str, dict[str, Any]],
    tables: dict[str, list[dict[str, Any]]],
    found: list[dict[str, Any]],
) -> list[str]:
    lines = ["# Block-sparse attention on a GPU", "", *(f"- {key}: {value}" for key, value in about.items())]
    lines += ["", "## Verdicts", "", *as_table(found)]
    lines += ["", "## Sections", "", *as_table([
        {"section": name, "state": job["state"], "seconds": job["seconds"]} for name, job in jobs.items()
    ])]  # fmt: skip
    failures = [f"- {name}: {text}" for name, job in jobs.items() for text in job["failures"]]
    if failures:
        lines += ["", "## Failures", "", *failures]
    for name, rows in tables.items():
        lines += ["", f"## {TITLES.get(name, name)}", "", *as_table(rows)]
    notes = [f"- {name}: {text}" for name, job in jobs.items() for text in job["notes"]]
    return [*lines, "", "## Notes", "", *notes] if notes else lines


def as_table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table with every key that some row has."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    if not keys:
        return ["Nothing was measured."]
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    return lines + ["| " + " | ".join(_cell(row.get(key)) for key in keys) + " |" for row in rows]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value).replace("|", "/").replace("\n", " ")
