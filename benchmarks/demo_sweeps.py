"""Makes everything that RESULTS.md quotes, on the demo model; about two hours on one core, resumable.

    python benchmarks/demo_sweeps.py -o sweeps

Calibrates on rooms and on halls (a family of scenes that the model was not trained on), sweeps four sparsities and the
16 rows of the paper with every arm and ablation, swaps the profiles of the two families, judges the findings, and asks
what limits the budgets. Each step is a `hess-patch` command or a benchmark of this folder, printed before it runs.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SPARSITIES = ("0.5", "0.65", "0.75", "0.85")
ARMS = ("uniform", "equal", "hess", "reverse", "uncapped", "random", "michel", "kwon", "kwon-tuned")
BLOCKS = ("--block-q", "8", "--block-k", "8", "--max-points", "20000")


def main() -> None:
    """Run every step; a step that is done already takes no time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for everything")
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for family, split in (("rooms", "calibration"), ("halls", "hall-calibration")):
        if not (output / f"{family}.hess").exists():
            _patch(output, "calibrate", "--data", f"rooms:{split},count=32", "-o", f"{family}.hess")
    gates = ("--calibration-data", "rooms:calibration,count=32")
    everything = (*_each("--arm", ARMS), "--ablations", *gates)
    plain = _each("--sparsity", SPARSITIES)
    _sweep(output, "sparsities", "rooms", "test,count=64", *plain, *everything)
    for scenes, split in (("rooms", "test"), ("halls", "hall-test")):
        for profile in ("rooms", "halls"):
            arms = _each("--arm", ("uniform", "hess"))
            _sweep(output, f"{scenes}-by-{profile}", profile, f"{split},count=64", *plain, *arms)
    _sweep(output, "paper", "rooms", "test,count=32", "--paper", *everything)
    swaps = [("rooms", "rooms-by-rooms", "rooms-by-halls"), ("halls", "halls-by-halls", "halls-by-rooms")]
    swapped = [part for swap in swaps for part in ("--swap", *swap)]
    _python(output, "findings.py", "sparsities", "paper", *swapped, "--write", "findings.md")
    _python(output, "allocation.py", "--write", "allocation.md")


def _each(option: str, values: Sequence[str]) -> list[str]:
    return [part for value in values for part in (option, value)]


def _sweep(output: Path, folder: str, profile: str, split: str, *arguments: str) -> None:
    common = ("--profile", f"{profile}.hess", "--data", f"rooms:{split}", *BLOCKS)
    _patch(output, "sweep", *common, *arguments, "-o", folder)


def _patch(output: Path, command: str, *arguments: str) -> None:
    _run(output, [sys.executable, "-m", "hess_plugin.cli"], "hess-patch", [command, "--model", "demo", *arguments])


def _python(output: Path, script: str, *arguments: str) -> None:
    _run(output, [sys.executable, str(HERE / script)], f"python benchmarks/{script}", list(arguments))


def _run(output: Path, program: Sequence[str], shown: str, arguments: Sequence[str]) -> None:
    """Run one step in the output folder; stop with its exit code if it fails."""
    print(f"\n$ {shown} {shlex.join(arguments)}", flush=True)
    code = subprocess.run([*program, *arguments], cwd=output, check=False).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
