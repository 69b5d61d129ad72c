"""The jobs of the suite: what runs in a process of its own, for how long, and beside what."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from .checks import check_backend, told
from .kernels import time_kernels
from .models import time_models
from .options import KERNELS, Options
from .selection import time_selection
from .selection_checks import check_selection
from .sheet import Sheet
from .tuning import tune
from .waiting import check_waiting


@dataclass(frozen=True)
class Job:
    """One part of the suite.

    Attributes:
        section: what a user asks for it by.
        run: what it does.
        seconds: that it may take, start of its process included.
        timed: whether it times anything, and so must run alone.
    """

    section: str
    run: Callable[[Options, Sheet], None]
    seconds: float
    timed: bool = True


JOBS: dict[str, Job] = {
    **{f"check {name}": Job("check", partial(check_backend, name), 75, timed=False) for name in KERNELS},
    "check selection": Job("check", check_selection, 60, timed=False),
    "check waiting": Job("check", check_waiting, 60, timed=False),
    "kernels": Job("kernels", time_kernels, 190),
    "selection": Job("selection", time_selection, 45),
    "tuning": Job("tuning", tune, 60),
    "models": Job("models", time_models, 110),
}
SECTIONS = tuple(dict.fromkeys(job.section for job in JOBS.values()))
START = 8.0
"""Seconds that a process needs to import torch and to set up the GPU."""


def run_job(name: str, options: Options, sheet: Sheet) -> None:
    """Run one job; what it raises is written to its sheet, so that the others can go on."""
    try:
        JOBS[name].run(replace(options, seconds=options.seconds - START), sheet)
    except Exception as error:  # whatever it is, the other jobs must run
        traceback.print_exc()
        sheet.fail(f"it broke off: {told(error)}")
