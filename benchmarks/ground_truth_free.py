"""Compares ways to calibrate without ground truth with calibrating against it, on the demo model.

    python benchmarks/ground_truth_free.py --write benchmarks/results/ground_truth_free.md

Protocol: synthetic rooms, their truth hidden from every way but the first. A way scores all heads (camera weight 0.5)
from `--rooms` calibration rooms, and every score is held against that of ground truth on as many other rooms: rank
correlation (Spearman) and shared top quarter of the heads of a layer, share of the budget that moves, each a mean over
layers. So the row of ground truth itself is what agreement between rooms can be. ± is the standard deviation over
bootstrap draws of both sets of rooms; differences are paired, within the draw. The ways that draw or perturb are tried
with residuals in all directions and, as the kept one has them, along the normals of the predicted surface only. The
second table exchanges the two sets of rooms: nothing was chosen on those that it scores. The last table patches the
model by the profiles on test rooms, every budget equal, differences paired by room, with standard errors.

Seconds are medians over rooms, of the query traces alone. The ways that draw take one forward and two backward passes
like ground truth, whose alignment weighs much beside a model this small; those that perturb take one forward more;
sparsifying heads one by one takes a forward a head (384 for VGGT) and no backward pass.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from ways_without_truth import BLOCK, OneHead, Residual, Target, aligned, along_normals, drawn, fitted, perturbed

import hess_plugin
from hess_plugin.agreement import spearman, top_overlap, total_variation
from hess_plugin.calibration.errors import EPS, Errors, scene_errors
from hess_plugin.calibration.fisher import head_traces, only_sites_require_grad
from hess_plugin.calibration.self_target import image_seed, predicted_surface, self_errors
from hess_plugin.demo.model import load_demo_model
from hess_plugin.demo.scenes import RoomScenes
from hess_plugin.evaluation.arms import Arm
from hess_plugin.evaluation.comparison import compare
from hess_plugin.evaluation.records import Measurement
from hess_plugin.interception import intercept
from hess_plugin.machine import describe_machine
from hess_plugin.plugins import resolve_adapter
from hess_plugin.predictions import Prediction
from hess_plugin.profiles import Profile, weights_fingerprint
from hess_plugin.scenes.scene import Scene
from hess_plugin.scoring import ERROR_NAMES
from hess_plugin.sites import PROJECTIONS

TRUTH, KEPT, REMOVAL = "ground truth", "views displaced, along normals (kept)", "heads sparsified one by one"
BOOTSTRAP = 200
CONFIRM_FROM = 64  # calibration rooms before this one were looked at while choosing
OUTCOMES = (TRUTH, KEPT, "white noise", "white noise, along normals", "half of the views, along normals", REMOVAL)


@dataclass
class Way:
    """One way to score heads: traces `[L, H]` of (camera, points) a room, and the seconds they took."""

    traces: list[tuple[Tensor, Tensor]]
    seconds: list[float]

    def shares(self, rooms: Sequence[int]) -> Tensor:
        """Shares `[3, L, H]` of the camera trace, the point trace and their mean, over some rooms."""
        means = [torch.stack([self.traces[i][error] for i in rooms]).mean(0) for error in (0, 1)]
        camera, points = (mean / mean.sum(-1, keepdim=True) for mean in means)
        return torch.stack([camera, points, (camera + points) / 2])


class Bench:
    """The demo model and how a room goes through it."""

    def __init__(self) -> None:
        self.model = load_demo_model()
        self.adapter = resolve_adapter(self.model)
        self.sites = self.adapter.sites(self.model)

    def predict(self, images: Tensor) -> Prediction:
        """Run the model on images `[S, 3, H, W]`."""
        return self.adapter.predict(self.model, images)

    def trace(self, error: Tensor, weights: Sequence[nn.Parameter]) -> Tensor:
        """Squared gradient of each head's query projection `[L, H]`."""
        return head_traces(error, self.sites, weights, retain_graph=True)["q"]

    def profile(self, way: Way) -> Profile:
        """A profile of all rooms of a way; the traces of keys and values, which nothing reads, repeat the queries'."""
        rooms = range(len(way.traces))
        both = [torch.stack([way.traces[i][error] for i in rooms]) for error in (0, 1)]
        traces = {f"{e}.{p}": t.clone() for e, t in zip(ERROR_NAMES, both, strict=True) for p in PROJECTIONS}
        names, fingerprint = tuple(site.name for site in self.sites), weights_fingerprint(self.sites)
        return Profile("vggt", names, both[0].shape[-1], tuple(map(str, rooms)), traces, 0.5, fingerprint)


