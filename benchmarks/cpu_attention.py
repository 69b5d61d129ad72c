"""Times block-sparse attention against dense attention on a CPU, as ratios of one run.

    python benchmarks/cpu_attention.py --threads 1 2 --write benchmarks/results/cpu_attention.md

Protocol: for every repeat, dense and sparse calls of all kept shares run one after the other, so that a busy
machine slows both. "median" is the median over repeats of the time / the dense time of the same repeat, "min" the least
time / the least dense time. CPU time is the process's own (all threads); wall time is beside it. "kept" is the share of
patch-block pairs kept, the floor of the ratio. Tokens are random with structure: those of a key block share a centre.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hess_plugin.sparsity import allocate, select, target_total
from hess_plugin_cuda import BlockLists, block_sparse_attention

BLOCK_Q, BLOCK_K = 128, 64
COLUMNS = ("threads", "dtype", "kept", "dense_heads", "what", "cpu_median", "cpu_min", "wall_median", "wall_min")


def main() -> None:
    args = parse()
    header = describe(args)
    print(header)
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for dtype in args.dtypes:
            rows += [{"threads": threads} | row for row in measure(args, getattr(torch, dtype))]
    table = as_markdown(rows)
    print(table)
    if args.write:
        write(args.write, header, table, rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="patch tokens")
    parser.add_argument("--special", type=int, default=0, help="special tokens after them")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--kept", type=float, nargs="+", default=[1.0, 0.5, 0.25, 0.1])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="a .md file; a .csv with the same rows is written beside it")
    return parser.parse_args()


def measure(args: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, object]]:
    """Rows of the table for one dtype."""
    q, k, v = (make_tokens(args, seed, dtype) for seed in range(3))
    calls: dict[tuple[object, ...], Callable[[], object]] = {
        ("dense",): lambda: F.scaled_dot_product_attention(q, k, v)
    }
    for kept in args.kept:
        budgets = make_budgets(args, kept)
        lists = choose(q, k, budgets, args)
        heads = int((budgets == budgets.new_tensor(pairs(args))).sum())
        label = (1.0 - lists.sparsity(), heads)
        calls[(*label, "attention")] = lambda lists=lists: block_sparse_attention(q, k, v, lists)
        if not lists.is_full:
            calls[(*label, "selection")] = lambda budgets=budgets: choose(q, k, budgets, args)
    with torch.inference_mode():
        times = repeat(calls, args.repeats)
    return [row_of(dtype, label, times[label], times[("dense",)]) for label in with_sums(times) if label != ("dense",)]


def with_sums(times: dict[tuple[object, ...], list[tuple[float, float]]]) -> list[tuple[object, ...]]:
    """Add selection and attention together, and give the order of the table."""
    for label in [label for label in times if label[-1] == "selection"]:
        attention = times[(*label[:2], "attention")]
        both = [(a[0] + s[0], a[1] + s[1]) for a, s in zip(attention, times[label], strict=True)]
        times[(*label[:2], "attention + selection")] = both
    return sorted(times, key=lambda label: (-float(str(label[0])) if len(label) > 1 else -2.0, str(label[-1])))


def repeat(
    calls: dict[tuple[object, ...], Callable[[], object]], repeats: int
) -> dict[tuple[object, ...], list[tuple[float, float]]]:
    """(CPU, wall) seconds of every call, all calls once in each repeat, after one call to warm up."""
    times: dict[tuple[object, ...], list[tuple[float, float]]] = {label: [] for label in calls}
    for turn in range(repeats + 1):
        for label, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            if turn:
                times[label].append((time.process_time() - cpu, time.perf_counter() - wall))
    return times


def row_of(
    dtype: torch.dtype, label: tuple[object, ...], own: list[tuple[float, float]], dense: list[tuple[float, float]]
) -> dict[str, object]:
    row: dict[str, object] = {"dtype": str(dtype).removeprefix("torch."), "kept": label[0], "dense_heads": label[1]}
    row["what"] = label[2]
    for index, clock in enumerate(("cpu", "wall")):
        ratios = [a[index] / b[index] for a, b in zip(own, dense, strict=True)]
        row[f"{clock}_median"] = statistics.median(ratios)
        row[f"{clock}_min"] = min(a[index] for a in own) / min(b[index] for b in dense)
    return row


def make_tokens(args: argparse.Namespace, seed: int, dtype: torch.dtype) -> Tensor:
    """`[1, H, N, d]`, tokens of one key block around one centre."""
    generator = torch.Generator().manual_seed(args.seed * 10 + seed)
    blocks = -(-args.tokens // BLOCK_K)
    centres = torch.randn(1, args.heads, blocks, args.width, generator=generator)
    tokens = centres.repeat_interleave(BLOCK_K, 2)[:, :, : args.tokens]
    tokens = torch.cat([tokens, torch.zeros(1, args.heads, args.special, args.width)], 2)
    return (tokens + torch.randn(tokens.shape, generator=generator)).to(dtype)


def grid(args: argparse.Namespace) -> tuple[int, int]:
    return -(-args.tokens // BLOCK_Q), -(-args.tokens // BLOCK_K)


def pairs(args: argparse.Namespace) -> int:
    rows, columns = grid(args)
    return rows * columns


def make_budgets(args: argparse.Namespace, kept: float) -> Tensor:
    """Ragged budgets `[1, H]`: log-normal weights (sigma 1.5), water-filled; the heaviest heads come out dense."""
    rows, columns = grid(args)
    weights = torch.randn(args.heads, generator=torch.Generator().manual_seed(args.seed)).mul(1.5).exp()
    total = target_total(1.0 - kept, args.heads, rows, columns)
    return allocate(total, weights, rows=rows, columns=columns)[None]


def choose(q: Tensor, k: Tensor, budgets: Tensor, args: argparse.Namespace) -> BlockLists:
    q, k = q[:, :, : args.tokens], k[:, :, : args.tokens]
    return select(q, k, block_q=BLOCK_Q, block_k=BLOCK_K, budgets=budgets)


def describe(args: argparse.Namespace) -> str:
    spread = {kept: make_budgets(args, kept)[0].sort().values / pairs(args) for kept in args.kept if kept < 1}
    shares = "; ".join(f"{kept:g}: " + " ".join(f"{x:.2f}" for x in s.tolist()) for kept, s in spread.items())
    return (
        f"{processor()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.backends.cpu.get_cpu_capability()}.\n"
        f"1 x {args.heads} heads x {args.tokens} patch + {args.special} special tokens x {args.width}, blocks "
        f"{BLOCK_Q} x {BLOCK_K}; {args.repeats} interleaved repeats; time / time of dense SDPA in the same run.\n"
        f"Share kept by each head: {shares}.\n"
        f"Command: python {' '.join(sys.argv)}"
    )


def processor() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def as_markdown(rows: list[dict[str, object]]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        cells = [f"{row[c]:.3f}" if isinstance(row[c], float) else str(row[c]) for c in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(path: Path, header: str, table: str, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# Block-sparse attention on a CPU\n\n{header}\n\n{table}\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
