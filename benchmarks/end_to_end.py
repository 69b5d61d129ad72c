"""Times whole forwards of the demo model, patched against unpatched, as ratios of one run.

    python benchmarks/end_to_end.py --write benchmarks/results/end_to_end.md

Protocol: for each number of views, the unpatched forward and one forward for each sparsity follow one another,
`--repeats` times after a warm-up, in turned order every other time; a cell is the median over repeats of patched time /
unpatched time of the same repeat. Budgets are uniform; images are random, which costs what any other image costs. The
demo model's global attention is a smaller part of its forward than VGGT's, and its heads are 16 wide: this shows from
which length on patching pays on this machine, not what VGGT gains.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import sys
from pathlib import Path

import torch

import hess_plugin
from hess_plugin.demo.model import load_demo_model
from hess_plugin.evaluation.timing import side_by_side, twin
from hess_plugin.machine import describe_machine


def main() -> None:
    """Time and print; write Markdown if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, nargs="+", default=[16, 64, 128, 256])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.73, 0.85])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = [
        "# Whole forwards of the demo model",
        "",
        f"{describe_machine()}. hess-plugin {hess_plugin.__version__}, float32, blocks 128 x 64; {args.repeats} "
        "repeats, patched time / unpatched time.",
        f"Command: python benchmarks/end_to_end.py {' '.join(sys.argv[1:])}".rstrip(),
        "",
        "| views | patch tokens | dense, s | " + " | ".join(f"sparsity {s:g}" for s in args.sparsity) + " |",
        "|" + "---|" * (3 + len(args.sparsity)),
    ]
    model = load_demo_model()
    for views in args.views:
        seconds, ratios = measure(model, views, args.sparsity, args.repeats)
        cells = [str(views), str(views * 36), f"{seconds:.3f}", *(f"{ratio:.2f}" for ratio in ratios)]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if args.write:
        args.write.write_text(text, encoding="utf-8")


@torch.inference_mode()
def measure(model: torch.nn.Module, views: int, sparsities: list[float], repeats: int) -> tuple[float, list[float]]:
    """Median seconds of the unpatched forward, and the median ratio at each sparsity."""
    images = torch.rand(1, views, 3, 60, 60)
    with contextlib.ExitStack() as stack:
        calls = {0.0: functools.partial(model, images)}
        for sparsity in sparsities:
            patched = twin(model)  # shares the weights, so that nothing is patched and undone between two forwards
            stack.enter_context(hess_plugin.patch(patched, sparsity=sparsity))
            calls[sparsity] = functools.partial(patched, images)
        for call in calls.values():
            call()
        times = side_by_side(calls, repeats, images.device)
    dense = times[0.0]
    ratios = [[ours / theirs for ours, theirs in zip(times[s], dense, strict=True)] for s in sparsities]
    return statistics.median(dense), [statistics.median(ratio) for ratio in ratios]


if __name__ == "__main__":
    main()
