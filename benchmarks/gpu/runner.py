"""Runs the jobs, each in a process of its own, and keeps the report up to date."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hess_plugin_cuda.backends import CHOICE

from . import machine, report
from .jobs import JOBS, START, run_job
from .options import KERNELS, Options
from .sheet import Sheet

_LINES = 3  # of what a failed process printed last


def run_all(script: Path, options: Options, sections: list[str], out: Path, *, apart: bool) -> int:
    """Run the jobs of the sections, write the report after each, and return the exit status.

    Args:
        script: the program that runs one job when asked with `--job`.
        options: of the run; `seconds` is the limit of everything.
        sections: which.
        out: folder of the report.
        apart: whether jobs get processes of their own; else they run here, one after the other.
    """
    about = machine.describe(options.device) | {"command": " ".join(["python", script.name, *sys.argv[1:]])}
    asked = [name for name, job in JOBS.items() if job.section in sections]
    done: dict[str, dict[str, Any]] = {}
    report.write(out, about, done)
    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as folder, _ending_on_termination():
        ways = _apart(script, asked, options, Path(folder)) if apart else _together(asked, options)
        for name, found in ways:
            done[name] = found
            about["seconds"] = round(time.monotonic() - options.started)
            report.write(out, about, {each: done[each] for each in asked if each in done})
            print(f"{name}: {found['state']}, {found['seconds']:.0f} s", *found["failures"], sep="\n  ", flush=True)
    for verdict in [] if options.quick else report.verdicts(report.merged(done)):
        worst = "" if verdict["worst"] is None else f": {verdict['worst']}"
        print(f"{verdict['verdict']}: {verdict['target']}{worst} (limit {verdict['limit']})")
    print(f"written: {out / 'gpu_suite.md'}, {out / 'gpu_suite.json'}")
    return int(any(job["failures"] or job["state"] != "done" for job in done.values()))


def wrong_backends(done: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """Backends whose check failed or did not end: what they would be timed with is not attention."""
    checks = {name: done.get(f"check {name}") for name in KERNELS}
    return tuple(name for name, job in checks.items() if job and (job["failures"] or job["state"] != "done"))


def _together(asked: list[str], options: Options) -> Iterator[tuple[str, dict[str, Any]]]:
    done: dict[str, dict[str, Any]] = {}
    for name in asked:
        started, sheet = time.monotonic(), Sheet()
        skip = (*options.skip, *wrong_backends(done))
        run_job(name, replace(options, skip=skip, seconds=JOBS[name].seconds, started=started), sheet)
        done[name] = {**sheet.data, "state": "done", "seconds": round(time.monotonic() - started, 1)}
        yield name, done[name]


@dataclass
class _Running:
    """A job that runs."""

    name: str
    process: subprocess.Popen[bytes]
    started: float
    limit: float
    sheet: Path
    log: Path

    def found(self, state: str) -> dict[str, Any]:
        """What it has written so far."""
        data: dict[str, Any] = {"tables": {}, "notes": [], "failures": []}
        if self.sheet.is_file():
            data = json.loads(self.sheet.read_text(encoding="utf-8"))
        if state != "done":
            last = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            data["failures"].append(f"{state}; it last printed: {' / '.join(last[-_LINES:]) or 'nothing'}")
        return {**data, "state": state, "seconds": round(time.monotonic() - self.started, 1)}

    def kill(self) -> None:
        """End it and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the driver may take long to go
            self.process.wait(10)


def _apart(script: Path, asked: list[str], options: Options, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run what is not timed side by side, then what is timed, one after the other."""
    done: dict[str, dict[str, Any]] = {}
    batches = [[name for name in asked if not JOBS[name].timed], *([name] for name in asked if JOBS[name].timed)]
    for batch in batches:
        skip = (*options.skip, *wrong_backends(done))
        running: list[_Running] = []
        try:
            for name in batch:
                limit = min(JOBS[name].seconds, options.left)
                if limit < 2 * START:
                    done[name] = {**Sheet().data, "state": "not begun, for want of time", "seconds": 0.0}
                    yield name, done[name]
                    continue
                running.append(_start(script, name, replace(options, skip=skip), limit, folder))
            for name, found in _ended(running):
                done[name] = found
                yield name, found
        finally:
            for job in running:
                job.kill()


def _start(script: Path, name: str, options: Options, limit: float, folder: Path) -> _Running:
    stem = folder / name.replace(" ", "-")
    command = [sys.executable, str(script), "--job", name, "--into", f"{stem}.json", "--device", str(options.device)]
    command += ["--seconds", str(limit)] + ["--quick"] * options.quick
    command += ["--views", *map(str, options.views)] if options.views else []
    command += ["--skip", *options.skip] if options.skip else []
    log = Path(f"{stem}.log")
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=_environment(options)
        )
    return _Running(name, process, time.monotonic(), limit, Path(f"{stem}.json"), log)


def _environment(options: Options) -> dict[str, str]:
    """Of a job: where the choice of a backend would fall on a wrong one, which may hang, it is made here."""
    own = dict(os.environ)
    if options.skip and options.backends():
        own.setdefault(CHOICE, options.backends()[0])
    return own


def _ended(running: list[_Running]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield jobs as they end or are ended."""
    left = list(running)
    while left:
        for job in list(left):
            status = job.process.poll()
            if status is None and time.monotonic() - job.started > job.limit:
                job.kill()
                state = f"killed after {job.limit:.0f} s"
            elif status is None:
                continue
            else:
                state = "done" if status == 0 else f"ended with status {status}"
            left.remove(job)
            yield job.name, job.found(state)
        time.sleep(0.1)


@contextlib.contextmanager
def _ending_on_termination() -> Iterator[None]:
    """Let SIGTERM unwind, so that no process of a job is left behind."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
