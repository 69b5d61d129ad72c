"""Measures selectors x allocations x block maps on the demo model: accuracy, realised drift, recalled attention.

    python benchmarks/block_selectors.py -o DIR --part main maps combined sensitivity --write results.md
    python benchmarks/block_selectors.py -o OTHER --weights seed1.safetensors --part main maps
    python benchmarks/block_selectors.py --both DIR OTHER --write both.md

Calibrates on 32 rooms once, with harm curves, then measures every cell of the parts that are asked for on 64 other
rooms. Cells of one sparsity keep exactly the same number of block pairs in the whole model, which is checked in every
forward. Differences are paired by scene, mean ± standard error. A kill loses one forward: the same command goes on
where it was, and what is measured takes no time again. Drift and recall are measured beside the first --drift-scenes
forwards of a cell, by dense attention on the same q, k and v.

--both prints, from two folders, what wins by more than three standard errors on both models.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import torch
from selecting import tables
from selecting.cells import PARTS, cells_of
from selecting.experiment import Experiment, Scenes
from selecting.records import check_same

from hess_plugin import __version__
from hess_plugin.demo.model import load_demo_model
from hess_plugin.demo.scenes import RoomScenes
from hess_plugin.files import write_bytes
from hess_plugin.machine import describe_machine
from hess_plugin.profiles import model_digest


def main() -> None:
    """Measure what is missing and print; write Markdown if asked."""
    parser = _parser()
    args = parser.parse_args()
    if (args.output is None) == (args.both is None):
        parser.error("give either -o DIR or --both DIR1 DIR2")
    torch.set_num_threads(1)
    text = tables.both(*args.both) if args.both else _measured(args)
    print(text)
    if args.write:
        write_bytes(args.write, text.encode())


def _measured(args: argparse.Namespace) -> str:
    model = load_demo_model(weights=args.weights)
    test = RoomScenes("test", args.scenes, args.views)
    scenes = Scenes(RoomScenes("calibration", args.calibration_scenes, args.views), test, test.names)
    about = {
        "weights": model_digest(model),
        "views": args.views,
        "calibration_scenes": args.calibration_scenes,
        "file": "the shipped demo model" if args.weights is None else args.weights.name,
        "machine": describe_machine(),
        "hess_plugin": __version__,
    }
    check_same(args.output, about)
    experiment = Experiment(model, scenes, args.output, args.drift_scenes, lambda line: print(line, flush=True))
    if not args.show:
        for part in args.part:
            experiment.run(cells_of(part, args.sparsity))
    return tables.of_model(experiment.journal, about, args.part, args.sparsity, _command(args))


def _command(args: argparse.Namespace) -> str:
    """The command that makes the tables again; folders are the reader's own."""
    shown = ["python", "benchmarks/block_selectors.py", "-o", "DIR"]
    shown += [] if args.weights is None else ["--weights", args.weights.name]
    for name, usual in (("scenes", 64), ("views", 16), ("calibration_scenes", 32), ("drift_scenes", 16)):
        if getattr(args, name) != usual:
            shown += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    shown += ["--sparsity", *map(str, args.sparsity)] if args.sparsity else []
    return shlex.join([*shown, "--part", *args.part])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="folder for profiles and measurements")
    parser.add_argument("--weights", type=Path, help="safetensors file of another demo model")
    parser.add_argument("--scenes", type=int, default=64, help="test rooms")
    parser.add_argument("--views", type=int, default=16, help="images of a room")
    parser.add_argument("--calibration-scenes", type=int, default=32, help="rooms to calibrate on")
    parser.add_argument("--drift-scenes", type=int, default=16, help="of these, with drift and recall")
    parser.add_argument("--sparsity", type=float, nargs="+", help="instead of those of the parts")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=["main"], help="what to measure")
    parser.add_argument("--show", action="store_true", help="measure nothing; tables of what there is")
    parser.add_argument("--both", type=Path, nargs=2, metavar=("DIR1", "DIR2"), help="folders of two models")
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    return parser


if __name__ == "__main__":
    main()
