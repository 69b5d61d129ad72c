"""FlexAttention sees the pairs that the lists keep, and is compiled once for all sizes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hess_plugin_cuda import BlockLists, block_count, flex, reference_attention, token_mask
from hess_plugin_cuda.backends import Problem

CUDA = torch.device("cuda")


@st.composite
def problems(draw: st.DrawFn) -> tuple[BlockLists, int]:
    """Lists of any shape, ragged or not, and the number of keys with special ones."""
    block_q, block_k = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    queries, keys = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    grid = (batch, heads, block_count(queries, block_q), block_count(keys, block_k))
    mask = torch.rand(grid, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    mask.scatter_(3, torch.randint(grid[3], (*grid[:3], 1), generator=generator), True)
    return BlockLists.from_mask(mask, queries, keys, block_q, block_k), keys + draw(st.integers(0, 15))


def seen(padded: flex.PaddedLists, lists: BlockLists, keys: int) -> Tensor:
    """Which keys `[heads, T_q, N_k]` FlexAttention lets the rows see, each at most once."""
    heads, _, rows, _ = padded.whole.shape
    times = torch.zeros(heads, rows, keys, dtype=torch.int64)
    for head in range(heads):
        for row in range(rows):
            for block in padded.whole[head, 0, row, : int(padded.whole_counts[head, 0, row])].tolist():
                times[head, row, block * lists.block_k : (block + 1) * lists.block_k] += 1
            for block in padded.part[head, 0, row, : int(padded.part_counts[head, 0, row])].tolist():
                inside = torch.arange(block * lists.block_k, min((block + 1) * lists.block_k, keys))
                times[head, row, inside[inside >= padded.first_special]] += 1
    assert times.max() <= 1
    return times.bool()


@settings(max_examples=150, deadline=None)
@given(problems(), st.booleans())
def test_padded_lists_show_every_row_its_keys_once(problem: tuple[BlockLists, int], full_length: bool) -> None:
    lists, keys = problem
    wanted = token_mask(lists, lists.query_tokens, keys)[:, :, :: lists.block_q]
    for item in range(lists.batch):
        for first in range(lists.heads):
            some = slice(first, lists.heads)
            padded = flex.pad(lists, item, some, keys, full_length=full_length)
            assert torch.equal(seen(padded, lists, keys), wanted[item, some])
            every = block_count(keys, lists.block_k)
            assert padded.whole.min() >= 0 and padded.whole.max() < every  # read even where there is none
            assert padded.whole.data_ptr() != padded.part.data_ptr()
            width = every if full_length else int(padded.whole_counts.max())
            assert padded.whole.shape[3] == width


@settings(max_examples=80, deadline=None)
@given(problems(), st.integers(20, 400), st.data())
def test_runs_of_heads_cover_the_heads_and_stay_small(
    problem: tuple[BlockLists, int], limit: int, data: st.DataObject
) -> None:
    lists, keys = problem
    heads = tuple(sorted(data.draw(st.sets(st.integers(0, lists.heads - 1), min_size=1))))
    special = block_count(keys, lists.block_k) - lists.key_blocks
    widths = lists.counts().amax(-1) + special
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(flex, "_ENTRIES", limit)
        if int(widths[:, list(heads)].max()) * lists.query_blocks > limit:
            with pytest.raises(RuntimeError, match=f"more than the {limit} that it holds at once; choose backend"):
                list(flex.head_runs(lists, keys, heads))
            return
        runs = list(flex.head_runs(lists, keys, heads))
    covered = [(item, head) for item, some in runs for head in range(some.start, some.stop)]
    assert covered == [(item, head) for item in range(lists.batch) for head in heads]
    for item, some in runs:
        assert (some.stop - some.start) * lists.query_blocks * int(widths[item, some].max()) <= limit


def test_all_heads_of_an_item_are_one_run() -> None:
    lists = BlockLists.full(2, 5, 100, 100, 16, 16)
    assert list(flex.head_runs(lists, 100, None)) == [(0, slice(0, 5)), (1, slice(0, 5))]


@pytest.mark.parametrize(
    ("dtype", "width", "blocks", "tiles"),
    [
        (torch.bfloat16, 64, (128, 64), (128, 64)),
        (torch.float16, 96, (256, 128), (128, 64)),
        (torch.float16, 256, (128, 64), (64, 32)),
        (torch.float32, 64, (128, 64), (64, 64)),
        (torch.bfloat16, 64, (48, 80), (16, 16)),
    ],
)
def test_tiles_divide_the_blocks(
    dtype: torch.dtype, width: int, blocks: tuple[int, int], tiles: tuple[int, int]
) -> None:
    options = flex.tile(dtype, width, *blocks)
    assert (options["BLOCK_M"], options["BLOCK_N"]) == tiles
    assert blocks[0] % tiles[0] == 0 and blocks[1] % tiles[1] == 0


def test_what_it_cannot_compute_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flex.importlib.util, "find_spec", lambda name: object())
    for name in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    good = Problem(CUDA, torch.bfloat16, 96)
    assert flex.refusal(good) is None
    assert "needs a CUDA device" in str(flex.refusal(Problem(torch.device("cpu"), torch.bfloat16)))
    assert "float32" in str(flex.refusal(Problem(CUDA, torch.float64)))
    assert "16 wide" in str(flex.refusal(Problem(CUDA, torch.bfloat16, 8)))
    assert "multiple of 16" in str(flex.refusal(Problem(CUDA, torch.bfloat16, 64, 128, 20)))
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert "switched off" in str(flex.refusal(good))
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0" in str(flex.refusal(good))
    monkeypatch.setattr(flex.importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in str(flex.refusal(good))


COMPILED = """
import torch
from torch._dynamo.utils import counters
from hess_plugin_cuda import BlockLists, block_count, flex, reference_attention

