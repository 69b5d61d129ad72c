"""Asks what limits budgets by sensitivity on the demo model: their size, their floor, or the scenes behind them.

    python benchmarks/allocation.py --write benchmarks/results/allocation.md

Calibrates on the demo's rooms, then compares, at equal budgets and paired by scene against uniform ones: the score to
several powers (a larger power moves more of the budget), several floors a row, and profiles of few scenes. Differences
in AUC@30 points and in point error x 1000, mean ± standard error over test rooms; the share of the budget that the
profile moves away from equal shares is the mean total variation distance of the layers.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

from hess_plugin import Profile, __version__, calibrate
from hess_plugin.agreement import total_variation
from hess_plugin.demo.model import load_demo_model
from hess_plugin.demo.scenes import RoomScenes
from hess_plugin.evaluation.arms import Arm
from hess_plugin.evaluation.comparison import compare
from hess_plugin.evaluation.metrics import MetricSettings
from hess_plugin.evaluation.statistics import Summary, summarise
from hess_plugin.files import write_bytes
from hess_plugin.machine import describe_machine
from hess_plugin.scoring import head_scores

SPARSITIES = (0.65, 0.75, 0.85)
BLOCK = 8


def main() -> None:
    """Measure and print; write Markdown if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration-scenes", type=int, default=32)
    parser.add_argument("--test-scenes", type=int, default=64)
    parser.add_argument("--views", type=int, default=16)
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_demo_model()
    profile = calibrate(model, RoomScenes("calibration", args.calibration_scenes, args.views))
    headings = ["budgets", "moved", *(f"{what} at {s:g}" for s in SPARSITIES for what in ("AUC@30", "point error"))]
    lines = [
        "# What limits budgets by sensitivity on the demo model",
        "",
        f"{args.calibration_scenes} calibration rooms, {args.test_scenes} test rooms x {args.views} views, blocks of "
        f"{BLOCK}; differences to uniform budgets of the same floor, paired by scene: AUC@30 in points, point error x "
        f"1000. {describe_machine()}; hess-plugin {__version__}. Command: `python benchmarks/allocation.py`",
        "",
        f"| {' | '.join(headings)} |",
        "|---" * len(headings) + "|",
    ]
    scenes = list(RoomScenes("test", args.test_scenes, args.views))
    for name, variant, minimum in variants(profile):
        arms = [Arm(arm, s, arm) for s in SPARSITIES for arm in ("uniform", "hess")]
        rows = compare(
            model,
            scenes,
            arms,
            profile=variant,
            metrics=MetricSettings(clouds=False),
            block_q=BLOCK,
            block_k=BLOCK,
            minimum=minimum,
        )
        lines.append(_line(name, variant, summarise(rows)))
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if args.write:
        write_bytes(args.write, text.encode())


def variants(profile: Profile) -> Iterator[tuple[str, Profile, int]]:
    """Name, profile and floor of every variant."""
    for power in (0.5, 1.0, 1.5, 2.0):
        yield f"score to the power {power:g}", powered(profile, power), 2
    for minimum in (1, 4):
        yield f"floor of {minimum} blocks a row", profile, minimum
    for count in (4, 8):
        yield f"first {count} calibration scenes", first_scenes(profile, count), 2


def powered(profile: Profile, power: float) -> Profile:
    """A profile whose score is the power of another's, up to a factor in each layer."""
    scores = head_scores(profile) ** power
    traces = {name: scores.expand(trace.shape).clone() for name, trace in profile.traces.items()}
    return dataclasses.replace(profile, traces=traces)


def first_scenes(profile: Profile, count: int) -> Profile:
    """The profile of some of its scenes."""
    traces = {name: trace[:count].clone() for name, trace in profile.traces.items()}
    return dataclasses.replace(profile, scenes=profile.scenes[:count], traces=traces)


def _line(name: str, profile: Profile, summaries: list[Summary]) -> str:
    scores = head_scores(profile)
    moved = total_variation(scores, torch.full_like(scores, 1 / profile.num_heads)).mean().item()
    cells = [name, f"{moved:.1%}"]
    for sparsity in SPARSITIES:
        against = next(s for s in summaries if s.arm == "hess" and s.target == sparsity).against["uniform"]
        for metric, factor in (("auc30", 100.0), ("point_error", 1000.0)):
            cells.append(f"{factor * against.mean[metric]:+.2f} ± {factor * against.error[metric]:.2f}")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
