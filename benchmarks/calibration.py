"""What calibrating costs and what a profile is worth: memory, speed, exactness, stability.

    python benchmarks/calibration.py --write benchmarks/results/calibration.md

Sections (all by default, `--only` chooses):

lean        `memory="lean"` beside `"plain"` on the demo model and, where their code is importable (or named by
            `--repo`), on VGGT and Pi3 cut down to two or four layers (and two of the
            image encoder) with random weights: bytes of tensors alive at
            once in a real run (weights left out), seconds of a scene as the median ratio of alternating runs, scenes a
            minute, largest difference of a trace relative to the largest trace.
size        VGGT-1B and Pi3 at full size, run on tensors without values: weights and what else is alive at once, in
            bfloat16 autocast as a GPU would do it (heads in float32), for growing views and resolutions. Nothing is
            allocated; a GPU's context and fragmentation come on top.
saved       the same count in real runs at reduced size on this machine, beside the estimate: VGGT-1B, random weights,
            float32.
rows        scores from all rows of W_Q's gradient beside those from patch tokens' rows alone, on the demo model: rank
            correlation and what the patched model makes of it.
stability   halves of the calibration set, their size varied, on the demo model.
self        calibration without ground truth, its ranks beside those of ground truth, on the demo model.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hess_plugin
from hess_plugin.calibration.estimate import estimate
from hess_plugin.calibration.live_memory import LiveMemory
from hess_plugin.calibration.measuring import Protocol, measuring
from hess_plugin.demo.model import load_demo_model
from hess_plugin.demo.scenes import RoomScenes
from hess_plugin.evaluation.arms import Arm
from hess_plugin.evaluation.comparison import compare
from hess_plugin.evaluation.statistics import summarise
from hess_plugin.machine import describe_machine
from hess_plugin.plugins import load_model, resolve_adapter
from hess_plugin.profiles import Profile
from hess_plugin.scenes.scene import Scene

ANY_DISTANCE = 1e6  # random weights predict points anywhere


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--repo", action="append", default=[], type=Path, help="checkout of VGGT or Pi3")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scenes", type=int, default=32, help="calibration rooms for rows and stability")
    parser.add_argument("--test-scenes", type=int, default=40, help="other rooms, for rows")
    parser.add_argument("--views", type=int, default=16, help="images of each room")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sys.path[:0] = [str(path.resolve()) for path in args.repo]
    lines = [
        "# Calibration",
        "",
        f"{describe_machine()}. hess-plugin {hess_plugin.__version__}.",
        f"Command: python benchmarks/calibration.py {' '.join(_shown(sys.argv[1:]))}".rstrip(),
    ]
    for name in args.only:
        lines += ["", *SECTIONS[name](args)]
        print("\n".join(lines[-40:]), flush=True)
    text = "\n".join(lines) + "\n"
    if args.write:
        args.write.write_text(text, encoding="utf-8")
    print("\n" + text)


def _shown(arguments: list[str]) -> list[str]:
    """The command line without folders of this machine."""
    return [Path(a).name if Path(a).is_dir() else a for a in arguments]


def lean_section(args: argparse.Namespace) -> list[str]:
    lines = [
        "## Little memory beside the whole graph",
        "",
        f"Real runs in float32, medians of {args.repeats} alternating runs.",
        "",
        "| model | views x size | alive, plain | alive, lean | lean / plain | seconds, lean / plain | scenes a minute, "
        "lean | largest difference of a trace |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, model, scene, eps in _small_models():
        peaks, seconds, traces = {}, {"plain": [], "lean": []}, {}
        for memory in ("plain", "lean"):
            traces[memory], peaks[memory] = _alive(model, scene, Protocol(eps=eps, memory=memory))
        for _ in range(args.repeats):
            for memory, times in seconds.items():
                times.append(_timed(model, scene, Protocol(eps=eps, memory=memory)))
        ratio = statistics.median(b / a for a, b in zip(seconds["plain"], seconds["lean"], strict=True))
        worst = max(_difference(traces["plain"][name], traces["lean"][name]) for name in traces["plain"])
        cells = [label, f"{scene.views} x {scene.height}x{scene.width}", _mb(peaks["plain"]), _mb(peaks["lean"])]
        cells += [f"{peaks['lean'] / peaks['plain']:.2f}", f"{ratio:.2f}"]
        cells += [f"{60 / statistics.median(seconds['lean']):.1f}", f"{worst:.1e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def size_section(args: argparse.Namespace) -> list[str]:
    lines = [
        "## At full size",
        "",
        "Counted on tensors without values, GB (1e9 bytes): weights + what else is alive at once = together. bfloat16 "
        "autocast, heads in float32.",
        "",
        "| model | views | size | weights | lean | together | plain | together | TFLOP lean / plain |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    sizes = {"vggt": (392, 518), "pi3": (434, 574)}
    for name, build in _full_models():
        model = build()
        adapter, (height, width) = resolve_adapter(model), sizes[name]
        cases = [(views, height, width) for views in (5, 10, 20, 40)]
        cases += [(20, 518, 518)] if name == "vggt" else []
        cases += [(20, height * part // 7 // 14 * 14, width * part // 7 // 14 * 14) for part in (3, 5)]
        for views, rows, columns in cases:
            found = {}
            for memory in ("lean", "plain"):
                with _as_on_a_gpu():
                    protocol = Protocol(autocast=torch.bfloat16, memory=memory)
                    found[memory] = estimate(adapter, model, views, rows, columns, protocol, timed=False)
            little, plain = found["lean"], found["plain"]
            gigabytes = [little.weights, little.activations, little.total, plain.activations, plain.total]
            cells = [name, str(views), f"{rows}x{columns}", *(f"{size / 1e9:.1f}" for size in gigabytes)]
            cells.append(f"{little.flops / 1e12:.0f} / {plain.flops / 1e12:.0f}")
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    return lines


def saved_section(args: argparse.Namespace) -> list[str]:
    lines = [
        "## The estimate beside real runs",
        "",
        "VGGT-1B, random weights, float32, on this CPU: MB alive at once besides the weights, counted operation by "
        "operation, and seconds of a scene.",
        "",
        "| views | size | memory | estimated MB | real MB | estimated s | real s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, build in _full_models():
        if name != "vggt":
            continue
        model = build()
        adapter = resolve_adapter(model)
        for views, height, width, memory in ((2, 112, 112, "plain"), (2, 112, 112, "lean"), (4, 112, 112, "lean"),
                                             (2, 224, 224, "lean")):  # fmt: skip
            protocol = Protocol(eps=ANY_DISTANCE, memory=memory)
            found = estimate(adapter, model, views, height, width, protocol)
            scene = _plane(views, height, width)
            seconds = _timed(model, scene, protocol)
            _, peak = _alive(model, scene, protocol)
            lines.append(
                f"| {views} | {height}x{width} | {memory} | {found.activations / 1e6:.0f} | {peak / 1e6:.0f} | "
                f"{found.seconds or 0:.0f} | {seconds:.0f} |"
            )
            print(lines[-1], flush=True)
    return lines


def rows_section(args: argparse.Namespace) -> list[str]:
    from hess_plugin.agreement import spearman, total_variation

    profile = _demo_profile(args)
    everything, patches = profile.scores(), profile.scores(rows="patch")
    arms = [Arm("dense")] + [Arm(a, s, a) for s in (0.73, 0.85) for a in ("uniform", "hess")]
    tables = {}
    for rows in ("all", "patch"):
        scenes = RoomScenes("test", args.test_scenes, args.views)
        tables[rows] = compare(load_demo_model(), scenes, arms, profile=profile, rows=rows, block_q=8, block_k=8)
    lines = [
        "## Gradient through patch tokens alone",
        "",
        f"Demo model, {args.scenes} calibration rooms x {args.views} views, {args.test_scenes} other rooms, blocks 8 x "
        "8. Spearman correlation of the two scores by layer: "
        + ", ".join(f"{value:.3f}" for value in spearman(everything, patches).tolist())
        + "; budget share moved: "
        + ", ".join(f"{value:.4f}" for value in total_variation(everything, patches).tolist())
        + ". AUC@30 in points, paired against uniform, mean ± standard error:",
        "",
        "| sparsity | all rows | patch rows | patch rows - all rows |",
        "|---|---|---|---|",
    ]
    for sparsity in (0.73, 0.85):
        cells = [_against_uniform(tables[rows], sparsity) for rows in ("all", "patch")]
        lines.append(
            f"| {sparsity:g} | {cells[0]} | {cells[1]} | {_paired(tables['patch'], tables['all'], sparsity)} |"
        )
    return lines


def stability_section(args: argparse.Namespace) -> list[str]:
    from hess_plugin.stability import split_half
    from hess_plugin.verdict import judge

    profile = _demo_profile(args)
    lines = [
        "## Stability over scenes",
        "",
        f"Demo model, {args.views} views a room. Halves of the set drawn at random 200 times: Spearman correlation of "
        "their scores and overlap of their most sensitive quarter, mean over layers; then what `hess-patch show` says: "
        "the share of a layer's budget that the choice of scenes moves, the share that the score moves away from equal "
        "budgets, and whether more scenes are needed.",
        "",
        "| rooms | Spearman of halves | expected of the whole set | overlap of halves | chance | effect | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for count in sorted({count for count in (4, 8, 16) if count < args.scenes} | {args.scenes}):
        part = _first_scenes(profile, count)
        halves, verdict = split_half(part), judge(part)
        cells = [str(count), *(f"{x.mean():.3f}" for x in (halves.spearman, halves.expected, halves.overlap))]
        cells += [f"{verdict.noise:.1%}", f"{verdict.effect:.1%}"]
        cells.append("enough" if verdict.enough else f"about {verdict.needed} would do")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def self_section(args: argparse.Namespace) -> list[str]:
    from hess_plugin.agreement import compare_profiles

    rooms = RoomScenes("calibration", 2 * args.scenes, args.views)
    other = hess_plugin.calibrate(load_demo_model(), rooms[args.scenes :])
    lines = [
        "## Without ground truth",
        "",
        f"Demo model, scores of {args.scenes} rooms x {args.views} views against ground-truth scores of as many other "
        "rooms; benchmarks/ground_truth_free.py compares ways and outcomes.",
        "",
        "| target | Spearman by layer | mean | budget moved |",
        "|---|---|---|---|",
    ]
    for target in ("truth", "self"):
        found = compare_profiles(hess_plugin.calibrate(load_demo_model(), rooms[: args.scenes], target=target), other)
        by_layer = ", ".join(f"{value:.2f}" for value in found.spearman.tolist())
        lines.append(f"| {target} | {by_layer} | {found.spearman.mean():.3f} | {found.moved.mean():.3f} |")
    return lines


SECTIONS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
    "lean": lean_section,
    "size": size_section,
    "saved": saved_section,
    "rows": rows_section,
    "stability": stability_section,
    "self": self_section,
}


@functools.cache
def _calibrated(scenes: int, views: int) -> Profile:
    return hess_plugin.calibrate(load_demo_model(), RoomScenes("calibration", scenes, views))


def _demo_profile(args: argparse.Namespace) -> Profile:
    return _calibrated(args.scenes, args.views)


def _first_scenes(profile: Profile, count: int) -> Profile:
    from dataclasses import replace

    return replace(profile, scenes=profile.scenes[:count], traces={n: t[:count] for n, t in profile.traces.items()})


def _against_uniform(rows: list[Any], sparsity: float) -> str:
    summary = next(s for s in summarise(rows) if s.arm == "hess" and s.target == sparsity)
    against = summary.against["uniform"]
    return f"{100 * against.mean['auc30']:+.2f} ± {100 * against.error['auc30']:.2f}"


def _paired(first: list[Any], second: list[Any], sparsity: float) -> str:
    pairs = [
        {row.scene: row.auc30 for row in rows if row.arm == "hess" and row.target == sparsity}
        for rows in (first, second)
    ]
    differences = [100 * (pairs[0][scene] - pairs[1][scene]) for scene in pairs[0]]
    return f"{statistics.fmean(differences):+.2f} ± {statistics.stdev(differences) / len(differences) ** 0.5:.2f}"


def _timed(model: nn.Module, scene: Scene, protocol: Protocol) -> float:
    adapter = resolve_adapter(model)
    with measuring(adapter, model, adapter.sites(model), protocol) as measurer:
        started = time.perf_counter()
        measurer.measure(scene)
        return time.perf_counter() - started


def _alive(model: nn.Module, scene: Scene, protocol: Protocol) -> tuple[dict[str, Tensor], int]:
    """Traces of a scene, and the most bytes alive at once besides the model."""
    adapter, live = resolve_adapter(model), LiveMemory([*model.parameters(), *model.buffers()])
    with measuring(adapter, model, adapter.sites(model), protocol) as measurer, live:
        return measurer.measure(scene).traces, live.peak


def _difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max() / first.max())


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def _small_models() -> Iterator[tuple[str, nn.Module, Scene, float]]:
    """The demo model, and upstream classes cut down to a size that runs in a second."""
    yield "demo", load_demo_model(), RoomScenes("calibration", 1, 16)[0], 0.05
    yield "demo", load_demo_model(), RoomScenes("calibration", 1, 48)[0], 0.05
    for name, build in _full_models():
        model = build()
        if name == "vggt":
            encoder = model.aggregator.patch_embed
            for blocks in (model.aggregator.frame_blocks, model.aggregator.global_blocks, encoder.blocks):
                del blocks[2:]
            model.aggregator.depth = model.aggregator.aa_block_num = 2
            for head in (model.point_head, model.depth_head):
                head.intermediate_layer_idx = [0, 0, 1, 1]
            if hasattr(model.aggregator, "cached_layer_indices"):
                model.aggregator.cached_layer_indices = {0, 1}
        else:
            del model.decoder[4:], model.encoder.blocks[2:]
        yield f"{name}, {len(resolve_adapter(model).sites(model))} sites", model, _plane(4, 112, 154), ANY_DISTANCE


def _full_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    for name, module in (("vggt", "vggt.models.vggt"), ("pi3", "pi3.models.pi3")):
        try:
            importlib.import_module(module)
        except ImportError:
            print(f"no code of {name}: it is left out (name its checkout with --repo)", file=sys.stderr)
            continue
        yield name, functools.partial(_load, name)


def _load(name: str) -> nn.Module:
    model = load_model(name, "random", device=torch.device("cpu"), dtype=torch.float32)
    model.track_head = None  # never part of a calibration
    return model


def _plane(views: int, height: int, width: int) -> Scene:
    """Cameras side by side before a rough plane, with random texture."""
    generator = torch.Generator().manual_seed(0)
    c2w = torch.eye(4).repeat(views, 1, 1)
    c2w[:, 0, 3], c2w[:, 1, 3] = torch.arange(views) * 0.3, (torch.arange(views) % 2) * 0.2
    camera = [[0.8 * width, 0.0, width / 2 - 0.5], [0.0, 0.8 * width, height / 2 - 0.5], [0.0, 0.0, 1.0]]
    depth = 2 + 0.2 * torch.rand(views, height, width, generator=generator)
    images = torch.rand(views, 3, height, width, generator=generator)
    return Scene("plane", images, c2w, torch.tensor(camera).repeat(views, 1, 1), depth)


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Let upstream's `autocast("cuda", enabled=False)` around the heads end the autocast of a CPU as well."""
    modern, old = torch.amp.autocast, torch.cuda.amp.autocast
    torch.amp.autocast = lambda device_type, **options: torch.autocast("cpu", **options)  # type: ignore[assignment,misc]
    torch.cuda.amp.autocast = functools.partial(torch.autocast, "cpu")  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.amp.autocast, torch.cuda.amp.autocast = modern, old  # type: ignore[misc]


if __name__ == "__main__":
    main()
