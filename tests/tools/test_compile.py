"""Patched models under torch.compile: the same results, one graph break a site, and no endless recompiling."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hess_plugin import patch, unpatch
from hess_plugin.demo.model import TinyVGGT, TinyVGGTConfig


class Graphs:
    """A backend that runs graphs as they are, and counts them and their runs."""

    def __init__(self) -> None:
        self.count = self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        self.count += 1

        def run(*inputs: Any) -> Any:
            self.runs += 1
            return graph.forward(*inputs)

        return run


class LastTokens(nn.Module):
    """In the place of the heads, which only make the compiler work longer."""

    def forward(self, tokens: list[Tensor]) -> list[Tensor]:
        return tokens[-1:]


def small_model(depth: int = 2) -> TinyVGGT:
    torch.manual_seed(0)
    model = TinyVGGT(TinyVGGTConfig(dim=32, num_heads=4, depth=depth, stem=16, camera_depth=1))
    model.camera_head, model.point_head, model.depth_head = LastTokens(), None, None
    return model.eval()


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)["pose_enc"]


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch.compiler.reset()
    yield Graphs()
    torch.compiler.reset()


@pytest.mark.slow
def test_a_patched_model_compiles_to_the_same_results_and_to_as_many_graphs_however_deep(
    images: Callable[..., Tensor],
    small_blocks: dict[str, Any],
    graphs: Graphs,
) -> None:
    counts = []
    for depth in (2, 9):  # more sites than the compiler is ready to compile one function for
        model = small_model(depth)
        handle = patch(model, **small_blocks)
        compiled = torch.compile(model, backend=graphs)
        graphs.count = 0
        for views in (3, 3, 5):
            assert torch.equal(outputs(compiled, images(views)), outputs(model, images(views)))
        made = graphs.count
        # Sizes are symbols by now: neither known inputs nor new ones make graphs.
        for views in (3, 4):
            assert torch.equal(outputs(compiled, images(views)), outputs(model, images(views)))
        assert graphs.count == made
        assert {site.calls for site in handle.report().sites} == {2 * 5}
        counts.append(made)
        torch.compiler.reset()
    assert counts[0] == counts[1] <= 12


def test_a_graph_breaks_at_every_site_and_at_the_layout_and_tells_why(
    images: Callable[..., Tensor], small_blocks: dict[str, Any], graphs: Graphs
) -> None:
    runs = []
    for depth in (1, 2, 3):
        model = small_model(depth)
        patch(model, **small_blocks)
        graphs.runs = 0
        outputs(torch.compile(model, backend=graphs), images(2))
        runs.append(graphs.runs)
        told = " ".join(torch._dynamo.utils.counters["graph_break"])
        torch.compiler.reset()
    # What leads to a site, what follows it in its block, and what follows that block.
    assert runs[2] - runs[1] == runs[1] - runs[0] <= 3
    assert "hess_plugin chooses the blocks of this attention by their values" in told
    assert "hess_plugin reads the token layout of a forward" in told


@pytest.mark.parametrize("how", ["wrapper", "inside", "method"])
def test_a_model_may_be_compiled_and_run_before_it_is_patched(
    images: Callable[..., Tensor],
    small_blocks: dict[str, Any],
    graphs: Graphs,
    how: str,
) -> None:
    model, x = small_model(), images()
    plain = outputs(model, x)
    with patch(model, **small_blocks):
        wanted = outputs(model, x)
    if how == "method":
        model.compile(backend=graphs)
        runs: nn.Module = model
    else:
        runs = torch.compile(model, backend=graphs)
    assert torch.equal(outputs(runs, x), plain) and graphs.count == 1
    for _ in range(2):
        handle = patch(runs if how == "wrapper" else model, **small_blocks)
        assert torch.equal(outputs(runs, x), wanted)
        assert {site.calls for site in handle.report().sites} == {1}
        handle.remove()
        assert torch.equal(outputs(runs, x), plain)
    patch(model, **small_blocks)
    assert unpatch(runs) == 2 and torch.equal(outputs(runs, x), plain)


def test_a_layout_is_seen_where_the_model_itself_breaks_its_graph(
    images: Callable[..., Tensor],
    small_blocks: dict[str, Any],
    graphs: Graphs,
) -> None:
    model, x = small_model(), images()

    def broken(module: nn.Module, args: Any) -> None:
        torch._dynamo.graph_break()

    for block in model.aggregator.global_blocks:  # as upstream's rotary embedding does, by reading positions
        block.norm1.register_forward_pre_hook(broken)
    compiled = torch.compile(model, backend=graphs)
    plain = outputs(compiled, x)
    with patch(model, **small_blocks):
        wanted = outputs(model, x)
        assert torch.equal(outputs(compiled, x), wanted) and not torch.equal(wanted, plain)
    assert torch.equal(outputs(compiled, x), plain)


def test_gradients_flow_through_a_compiled_patched_model(
    images: Callable[..., Tensor], small_blocks: dict[str, Any], graphs: Graphs
) -> None:
    model, x = small_model(), images()
    patch(model, **small_blocks)
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)  # the compiler
    weight = model.aggregator.global_blocks[0].attn.qkv.weight
    gradients = []
    for runs in (model, torch.compile(model, backend="aot_eager")):
        weight.grad = None
        runs(x)["pose_enc"].sum().backward()
        gradients.append(weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_a_full_graph_is_refused_with_the_reason(
    images: Callable[..., Tensor], small_blocks: dict[str, Any], graphs: Graphs
) -> None:
    model = small_model()
    handle = patch(model, **small_blocks)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="hess_plugin reads the token layout of a forward"):
        torch.compile(model, backend=graphs, fullgraph=True)(images())
    handle.remove()
    torch.compile(model, backend=graphs, fullgraph=True)(images())
    assert graphs.count == 1


INDUCTOR = """
import torch
from hess_plugin import patch
from hess_plugin.demo.model import TinyVGGT, TinyVGGTConfig

torch._inductor.config.compile_threads = 1
torch.set_num_threads(1)
torch.manual_seed(0)
model = TinyVGGT(TinyVGGTConfig(dim=32, num_heads=4, depth=1, stem=16, camera_depth=1)).eval()
x = torch.rand(1, 4, 3, 60, 60)

def tokens():
    with torch.no_grad():
        return model.aggregator(x)[0][-1]

plain = tokens()
handle = patch(model, sparsity=0.5, block_q=8, block_k=8)
wanted = tokens()
model.aggregator.global_blocks[0].compile()  # one block: what is compiled by hand where all takes minutes
torch.testing.assert_close(tokens(), wanted, rtol=1e-3, atol=1e-5)
assert handle.report().sites[0].calls == 2
handle.remove()
assert (tokens() - plain).abs().max() < 1e-5 < (wanted - plain).abs().max()
"""


@pytest.mark.slow
def test_inductor_computes_what_the_patched_model_does(tmp_path: Path) -> None:
    """In a process of its own: inductor imports setuptools, which wants to be there before Python's distutils."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler; install g++")
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", INDUCTOR], env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_who_does_not_compile_does_not_load_the_compiler() -> None:
    code = """
import sys, torch, hess_plugin
from hess_plugin.demo.model import TinyVGGT, TinyVGGTConfig
model = TinyVGGT(TinyVGGTConfig(dim=32, num_heads=4, depth=1, stem=16, camera_depth=1)).eval()
with hess_plugin.patch(model, block_q=8, block_k=8) as patch, torch.no_grad():
    model(torch.rand(2, 3, 60, 60))
assert patch.report().sites[0].calls == 1
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
