"""What ``patch(..., memory="lean")`` saves: bytes of tensors alive at once in one forward, counted side by side.

    python benchmarks/memory.py --repo vggt_old --repo pi3 --write benchmarks/results/memory.md

Sections (both by default, `--only` chooses):

size        models at full size, run on tensors without values: nothing is allocated, every operation's output is
            counted from its making to its release. bfloat16 autocast, heads in float32, as on a GPU; weights are left
            out, and so is what kernels use inside themselves, what an allocator adds and a GPU's context. The attention
            over block lists is answered by a kernel that allocates its output and nothing else, as a fused one does.
real        the same count in real runs on this machine with the gather backend, on the demo model and, where their code
            is importable (or named by `--repo`), on upstream models cut down to a few layers, random weights, float32;
            beside it the largest difference of an output relative to the largest output, and seconds, lean / plain, as
            the median ratio of alternating runs.

A checkout of one package at a time can be imported: run the command once for each VGGT.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

import hess_plugin
import hess_plugin.attention
import hess_plugin.memory.chunks
from hess_plugin.calibration.estimate import _fake_copy, _FakeMode
from hess_plugin.calibration.live_memory import LiveMemory
from hess_plugin.demo.model import load_demo_model
from hess_plugin.machine import describe_machine
from hess_plugin.plugins import load_model
from hess_plugin_cuda import Backend, BlockLists, reference, register_backend

SPARSITY = 0.73
WAYS: dict[str, dict[str, Any] | None] = {
    "unpatched": None,
    "plain": {"sparsity": SPARSITY},
    "lean": {"sparsity": SPARSITY, "memory": "lean"},
}
UPSTREAM = {"vggt": "vggt.models.vggt", "pi3": "pi3.models.pi3", "pi3x": "pi3.models.pi3x"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--models", nargs="+", choices=list(UPSTREAM), default=list(UPSTREAM))
    parser.add_argument("--repo", action="append", default=[], type=Path, help="checkout of an upstream model")
    parser.add_argument("--views", type=int, nargs="+", default=[20, 50, 100])
    parser.add_argument("--side", type=int, default=518, help="pixels of a square image, for size")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="Markdown file to write, or to append to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sys.path[:0] = [str(path.resolve()) for path in args.repo]
    lines = ["", f"Command: python benchmarks/memory.py {' '.join(_shown(sys.argv[1:]))}".rstrip()]
    for name in args.only:
        lines += ["", *SECTIONS[name](args)]
    text = "\n".join(lines) + "\n"
    if args.write:
        head = f"# Memory of inference\n\n{describe_machine()}. hess-plugin {hess_plugin.__version__}.\n"
        before = args.write.read_text(encoding="utf-8") if args.write.exists() else head
        args.write.write_text(before + text, encoding="utf-8")
    print(text)


def _shown(arguments: list[str]) -> list[str]:
    """The command line without folders of this machine."""
    return [Path(a).name if Path(a).is_dir() or a.endswith(".md") else a for a in arguments]


def size_section(args: argparse.Namespace) -> list[str]:
    lines = [
        "## At full size",
        "",
        f"GB (1e9 bytes) alive at once besides the weights, counted on tensors without values; images of {args.side} x "
        f"{args.side} pixels, bfloat16 autocast, heads in float32; patched at sparsity {SPARSITY}, blocks 128 x 64.",
        "",
        "| model | layers kept | views | unpatched | plain | lean | lean / unpatched |",
        "|---|---|---|---|---|---|---|",
    ]
    register_backend(Backend("output-only", -1, _output_only, reference.backward))
    for name, model in _models(args):
        for views in args.views:
            peaks = {way: _counted(model, (views, args.side), how) / 1e9 for way, how in WAYS.items()}
            cells = [name, _layers_kept(model), str(views), *(f"{peaks[way]:.2f}" for way in WAYS)]
            lines.append("| " + " | ".join([*cells, f"{peaks['lean'] / peaks['unpatched']:.2f}"]) + " |")
            print(lines[-1], flush=True)
    return lines


def real_section(args: argparse.Namespace) -> list[str]:
    lines = [
        "## Real runs",
        "",
        f"MB alive at once besides the weights, in float32 on this CPU with the gather backend at sparsity {SPARSITY}, "
        f"chunks of 2^18 numbers (2^23 by default, which is more than these inputs); medians of {args.repeats} "
        "alternating runs. The difference is of lean and unpatched outputs, both dense, so that no choice of blocks is "
        "between them.",
        "",
        "| model | views x size | blocks | unpatched | plain | lean | lean / plain | largest difference | seconds, "
        "lean / plain |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    hess_plugin.memory.chunks.CHUNK = hess_plugin.attention.GROUP = 2**18
    for name, model, images, block in _small_models(args):
        ways = {way: how and {**how, "block_q": block, "block_k": block} for way, how in WAYS.items()}
        peaks = {way: _alive(model, images, how) for way, how in ways.items()}
        dense = [_run(model, images, how)[0] for how in (None, {"sparsity": 0.0, "memory": "lean"})]
        worst = max(float((dense[1][key] - value).abs().max() / value.abs().max()) for key, value in dense[0].items())
        times = {way: [] for way in ("plain", "lean")}
        for _ in range(args.repeats):
            for way, own in times.items():
                own.append(_run(model, images, ways[way])[1])
        ratio = statistics.median(b / a for a, b in zip(times["plain"], times["lean"], strict=True))
        cells = [name, f"{images.shape[1]} x {images.shape[3]}x{images.shape[4]}", f"{block} x {block}"]
        cells += [f"{peaks[way] / 1e6:.1f}" for way in WAYS]
        cells += [f"{peaks['lean'] / peaks['plain']:.2f}", f"{worst:.1e}", f"{ratio:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


SECTIONS: dict[str, Callable[[argparse.Namespace], list[str]]] = {"size": size_section, "real": real_section}


def _counted(model: nn.Module, size: tuple[int, int], how: dict[str, Any] | None) -> int:
    """Most bytes alive in one forward of `views, side` on tensors without values."""
    views, side = size
    fake = _FakeMode(allow_non_fake_inputs=True)
    twin = _fake_copy(model, fake, torch.device("cpu"))
    memory = LiveMemory([*twin.parameters(), *twin.buffers()])
    patched = _patched(twin, how and {**how, "backend": "output-only"})
    half = torch.autocast("cpu", torch.bfloat16)
    with patched, _sparse_without_values(), _as_on_a_gpu(), fake, memory, torch.no_grad(), half:
        twin(torch.empty(1, views, 3, side, side))
    return memory.peak


def _output_only(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, heads: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:
    """What a fused kernel allocates."""
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@contextlib.contextmanager
def _sparse_without_values() -> Iterator[None]:
    """Let a patched site choose blocks for tensors without values too; its plan is made of true numbers."""
    site, module = hess_plugin.attention.SiteAttention, hess_plugin.attention
    plan, has_values = site._plan, module.has_values

    def planned(self: Any, query: Tensor) -> Any:
        with _disable_current_modes():
            return plan(self, query)

    site._plan, module.has_values = planned, lambda tensor: True  # type: ignore[method-assign]
    try:
        yield
    finally:
        site._plan, module.has_values = plan, has_values  # type: ignore[method-assign]


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Let upstream's `autocast("cuda", enabled=False)` around the heads end the autocast of a CPU; no warnings."""
    modern, old = torch.amp.autocast, torch.cuda.amp.autocast
    torch.amp.autocast = lambda device_type, **options: torch.autocast("cpu", **options)  # type: ignore[assignment,misc]
    torch.cuda.amp.autocast = functools.partial(torch.autocast, "cpu")  # type: ignore[assignment,misc]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.amp.autocast, torch.cuda.amp.autocast = modern, old  # type: ignore[misc]


