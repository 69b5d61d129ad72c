"""The words of `hess-patch run` at a program's end, on standard error, and what it writes into the record."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .record import add_to_record, read_record

if TYPE_CHECKING:  # at a program's end nothing may be imported that starts threads, and torch does
    from hess_plugin.report import PatchReport

    from .patcher import AutoPatch, PatchedModel


def finish(made: AutoPatch, record: Path | None, spoken: tuple[str, ...]) -> None:
    """Record what this process patched, and print it unless another process of the same run speaks for all."""
    if record is not None and (made.models or made.refusals):
        try:
            add_to_record(record, _entry(made))
        except OSError as error:
            sys.stderr.write(f"hess-patch: the report could not be written to {record} ({error.strerror}).\n")
    if os.environ.get("RANK", "0") != "0":
        return
    for found in made.models if "patched" in spoken else ():
        sys.stderr.write(f"hess-patch: {describe(found)}\n")
    if "nothing" in spoken:
        nothing_was_patched(made, None)


def describe(found: PatchedModel) -> str:
    """Say in one or two lines what a patched model did."""
    report = found.patch.report()
    text = f"{found.name} was patched (adapter {found.adapter}, {len(report.sites)} sites)"
    forwards = max(site.calls for site in report.sites)
    if not forwards:
        return f"{text} and never called."
    dense = all(site.calls == site.dense_calls for site in report.sites)
    result = "all of them dense: the input is too short to drop anything" if dense else _measured(report)
    calls = "1 forward" if forwards == 1 else f"{forwards} forwards"
    lines = [f"{text}: {calls}, {result}."]
    unfit = [site for site in report.sites if site.unfit_calls]
    if unfit:
        lines.append(f"{sum(s.unfit_calls for s in unfit)} attention calls ran dense: {unfit[0].unfit}")
    return " ".join(lines)


def _measured(report: PatchReport) -> str:
    asked = report.settings.get("sparsity")
    wanted = "" if asked is None else f" ({asked:g} asked for)"
    return (
        f"measured sparsity {report.sparsity:.4f}{wanted}, budgets {report.allocation}, backend {report.backend}, "
        f"{report.seconds:.2f} s in attention"
    )


def nothing_was_patched(made: AutoPatch | None, record: str | None) -> None:
    """Say so, and why, if no process of this run patched anything.

    Args:
        made: of this process, or None if it never imported torch.
        record: where the other processes noted what they patched.
    """
    if made is not None and made.models:
        return
    others = [] if record is None else read_record(record)
    if any(entry["models"] for entry in others):
        return
    sys.stderr.write(f"hess-patch: nothing was patched: {_why(made, others)}\n")


def _why(made: AutoPatch | None, others: list[dict[str, Any]]) -> str:
    refusals = [*(made.refusals if made is not None else ()), *(text for entry in others for text in entry["refusals"])]
    if refusals:
        return refusals[0]
    if made is not None and made.waiting:
        return f"{made.waiting[0]} was built, but the profile's weights were not loaded and it was never called."
    if made is None:
        return "the program never imported torch."
    if made.last_built is None:
        return "the program built no model of its own."
    kind = made.last_built
    return (
        f"no adapter knows a model that the program built, the last of which was {kind.__name__} ({kind.__module__}); "
        "`hess-patch plugins` lists the adapters, and a new one is one file (hess_plugin/adapters/README.md)."
    )


def _entry(made: AutoPatch) -> dict[str, Any]:
    models = [
        {"class": found.name, "adapter": found.adapter, **found.patch.report().to_dict()} for found in made.models
    ]
    rank = os.environ.get("RANK")
    return {"process": os.getpid(), "rank": rank, "command": sys.argv, "models": models, "refusals": made.refusals}
