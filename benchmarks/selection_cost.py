"""Times the choice of blocks against the sparse attention that it feeds, by selector, pooling and views.

    python benchmarks/selection_cost.py --write benchmarks/results/selection_cost.md

Protocol: for every repeat, the attention and all selections run one after the other, so that a busy machine slows all
of them. A share is the median over repeats of the time of a selection / the time of the attention in the same repeat,
and in brackets the least of the first / the least of the second. On a CPU times are the process's own, on a GPU those
of the device. A selection is everything from q, k and v to lists: pooling, budgets of rows, the choice. Memory is the
most that its tensors take at once, without q, k and v; on a CPU a buffer of NumPy's comes on top while rows are ranked.
Tokens are random with structure: those of a key block share a centre. Every view has five special tokens.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hess_plugin.calibration.live_memory import LiveMemory
from hess_plugin.sparsity import SELECTORS, select, target_total
from hess_plugin_cuda import BlockLists, block_sparse_attention

BLOCK_Q, BLOCK_K, WIDTH = 128, 64, 64
PATCHES, SPECIAL = 1369, 5  # tokens of a view of 518 pixels
MIB = 2**20
SIZES = ("20x4", "50x2", "100x1")
POOLINGS = ("128.64", "64.64", "64.32", "32.64", "32.32", "32.16")


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    header = describe(args)
    print(header, flush=True)
    lines = ["| views | heads | selector | queries . keys pooled | share of the attention | ms | MiB |"]
    lines.append("|---|---|---|---|---|---|---|")
    print("\n".join(lines), flush=True)
    for size in args.sizes:
        for line in measure(args, *(int(part) for part in size.split("x"))):
            print(line, flush=True)
            lines.append(line)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(f"# What choosing blocks costs\n\n{header}\n\n" + "\n".join(lines) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="views x heads; few heads keep the attention short")
    parser.add_argument("--poolings", nargs="+", default=POOLINGS, help="queries.keys that are pooled together")
    parser.add_argument("--selectors", nargs="+", default=list(SELECTORS), choices=list(SELECTORS))
    parser.add_argument("--kept", type=float, default=0.1, help="share of the blocks")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", type=Path, help="a .md file")
    return parser.parse_args()


def measure(args: argparse.Namespace, views: int, heads: int) -> list[str]:
    """Rows of the table for one size."""
    q, k, v = (make_tokens(views, heads, seed, args.device) for seed in range(3))
    rows, columns = -(-views * PATCHES // BLOCK_Q), -(-views * PATCHES // BLOCK_K)
    total = target_total(1 - args.kept, heads, rows, columns) // heads
    given: dict[str, Any] = {"block_q": BLOCK_Q, "block_k": BLOCK_K, "patches": views * PATCHES}
    given["budgets"] = torch.full((1, heads), total, device=args.device)
    given["head_totals"] = [total] * heads
    cases: dict[tuple[str, str], Callable[[], BlockLists]] = {}
    for pooling in args.poolings:
        pool_q, pool_k = (int(part) for part in pooling.split("."))
        for name in args.selectors:
            own = given | {"selector": name, "pool_q": pool_q, "pool_k": pool_k}
            cases[name, pooling] = lambda own=own: select(q, k, v, **own)  # type: ignore[misc]
    lists = select(q, k, **given)
    with torch.inference_mode():
        peaks = {case: peak(call, [q, k, v]) for case, call in cases.items()}
        times = repeat({None: lambda: block_sparse_attention(q, k, v, lists), **cases}, args)
    return [row_of(views, heads, case, times[case], times[None], peaks[case]) for case in cases]


def row_of(
    views: int, heads: int, case: tuple[str, str], own: list[float], attention: list[float], peak_bytes: int
) -> str:
    median = statistics.median(a / b for a, b in zip(own, attention, strict=True))
    shares = f"{100 * median:.1f} % ({100 * min(own) / min(attention):.1f} %)"
    cells = (str(views), str(heads), *case, shares, f"{1000 * statistics.median(own):.0f}", f"{peak_bytes / MIB:.0f}")
    return "| " + " | ".join(cells) + " |"


def repeat(calls: dict[Any, Callable[[], object]], args: argparse.Namespace) -> dict[Any, list[float]]:
    """Seconds of every call, all calls once in each repeat, after one of each to warm up."""
    times: dict[Any, list[float]] = {label: [] for label in calls}
    for turn in range(args.repeats + 1):
        for label, call in calls.items():
            seconds = on_device(call) if args.device != "cpu" else on_cpu(call)
            if turn:
                times[label].append(seconds)
    return times


def on_cpu(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def on_device(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def peak(call: Callable[[], object], existing: list[Tensor]) -> int:
    """Most bytes that the tensors of a call take at once."""
    with LiveMemory(existing) as memory:
        call()
    return memory.peak


def make_tokens(views: int, heads: int, seed: int, device: str) -> Tensor:
    """`[1, H, N, d]`, tokens of one key block around one centre, special tokens last."""
    generator = torch.Generator().manual_seed(seed)
    patches = views * PATCHES
    centres = torch.randn(1, heads, -(-patches // BLOCK_K), WIDTH, generator=generator)
    tokens = centres.repeat_interleave(BLOCK_K, 2)[:, :, :patches]
    tokens = torch.cat([tokens, torch.zeros(1, heads, views * SPECIAL, WIDTH)], 2)
    return (tokens + torch.randn(tokens.shape, generator=generator)).to(device)


def describe(args: argparse.Namespace) -> str:
    machine = processor() if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    return (
        f"{machine}, Python {platform.python_version()}, torch {torch.__version__}, {args.threads} thread(s).\n"
        f"Heads of {WIDTH}, blocks {BLOCK_Q} x {BLOCK_K}, {PATCHES} patch and {SPECIAL} special tokens a view,\n"
        f"float32, {100 * args.kept:g} % of the blocks kept; {args.repeats} interleaved repeats.\n"
        "Shares: the median over repeats of selection / attention; in brackets the least of the one / of the other.\n"
        f"Command: python {' '.join(sys.argv)}"
    )


def processor() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