torch.set_num_threads(1)
for batch, heads, patches, special, kept in [(1, 3, 300, 5, 0.4), (2, 2, 533, 70, 0.7), (1, 2, 150, 23, 0.1)]:
    generator = torch.Generator().manual_seed(patches)
    grid = (batch, heads, block_count(patches, 64), block_count(patches, 32))
    mask = torch.rand(grid, generator=generator) < kept
    mask[..., 1] |= ~mask.any(-1)
    lists = BlockLists.from_mask(mask, patches, patches, 64, 32)
    q, k, v = torch.randn(3, batch, heads, patches + special, 32, generator=generator)
    out, lse = flex.forward(q, k, v, lists, 0.2, None)
    assert lse is None
    exact = reference_attention(q, k, v, lists, 0.2, dtype=torch.float64)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)
assert counters["stats"]["unique_graphs"] == 1, counters["stats"]
"""


@pytest.mark.slow
def test_compiled_for_a_cpu_it_computes_the_lists_with_one_compilation() -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    # Inductor in a process of its own, as everywhere here: it leaves warnings, threads and settings behind.
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(COMPILED)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-4000:]


def test_gradients_are_those_of_the_reference() -> None:
    lists = BlockLists.from_mask(torch.tensor([[[[True, False], [False, True], [True, True]]]]), 40, 25, 16, 16)
    q, k, v = (torch.randn(1, 1, tokens, 8, dtype=torch.float64, requires_grad=True) for tokens in (43, 28, 28))
    out = reference_attention(q, k, v, lists, 0.4)
    flow = torch.randn_like(out)
    wanted = torch.autograd.grad(out, (q, k, v), flow)
    found = flex.backward(flow, *(x.detach() for x in (q, k, v)), out.detach(), torch.empty(1, 1, 43), lists, 0.4)
    for given_gradient, gradient in zip(found, wanted, strict=True):
        torch.testing.assert_close(given_gradient, gradient)