# ---------------------------------------------------------------- one room, all ways


def measure(bench: Bench, room: Scene, ways: dict[str, Way], few: bool) -> None:
    """Add one room to the ways: to ground truth and the kept one only, or to all."""
    generator = torch.Generator().manual_seed(image_seed(room.images))
    with only_sites_require_grad(bench.model, bench.sites) as weights:
        started = time.perf_counter()
        prediction = bench.predict(room.images)
        forward = time.perf_counter() - started

        def add(name: str, find: Callable[[], tuple[Tensor, Tensor]], extra: float = 0.0) -> None:
            began = time.perf_counter()
            camera, points = find()
            traces = bench.trace(camera, weights), bench.trace(points, weights)
            way = ways.setdefault(name, Way([], []))
            way.traces.append(traces)
            way.seconds.append(forward + extra + time.perf_counter() - began)

        add(TRUTH, lambda: both_of(scene_errors(prediction, room)))
        add(KEPT, lambda: both_of(self_errors(prediction, name=room.name, seed=image_seed(room.images))))
        if few:
            return
        surface = predicted_surface(prediction, seed=0, max_points=None, far=math.inf)
        if len(surface.at) != prediction.confidence.numel():
            raise SystemExit(f"{room.name}: some predicted points have no normal, residuals cannot be laid on them.")

        def pulled(residual: Residual) -> tuple[Tensor, Tensor]:
            """Errors whose gradient is J^T r."""
            points, cameras = (part.float() for part in residual)
            return (prediction.centres * cameras).sum(), (prediction.points.flatten(0, 2) * points).sum()

        for name, residual in drawn(surface, generator):
            add(name, lambda r=residual: pulled(aligned(surface, r)))
            if name != "views displaced":  # that one is the kept way
                add(f"{name}, along normals", lambda r=residual: pulled(fitted(surface, r)))
        began = time.perf_counter()
        with torch.no_grad():
            for name, targets in perturbed(bench.model, bench.adapter.predict, room.images, generator):
                extra = time.perf_counter() - began
                with torch.enable_grad():
                    both = [target.residual(prediction, surface.unit) for target in targets]
                    residual = (sum(r[0] for r in both), sum(r[1] for r in both))
                    add(name, lambda r=residual: pulled(r), extra)
                    add(f"{name}, along normals", lambda r=residual: pulled(along_normals(surface, r, EPS)), extra)
                began = time.perf_counter()


def both_of(errors: Errors) -> tuple[Tensor, Tensor]:
    assert errors.camera is not None and errors.points is not None
    return errors.camera, errors.points


@torch.inference_mode()
def remove_blocks(bench: Bench, room: Scene, ways: dict[str, Way]) -> None:
    """Sparsify one head at a time and note how far cameras and points move: no gradient, many forwards."""
    started = time.perf_counter()
    dense = bench.predict(room.images)
    unit = float((dense.points - dense.centres[0]).norm(dim=-1).mean())
    everyone = torch.arange(len(dense.centres))
    moved = torch.zeros(2, len(bench.sites), bench.sites[0].num_heads, dtype=torch.float64)
    attends = [OneHead() for _ in bench.sites]
    undo = [intercept(site, attend) for site, attend in zip(bench.sites, attends, strict=True)]
    for layer, attend in enumerate(attends):
        for head in range(moved.shape[2]):
            attend.head = head
            sparse = bench.predict(room.images)
            points, cameras = Target(sparse.points, sparse.centres, everyone).residual(dense, unit)
            moved[:, layer, head] = torch.stack([cameras.norm(dim=-1).mean(), points.norm(dim=-1).mean()])
        attend.head = None
    for replaced in undo:
        replaced.remove()
    way = ways.setdefault(REMOVAL, Way([], []))
    way.traces.append((moved[0], moved[1]))
    way.seconds.append(time.perf_counter() - started)


