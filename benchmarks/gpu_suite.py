"""Proves and times the attention kernels on a GPU, in under eight minutes, unattended.

    python benchmarks/gpu_suite.py
    python benchmarks/gpu_suite.py --sections check kernels --views 100
    python benchmarks/gpu_suite.py --device cpu --quick

Sections: check (every backend against float64 on sampled rows, outputs poisoned, run twice; gradients; the selection
against the CPU's; no waiting for the GPU inside a layer), kernels (attention over lists against dense attention),
selection, tuning (orders of work, configurations of the Triton kernel) and models (VGGT and Pi3 with random weights,
where HESS_TEST_VGGT and HESS_TEST_PI3 name checkouts or they are importable). What there is no time for is named in
the report.

Every part runs in a process of its own with a limit of time, so that a kernel that hangs or breaks takes nothing with
it; a backend found to be wrong is not timed. gpu_suite.json and gpu_suite.md are written after every part into --out,
else into $OUT, else into benchmarks/results (with --quick into a new temporary folder). The exit status is 1 if
anything failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

import torch
from gpu import jobs, runner
from gpu.options import Options
from gpu.sheet import Sheet

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    args = parse()
    try:
        device = torch.device(args.device)
    except RuntimeError:
        print(f"--device {args.device} is no device of torch; give cuda, cuda:1, ... or cpu.")
        return 2
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "gpu_suite needs an NVIDIA GPU that torch can use; --device cpu --quick only runs its code on tiny sizes."
        )
        return 2
    if device.type != "cuda" and not args.quick:
        print(f"gpu_suite measures nothing of interest on {device}; add --quick to run its code on tiny sizes.")
        return 2
    if device.type == "cpu":
        torch.set_num_threads(1)
    logging.getLogger("hess_plugin.attention").setLevel(logging.ERROR)  # sparsity of short inputs, told in the tables
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    options = Options(device, args.quick, tuple(args.views), tuple(args.skip), args.seconds)
    if args.job:
        jobs.run_job(args.job, options, Sheet(args.into))
        return 0
    if args.quick and args.out is None and not os.environ.get("OUT"):
        args.out = Path(tempfile.mkdtemp(prefix="gpu-suite-quick-"))  # the folder of results holds measurements
    out = args.out or Path(os.environ.get("OUT") or RESULTS)
    apart = device.type == "cuda" or args.apart
    return runner.run_all(Path(__file__), options, args.sections, out, apart=apart)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=jobs.SECTIONS, default=list(jobs.SECTIONS))
    parser.add_argument("--views", type=int, nargs="+", default=[], help="sizes of kernels and selection, no others")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--out", type=Path, help="folder for gpu_suite.json and gpu_suite.md")
    parser.add_argument("--seconds", type=float, default=465.0, help="that everything may take")
    parser.add_argument("--skip", nargs="+", default=[], help="backends that are not to be timed")
    parser.add_argument("--apart", action="store_true", help="processes of their own on a CPU, too")
    parser.add_argument("--job", choices=list(jobs.JOBS), help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