def _patched(model: nn.Module, how: dict[str, Any] | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if how is None else hess_plugin.patch(model, **how)


def _run(model: nn.Module, images: Tensor, how: dict[str, Any] | None) -> tuple[dict[str, Tensor], float]:
    """Outputs of one forward and its seconds."""
    with _patched(model, how), torch.no_grad(), _as_on_a_gpu():
        started = time.perf_counter()
        output = model(images)
        seconds = time.perf_counter() - started
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}, seconds


def _alive(model: nn.Module, images: Tensor, how: dict[str, Any] | None) -> int:
    with _patched(model, how), torch.no_grad(), _as_on_a_gpu():
        model(images)  # tables that are kept from now on
        with LiveMemory([*model.parameters(), *model.buffers(), images]) as memory:
            model(images)
    return memory.peak


def _models(args: argparse.Namespace) -> Iterator[tuple[str, nn.Module]]:
    for name in args.models:
        try:
            importlib.import_module(UPSTREAM[name])
        except ImportError:
            print(f"no code of {name}: it is left out (name its checkout with --repo)", file=sys.stderr)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = load_model(name, "random", device=torch.device("cpu"), dtype=torch.float32)
        if hasattr(model, "disable_multimodal"):
            model.disable_multimodal()
        yield name, model


def _layers_kept(model: nn.Module) -> str:
    aggregator = getattr(model, "aggregator", None)
    if aggregator is None:
        return "-"
    return "those read" if hasattr(aggregator, "cached_layer_indices") else "all"


def _small_models(args: argparse.Namespace) -> Iterator[tuple[str, nn.Module, Tensor, int]]:
    """The demo model, and upstream models cut down to what runs in seconds."""
    generator = torch.Generator().manual_seed(0)
    for views in (16, 48):
        yield "demo", load_demo_model(), torch.rand(1, views, 3, 60, 60, generator=generator), 16
    images = torch.rand(1, 8, 3, 112, 154, generator=generator)
    for name, model in _models(args):
        if name == "vggt":
            _cut_vggt(model)
        else:
            del model.decoder[4:], model.encoder.blocks[2:]
        yield f"{name}, {_layers_kept(model)} kept" if name == "vggt" else name, model, images, 32


def _cut_vggt(model: Any) -> None:
    """Six layers, of which the heads read four."""
    aggregator = model.aggregator
    del aggregator.frame_blocks[6:], aggregator.global_blocks[6:], aggregator.patch_embed.blocks[2:]
    aggregator.depth = aggregator.aa_block_num = 6
    for head in (model.point_head, model.depth_head, model.track_head.feature_extractor):
        head.intermediate_layer_idx = [1, 3, 4, 5]
    if hasattr(aggregator, "cached_layer_indices"):
        aggregator.cached_layer_indices = {1, 3, 4, 5}


if __name__ == "__main__":
    main()