# ---------------------------------------------------------------- tables


def agreement(ways: dict[str, Way], reference: Way, seed: int) -> list[str]:
    """Every way against ground truth on other rooms, the closest first."""
    here, there = len(ways[TRUTH].traces), len(reference.traces)
    wanted = reference.shares(range(there))
    generator = torch.Generator().manual_seed(seed)
    draws: dict[str, list[Tensor]] = {name: [] for name in ways}
    for _ in range(BOOTSTRAP):
        mine, others = (torch.randint(n, (n,), generator=generator).tolist() for n in (here, there))
        drawn_reference = reference.shares(others)
        for name, way in ways.items():
            draws[name].append(compared(way.shares(mine), drawn_reference))
    values = {name: compared(way.shares(range(here)), wanted) for name, way in ways.items()}
    found = []
    for name, way in ways.items():
        value, drawn_values = values[name], torch.stack(draws[name])
        sd, gap = drawn_values.std(0), (value - values[KEPT])[0, 2]
        gap_sd = (drawn_values - torch.stack(draws[KEPT]))[:, 0, 2].std()
        cells = [f"{value[0, i]:.2f} ± {sd[0, i]:.2f}" for i in range(3)]
        cells += ["" if name == KEPT else f"{gap:+.2f} ± {gap_sd:.2f}"]
        cells += [f"{value[1, 2]:.2f}", f"{value[2, 2]:.3f} ± {sd[2, 2]:.3f}", f"{statistics.median(way.seconds):.2f}"]
        found.append((float(value[0, 2]), f"| {name} | {' | '.join(cells)} |"))
    return [
        "| way | camera | points | mixed | mixed - kept | top 2 of 8 | budget moved | seconds |",
        "|---|---|---|---|---|---|---|---|",
        *(line for _, line in sorted(found, key=lambda f: -f[0])),
    ]


def compared(one: Tensor, other: Tensor) -> Tensor:
    """Spearman, overlap of the top 2 and budget moved `[3, 3]`, mean over layers, of camera, points, mixed."""
    return torch.stack(
        [m.mean(-1) for m in (spearman(one, other), top_overlap(one, other, 2), total_variation(one, other))]
    )


