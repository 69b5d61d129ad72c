"""The attention as one operator: what torch's own checks, compilers and exporters make of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hess_plugin_cuda import BlockLists, block_sparse_attention
from hess_plugin_cuda.operator import attention_operator

OPERATOR = "hess_plugin.block_sparse_attention.default"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def problem(
    patches: int = 40, special: int = 5, seed: int = 0, full: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], BlockLists]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(3, 2, 3, patches + special, 8, generator=generator, dtype=dtype).unbind(0)
    blocks = -(-patches // 8)
    mask = torch.rand(2, 3, blocks, blocks, generator=generator) < 0.4
    mask[..., 0] = True
    mask[:, 1] = True
    lists = BlockLists.from_mask(mask | full, patches, patches, 8, 8)
    return list(tokens), lists


class Attends(nn.Module):
    """A module whose lists are buffers, as an exporter wants them."""

    def __init__(self, lists: BlockLists) -> None:
        super().__init__()
        self.lists = lists
        self.register_buffer("row_ptr", lists.row_ptr)
        self.register_buffer("col", lists.col)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lists = replace(self.lists, row_ptr=self.row_ptr, col=self.col)
        return block_sparse_attention(q, k, v, lists) * 2


@pytest.mark.parametrize("backend", ["auto", "gather", "reference"])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_finds_nothing_wrong_with_the_operator(backend: str, gradient: bool, dtype: torch.dtype) -> None:
    tokens, lists = problem(dtype=dtype)
    tokens = [x.requires_grad_(gradient) for x in tokens]
    sizes = [2, 3, 40, 40, 8, 8]
    arguments = (*tokens, lists.row_ptr, lists.col, sizes, [], True, 8**-0.5, backend)
    results = torch.library.opcheck(torch.ops.hess_plugin.block_sparse_attention.default, arguments)
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4


@pytest.mark.parametrize("full", [False, True])
def test_the_operator_computes_what_the_function_does(full: bool) -> None:
    tokens, lists = problem(full=full)
    leaves = [x.requires_grad_() for x in tokens]
    outputs = [
        attention_operator(*leaves, lists, 8**-0.5, "auto"),
        block_sparse_attention(*leaves, lists),
    ]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    flow = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first, second = (torch.autograd.grad(output, leaves, flow) for output in outputs)
    for pair in zip(first, second, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12)


def test_lists_of_unknown_length_and_known_heads_reach_the_backend_through_the_operator() -> None:
    tokens, lists = problem()
    wanted = block_sparse_attention(*tokens, lists)
    room = torch.cat([lists.col, lists.col.new_full((7,), -1)])
    assert torch.equal(attention_operator(*tokens, replace(lists, col=room, exact=False), 8**-0.5, "auto"), wanted)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_compiler_sees_one_operator_in_a_full_graph(gradient: bool) -> None:
    seen = []

    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    def record(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        seen.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph)

    def attends(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists) -> Tensor:
        return block_sparse_attention(q, k, v, lists) * 2

    compiled = torch.compile(attends, fullgraph=True, backend=aot_autograd(fw_compiler=record, bw_compiler=record))
    for patches in (40, 56, 61):  # ever other sizes, lengths of lists among them
        tokens, lists = problem(patches, seed=patches)
        leaves = [x.requires_grad_(gradient) for x in tokens]
        output = compiled(*leaves, lists)
        torch.testing.assert_close(output, attends(*leaves, lists), rtol=1e-12, atol=1e-12)
        if gradient:
            first, second = (torch.autograd.grad(x.sum(), leaves) for x in (output, attends(*leaves, lists)))
            for pair in zip(first, second, strict=True):
                torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12)
    assert [name for name in seen[0] if "hess_plugin" in name] == [OPERATOR]
    assert not any("bmm" in name or "scaled_dot" in name for graph in seen for name in graph)


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_holds_one_operator(strict: bool) -> None:
    tokens, lists = problem(dtype=torch.float32)
    module = Attends(lists)
    exported = torch.export.export(module, tuple(tokens), strict=strict)
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert [name for name in names if "hess_plugin" in name] == [OPERATOR]
    torch.testing.assert_close(exported.module()(*tokens), module(*tokens))


def test_a_call_by_hand_does_not_load_the_compiler() -> None:
    code = """
import sys, torch
from hess_plugin_cuda import BlockLists, block_sparse_attention
mask = torch.eye(3, dtype=torch.bool).expand(1, 2, 3, 3)
lists = BlockLists.from_mask(mask, 24, 24, 8, 8)
q = torch.randn(1, 2, 24, 8, requires_grad=True)
block_sparse_attention(q, q, q, lists).sum().backward()
assert q.grad is not None and "torch._dynamo" not in sys.modules and "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
