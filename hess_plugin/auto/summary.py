"""The words of `hess-patch run` at a program's end, on standard error, and what it writes into the record."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .environment import ROOT
from .record import add_to_record, read_record
from .saying import say

if TYPE_CHECKING:  # at a program's end nothing may be imported that starts threads, and torch does
    from hess_plugin.report import PatchReport

    from .patcher import AutoPatch, PatchedModel


def finish(made: AutoPatch, record: Path | None, spoken: tuple[str, ...]) -> None:
    """Record what this process patched, and print it unless another process of the same run speaks for all."""
    models = made.used()
    if record is not None and (models or made.refusals):
        try:
            add_to_record(record, _entry(made, models))
        except OSError as error:
            say(f"the report could not be written to {record} ({error.strerror}).")
    if os.environ.get("RANK", "0") != "0":
        return
    for found in models if "patched" in spoken else ():
        say(_described(found))
    if "nothing" in spoken:
        nothing_was_patched(made, None)


def _described(found: PatchedModel) -> str:
    try:
        return describe(found)
    except Exception as error:  # a graphics card that failed the program fails its clocks as well
        return f"{found.name} was patched (adapter {found.adapter}); what it did cannot be read ({_line(error)})."


def describe(found: PatchedModel) -> str:
    """Say in one or two sentences what a patched model did."""
    report = found.patch.report()
    text = f"{found.name} was patched (adapter {found.adapter}, {len(report.sites)} sites)"
    forwards = max(site.calls for site in report.sites)
    unfit = [site for site in report.sites if site.unfit_calls]
    told = f" {sum(s.unfit_calls for s in unfit)} attention calls ran dense: {unfit[0].unfit}" if unfit else ""
    if not forwards:
        return f"{text}.{told}" if told else f"{text} and never called."
    calls = "1 forward" if forwards == 1 else f"{forwards} forwards"
    dense = all(site.calls == site.dense_calls for site in report.sites)
    return f"{text}: {calls}, {_why_dense(report) if dense else _measured(report)}.{told}"


def _why_dense(report: PatchReport) -> str:
    asked = report.settings
    if asked.get("sparsity") == 0.0 or asked.get("sparse_ratio") == 0.0 or asked.get("cdf_threshold") == 1.0:
        return "all of them dense, as asked for"
    if asked.get("dense_below"):
        return f"all of them dense: patching was found to pay from {asked['dense_below']} patch tokens on"
    return "all of them dense: the input is too short to drop anything"


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
        made: of this process, or None if it built no model.
        record: where the other processes noted what they patched.
    """
    if made is not None and (made.models or made.copies):
        return
    others = [] if record is None else read_record(record)
    if any(entry["models"] for entry in others):
        return
    say(f"nothing was patched: {_why(made, others)}")


def _why(made: AutoPatch | None, others: list[dict[str, Any]]) -> str:
    refusals = [*(made.refusals if made is not None else ()), *(text for entry in others for text in entry["refusals"])]
    if refusals:
        return refusals[0]
    if made is not None and made.waiting:
        return f"{made.waiting[0]} was built, but the profile's weights were not loaded and it was never called."
    if made is None and "torch" not in sys.modules:
        return "the program never imported torch."
    if made is not None and made.last_built is None and ROOT not in os.environ:
        return "no model was built after auto_patch was called; call it before the model is built."
    if made is None or made.last_built is None:
        return "the program built no model of its own."
    return (
        f"no adapter knows a model that the program built, the last of which was {made.last_built}; `hess-patch "
        "plugins` lists the adapters, and a new one is one file (hess_plugin/adapters/README.md)."
    )


def _entry(made: AutoPatch, used: list[PatchedModel]) -> dict[str, Any]:
    rank = os.environ.get("RANK")
    models = [_model(found) for found in used]
    return {"process": os.getpid(), "rank": rank, "command": sys.argv, "models": models, "refusals": made.refusals}


def _model(found: PatchedModel) -> dict[str, Any]:
    known: dict[str, Any] = {"class": found.name, "adapter": found.adapter}
    try:
        return {**known, **found.patch.report().to_dict()}
    except Exception as error:
        return {**known, "error": _line(error)}


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