def few_rooms(ways: dict[str, Way], seed: int) -> list[str]:
    """How well a few rooms, scored by truth or without, foretell the ground-truth scores of all other rooms."""
    total = len(ways[TRUTH].traces)
    generator = torch.Generator().manual_seed(seed)
    lines = ["| rooms | ground truth | kept way |", "|---|---|---|"]
    for count in [c for c in (1, 2, 4, 8, 16, 32) if c <= total // 2]:
        found: dict[str, list[float]] = {TRUTH: [], KEPT: []}
        for _ in range(60):
            order = torch.randperm(total, generator=generator).tolist()
            wanted = ways[TRUTH].shares(order[count:])
            for name, values in found.items():
                values.append(float(compared(ways[name].shares(order[:count]), wanted)[0, 2]))
        cells = [f"{statistics.fmean(v):.2f} ± {statistics.stdev(v):.2f}" for v in found.values()]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return lines


def outcome(bench: Bench, ways: dict[str, Way], count: int, views: int) -> list[str]:
    """AUC@30 and point error of the patched model, against uniform budgets and against ground truth's."""
    scenes = [RoomScenes("test", count, views)[i].normalised() for i in range(count)]
    sparsities, blocks = (0.73, 0.85), {"block_q": BLOCK, "block_k": BLOCK}
    rows = compare(bench.model, scenes, [Arm("uniform", s, "uniform") for s in sparsities], **blocks)
    names = [name for name in OUTCOMES if name in ways]
    for name in names:
        arms = [Arm(name, s, "hess") for s in sparsities]
        rows += compare(bench.model, scenes, arms, profile=bench.profile(ways[name]), **blocks)
    lines = [
        "| budgets by | sparsity | AUC@30 | - uniform | - ground truth | point error | - uniform | - ground truth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for sparsity in sparsities:
        for name in ("uniform", *names):
            mine = select(rows, name, sparsity)
            cells = []
            for metric, factor, digits in (("auc30", 100.0, 1), ("point_error", 1.0, 4)):
                values = [factor * getattr(m, metric) for m in mine]
                cells.append(f"{statistics.fmean(values):.{digits}f}")
                for base in ("uniform", TRUTH):
                    others = [factor * getattr(m, metric) for m in select(rows, base, sparsity)]
                    gaps = [value - other for value, other in zip(values, others, strict=True)]
                    error = statistics.stdev(gaps) / math.sqrt(len(gaps))
                    cells.append("" if name == base else f"{statistics.fmean(gaps):+.{digits}f} ± {error:.{digits}f}")
            lines.append(f"| {name} | {sparsity:g} | {' | '.join(cells)} |")
    return lines


def select(rows: Sequence[Measurement], arm: str, sparsity: float) -> list[Measurement]:
    """Measurements of one arm, in the order of rooms."""
    return [m for m in rows if m.arm == arm and m.target == sparsity]


def main() -> None:
    """Measure and print; write Markdown if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", type=int, default=32, help="calibration rooms, and as many to confirm on")
    parser.add_argument("--test", type=int, default=40, help="test rooms")
    parser.add_argument("--views", type=int, default=16, help="images of a room")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap; residuals are seeded by the images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench()
    ways: dict[str, Way] = {}
    confirmed: dict[str, Way] = {}
    rooms = RoomScenes("calibration", CONFIRM_FROM + args.rooms, args.views)
    for index in range(args.rooms):
        room = rooms[index].normalised()
        measure(bench, room, ways, few=False)
        remove_blocks(bench, room, ways)
        measure(bench, rooms[CONFIRM_FROM + index].normalised(), confirmed, few=True)
        print(f"room {index + 1} of {args.rooms}", file=sys.stderr, flush=True)
    both = {n: Way(ways[n].traces + confirmed[n].traces, []) for n in (TRUTH, KEPT)}
    last = CONFIRM_FROM + args.rooms - 1
    text = "\n".join(
        [
            "# Calibration without ground truth",
            "",
            f"{describe_machine()}. hess-plugin {hess_plugin.__version__}, demo model, float32, {args.views} views a "
            "room; what each column is: the head of benchmarks/ground_truth_free.py.",
            f"Command: python benchmarks/ground_truth_free.py {' '.join(sys.argv[1:])}".rstrip(),
            "",
            f"Calibration rooms 0 to {args.rooms - 1} against the ground truth of rooms {CONFIRM_FROM} to {last}: rank "
            "correlation of cameras, points and both; top and moved budget of both; seconds a room:",
            "",
            *agreement(ways, confirmed[TRUTH], args.seed),
            "",
            f"Rooms {CONFIRM_FROM} to {last} against the ground truth of rooms 0 to {args.rooms - 1}:",
            "",
            *agreement(confirmed, ways[TRUTH], args.seed),
            "",
            "A few of all these rooms against the ground truth of all others: rank correlation of both, mean ± "
            "standard deviation over 60 draws of rooms:",
            "",
            *few_rooms(both, args.seed),
            "",
            f"The patched model on {args.test} test rooms, blocks {BLOCK} x {BLOCK}, mean ± standard error of paired "
            "differences; AUC in points, larger is better; point error in units of the scene, smaller is better:",
            "",
            *outcome(bench, ways, args.test, args.views),
            "",
        ]
    )
    print(text)
    if args.write:
        args.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
