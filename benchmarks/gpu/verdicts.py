"""What was measured against what was aimed at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
MET, MISSED, UNKNOWN = "met", "MISSED", "not measured"
_LIMITS = {"cuda_sm90": (1.15, 1.0), "triton": (1.45, 1.25)}


def verdicts(tables: dict[str, list[Row]]) -> list[Row]:
    """One row for each target: what it is, the worst that was measured, whether it is met.

    Args:
        tables: rows of all sections, by name of the table.
    """
    attention = tables.get("attention", [])
    large = [row for row in attention if row["views"] >= 100]
    found = []
    for backend, (must, stretch) in _LIMITS.items():
        rows = [row for row in large if row["backend"] == backend]
        found.append(_at_most(f"{backend}: t / (kept x best dense), 100 views and more", rows, "r", must))
        found.append(_at_most(f"{backend}: the same, hoped for", rows, "r", stretch))
        found.append(_flat(backend, rows))
    full = [row for row in attention if row["backend"] == "by dispatch" and row["share"] == 1.0]
    found.append(_at_most("everything kept, by dispatch: t / best dense", full, "of_dense", 1.03))
    found += _selection(tables.get("selection times", []), attention)
    for name, table, good in (
        ("every backend right, repeatably", "correctness", "right"),
        ("gradients right", "gradients", "right"),
        ("selection equal to the CPU's", "selection", "equal"),
        ("no waiting for the GPU in a layer", "waiting", "never waits"),
    ):
        found.append(_all(name, tables.get(table, []), good))
    return found


def _row(target: str, value: object, limit: object, verdict: str, where: str = "") -> Row:
    return {"target": target, "worst": value, "limit": limit, "verdict": verdict, "where": where}


def _at_most(target: str, rows: Iterable[Row], key: str, limit: float) -> Row:
    worst = max(rows, key=lambda row: row[key], default=None)
    if worst is None:
        return _row(target, None, limit, UNKNOWN)
    return _row(target, worst[key], limit, MET if worst[key] <= limit else MISSED, _where(worst))


def _where(row: Row) -> str:
    return ", ".join(f"{row[key]} {key}" if key in ("views",) else f"{row[key]}"
                     for key in ("views", "share", "spread", "lists", "part") if key in row)  # fmt: skip


def _flat(backend: str, rows: list[Row]) -> Row:
    """How much slower, for what it computes, a backend is at a kept share of .05 to 1 than at its best."""
    target = f"{backend}: time for a kept pair, slowest / fastest from 1 to .05 kept"
    worst, where = 0.0, ""
    for views in {row["views"] for row in rows}:
        own = [r for r in rows if r["views"] == views and r["share"] >= 0.05
               and (r["spread"], r["lists"]) == ("uniform", "random")]  # fmt: skip
        if len(own) > 1:
            ratio = max(r["r"] for r in own) / min(r["r"] for r in own)
            worst, where = max((worst, where), (ratio, f"{views} views"))
    if not worst:
        return _row(target, None, 1.1, UNKNOWN)
    return _row(target, round(worst, 3), 1.1, MET if worst <= 1.1 else MISSED, where)


def _selection(times: list[Row], attention: list[Row]) -> list[Row]:
    """Time of the selection beside the attention that it feeds, and its memory at 1000 views."""
    target, shares = "selection / attention at 10 % kept, 100 views and more", []
    for row in times:
        if row["part"] == "whole" and row["views"] >= 100:
            fed = _attention_ms(row, times, attention)
            if fed:
                shares.append({"views": row["views"], "part": row["part"], "value": row["ms"] / fed})
    worst = max(shares, key=lambda row: row["value"], default=None)
    if worst is None:
        found = [_row(target, None, 0.05, UNKNOWN)]
    else:
        met = MET if worst["value"] <= 0.05 else MISSED
        found = [_row(target, round(worst["value"], 4), 0.05, met, _where(worst))]
    memory = [row for row in times if row["views"] == 1000 and row["part"] == "whole" and row["peak_gib"] is not None]
    return [
        *found,
        _at_most("memory of the selection at 1000 views, 16 heads, its result included, GiB", memory, "peak_gib", 2.0),
    ]


def _attention_ms(row: Row, times: list[Row], attention: list[Row]) -> float | None:
    """Milliseconds of the attention that a selection feeds: of the same heads, the fastest way."""
    own = [t["ms"] for t in times if t["views"] == row["views"] and t["part"] == "attention"]
    if own:
        return float(own[0])
    rows = [a for a in attention if a["views"] == row["views"] and a["share"] == 0.1]
    return min((float(a["ms"]) * row["heads"] / a["heads"] for a in rows), default=None)


def _all(target: str, rows: list[Row], good: str) -> Row:
    asked = [row for row in rows if not str(row["result"]).startswith("refused")]
    bad = [row for row in asked if row["result"] != good]
    if not asked:
        return _row(target, None, "all", UNKNOWN)
    where = ", ".join(sorted({str(row.get("backend", row.get("rule", row.get("what", "")))) for row in bad}))
    return _row(target, f"{len(asked) - len(bad)} of {len(asked)}", "all", MISSED if bad else MET, where)
