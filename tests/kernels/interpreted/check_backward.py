"""The Triton backward kernels against autograd of the float64 reference."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_problems import (
    Shape,
    assert_as_exact_as_torch,
    dense_masked,
    exact_logsumexp,
    exact_output,
    far_apart,
    make_lists,
    make_tokens,
)
from torch import Tensor

from hess_plugin_cuda import BlockLists, token_mask
from hess_plugin_cuda.triton import backward
from hess_plugin_cuda.triton.transposed import transposed

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = Shape(1, 2, 40, 50, 5, 7, 32, 16, 16)


def given_to_backward(
    shape: Shape, dtype: torch.dtype, device: torch.device, scale: float, seed: int = 0
) -> tuple[tuple[Tensor, ...], BlockLists]:
    """Gradient of the output, q, k, v, output, log-sum-exp; the last two rounded from float64."""
    q, k, v = make_tokens(shape, dtype, device, seed)
    lists = make_lists(shape, device, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    flow = torch.randn(q.shape, generator=generator, dtype=torch.float64).to(device, dtype)
    out = exact_output(q, k, v, lists, scale).to(dtype)
    return (flow, q, k, v, out, exact_logsumexp(q, k, lists, scale).float()), lists


def check(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0, scale: float | None = None) -> None:
    scale = shape.width**-0.5 if scale is None else scale
    (flow, *low, out, lse), lists = given_to_backward(shape, dtype, device, scale, seed)
    exact = [x.double().requires_grad_() for x in low]
    wanted = torch.autograd.grad(exact_output(*exact, lists, scale), exact, flow.double())
    leaves = [x.requires_grad_() for x in low]
    plain = torch.autograd.grad(dense_masked(*leaves, lists, scale), leaves, flow)
    ours = backward(flow, *[x.detach() for x in low], out, lse, lists, scale)
    # Every probability is off by the rounding of its log-sum-exp, which autograd of plain torch does not need.
    rounding = torch.finfo(lse.dtype).eps * float(lse.abs().max())
    noises = noise_of_differences(flow, *low, lists, scale)
    for gradient, low_precision, right, noise in zip(ours, plain, wanted, noises, strict=True):
        assert_as_exact_as_torch(gradient, low_precision, right, rounding * float(right.abs().max()) + noise)


@torch.no_grad()
def noise_of_differences(
    flow: Tensor, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float
) -> tuple[float, float, float]:
    """What float32 may leave of gradients of q, k and v where a query sees one key: that of its score is zero.

    It is a difference of two equal sums of d products, each rounded d times; plain torch rounds both alike.
    """
    seen = token_mask(lists, q.shape[2], k.shape[2]).expand(*q.shape[:3], -1)
    flow, q, k, v = (x.double() for x in (flow, q, k, v))
    sums = 2 * (flow.abs() @ v.abs().mT) * (seen & (seen.sum(-1, keepdim=True) == 1))
    unit = q.shape[-1] * torch.finfo(torch.float32).eps / 2 * abs(scale)
    return unit * float((sums @ k.abs()).max()), unit * float((sums.mT @ q.abs()).max()), 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 2, 64, 64, 0, 0, 32, 16, 16),  # everything divides
        Shape(2, 2, 50, 83, 7, 5, 32, 32, 16),  # ragged on both sides, several items, more keys than queries
        Shape(1, 2, 150, 70, 0, 17, 128, 64, 64),  # the default blocks, special keys only
        Shape(1, 1, 90, 30, 70, 0, 16, 128, 32),  # many special queries, none of the keys is special
        Shape(1, 1, 1, 1, 0, 0, 16, 16, 16),  # a single token
    ],
    ids=str,
)
def test_error_is_that_of_plain_torch(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    if dtype != torch.float32 or device.type == "cpu":
        check(shape, dtype, device)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(scale: float, device: torch.device) -> None:
    check(SMALL, torch.float16, device, scale=scale)


@given(
    heads=st.integers(1, 3), queries=st.integers(1, 50), keys=st.integers(1, 50), special_queries=st.integers(0, 20),
    special_keys=st.integers(0, 20), block_q=st.sampled_from([16, 32, 128]), block_k=st.sampled_from([16, 32, 64]),
    seed=st.integers(0, 10**6),
)  # fmt: skip
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_sizes(
    device: torch.device,
    heads: int,
    queries: int,
    keys: int,
    special_queries: int,
    special_keys: int,
    block_q: int,
    block_k: int,
    seed: int,
) -> None:
    shape = Shape(1, heads, queries, keys, special_queries, special_keys, block_q, block_k, 16)
    check(shape, torch.float16, device, seed)


def test_keys_that_nobody_keeps_get_a_gradient_of_zero(device: torch.device) -> None:
    (flow, q, k, v, _, _), _ = given_to_backward(SMALL, torch.float16, device, 0.25)
    q, flow = q[:, :, :40], flow[:, :, :40]  # no special queries, which would see every key
    mask = torch.tensor([True, False, False, True]).expand(1, 2, 2, 4)
    lists = BlockLists.from_mask(mask, 40, 50, 32, 16).to(device)
    out, lse = exact_output(q, k, v, lists, 0.25).half(), exact_logsumexp(q, k, lists, 0.25).float()
    _, k_grad, v_grad = backward(flow, q, k, v, out, lse, lists, 0.25)
    for gradient in (k_grad, v_grad):
        assert (gradient[:, :, 16:48] == 0).all()
        assert (gradient[:, :, :16] != 0).any()


def test_views_and_a_spread_gradient(device: torch.device) -> None:
    (_, q, k, v, out, lse), lists = given_to_backward(SMALL, torch.float16, device, 0.25)
    flow = torch.ones((), dtype=torch.float16, device=device).expand(q.shape)  # what sum() hands back: all strides 0
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, out)]
    given_views = backward(flow, *views, lse, lists, 0.25)
    wanted = backward(flow.contiguous(), q, k, v, out, lse, lists, 0.25)
    for ours, other, source in zip(given_views, wanted, views, strict=False):
        assert torch.equal(ours, other)
        assert ours.stride() == source.stride()


def test_offsets_past_32_bits(device: torch.device) -> None:
    shape = Shape(1, 1, 132, 40, 70, 5, 64, 64, 16)
    (flow, q, k, v, out, lse), lists = given_to_backward(shape, torch.float16, device, 0.25)
    wanted = backward(flow, q, k, v, out, lse, lists, 0.25)
    gap = 2**24 - 16  # the special tokens begin past number 2^31, a full block and a ragged one
    ours = backward(far_apart(flow, gap), q, k, v, out, lse, lists, 0.25)
    assert all(torch.equal(*pair) for pair in zip(ours, wanted, strict=True))
    ours = backward(flow, far_apart(q, gap), k, v, out, lse, lists, 0.25)
    assert all(torch.equal(*pair) for pair in zip(ours, wanted, strict=True))


def test_two_runs_are_bit_for_bit_the_same(device: torch.device) -> None:
    arguments, lists = given_to_backward(SMALL, torch.bfloat16, device, 0.25)
    first, second = (backward(*arguments, lists, 0.25) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_lists_with_room_to_spare(device: torch.device) -> None:
    arguments, lists = given_to_backward(SMALL, torch.float16, device, 0.25)
    room = lists.rows * lists.key_blocks - lists.kept
    assert room > 0
    roomy = replace(lists, col=torch.cat([lists.col, lists.col.new_full((room,), 10**9)]), exact=False)
    for ours, wanted in zip(backward(*arguments, roomy, 0.25), backward(*arguments, lists, 0.25), strict=True):
        assert torch.equal(ours, wanted)


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 20), st.integers(0, 999)
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_transposed_lists(
    device: torch.device, batch: int, heads: int, rows: int, columns: int, room: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, heads, rows, columns, generator=generator) < torch.rand((), generator=generator)
    mask.scatter_(-1, torch.randint(columns, (batch, heads, rows, 1), generator=generator), True)
    lists = BlockLists.from_mask(mask, rows, columns, 1, 1).to(device)
    room = min(room, lists.rows * columns - lists.kept)
    garbage = torch.randint(-9 * columns, columns, (room,), generator=generator, dtype=torch.int32).to(device)
    lists = replace(lists, col=torch.cat([lists.col, garbage]), exact=not room)
    pointer, query_blocks = transposed(lists)
    wanted = [column.nonzero()[:, 0].tolist() for column in mask.transpose(2, 3).flatten(0, 2)]
    ends = pointer.tolist()
    assert [query_blocks[a:b].tolist() for a, b in pairwise(ends)] == wanted
