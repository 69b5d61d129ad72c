"""Trains the demo model on rooms rendered as it goes: `python -m hess_plugin.demo.train --out DIR`.

On a CPU use one single-threaded process per core (`--processes`): they train apart and average their
parameters every few steps, which wastes far less than threads that wait for each other. Killed, the same
command goes on where the last checkpoint left off; changing `--steps` then only stretches or shortens what
remains of the schedule.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist

from hess_plugin.demo.trainer import TrainConfig, Trainer

# Without these glibc returns every large buffer to the system and faults it in again: half the speed.
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}


def _parse(arguments: Sequence[str] | None) -> tuple[TrainConfig, int | None, str]:
    parser = argparse.ArgumentParser(
        prog="python -m hess_plugin.demo.train", description=(__doc__ or "").split("\n")[0]
    )
    for field in fields(TrainConfig):
        name = "--" + field.name.replace("_", "-")
        if field.name == "out":
            parser.add_argument(name, required=True, help="folder of the checkpoints, the weights and the log")
        else:
            parser.add_argument(name, type=type(field.default), default=field.default, help="default: %(default)s")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", default="", help=argparse.SUPPRESS)
    values = vars(parser.parse_args(arguments))
    rank, meeting = values.pop("rank"), values.pop("meeting")
    return TrainConfig(**values), rank, meeting


def _launch(config: TrainConfig, arguments: Sequence[str]) -> int:
    """Start one process per rank and wait; if one fails the others are ended."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    meeting = out / f"meeting-{os.getpid()}"
    environment = {**os.environ, **_MALLOC, "OMP_NUM_THREADS": "1"} if config.device == "cpu" else dict(os.environ)
    command = [
        sys.executable,
        "-m",
        "hess_plugin.demo.train",
        *arguments,
        "--meeting",
        str(meeting.resolve()),
    ]
    # Otherwise a plain kill would skip the `finally` below.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    workers = [subprocess.Popen([*command, "--rank", str(rank)], env=environment) for rank in range(config.processes)]
    try:
        while all(worker.poll() is None for worker in workers):
            time.sleep(0.5)
        if any(worker.poll() for worker in workers):
            return 1
        return max(worker.wait() for worker in workers)
    finally:
        signal.signal(signal.SIGTERM, previous)
        for worker in workers:
            worker.terminate()
        meeting.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry."""
    config, rank, meeting = _parse(arguments)
    if rank is None:
        return _launch(config, list(sys.argv[1:] if arguments is None else arguments))
    if config.device == "cpu":
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
    if config.processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=config.processes)
    launcher = os.getppid()
    # A launcher that was killed outright leaves orphans, which would write into the folder of the next run.
    Trainer(config, rank).run(abandoned=lambda: os.getppid() != launcher)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
