"""The Triton forward kernel against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

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

from hess_plugin_cuda import BlockLists, block_sparse_attention, token_mask
from hess_plugin_cuda.triton import forward

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def dtypes_of(device: torch.device) -> list[torch.dtype]:
    return DTYPES if device.type == "cpu" else DTYPES[1:]


def check(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0, scale: float | None = None) -> None:
    scale = shape.width**-0.5 if scale is None else scale
    q, k, v = make_tokens(shape, dtype, device, seed)
    lists = make_lists(shape, device, seed)
    out, lse = forward(q, k, v, lists, scale, None)
    assert out.shape == q.shape
    assert_as_exact_as_torch(out, dense_masked(q, k, v, lists, scale), exact_output(q, k, v, lists, scale))
    exact = exact_logsumexp(q, k, lists, scale)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 2, 64, 64, 0, 0, 32, 16, 16),  # everything divides
        Shape(2, 2, 83, 83, 7, 7, 64, 32, 16),  # ragged on both sides, several items
        Shape(1, 3, 150, 150, 5, 5, 128, 64, 64),  # the default blocks
        Shape(1, 2, 60, 100, 3, 17, 16, 32, 32),  # more keys than queries
        Shape(1, 2, 100, 40, 17, 0, 64, 16, 16),  # more queries than keys, special queries only
        Shape(1, 2, 90, 300, 0, 70, 64, 128, 32),  # blocks of several steps, special keys only
        Shape(1, 2, 20, 20, 1, 1, 64, 64, 128),  # a single block, ragged
        Shape(1, 1, 1, 1, 0, 0, 16, 16, 16),  # a single token
    ],
    ids=str,
)
def test_error_is_that_of_plain_torch(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    if dtype in dtypes_of(device):
        check(shape, dtype, device)


@pytest.mark.parametrize("special", [0, 1, 5, 17, 70])
def test_special_tokens(special: int, device: torch.device) -> None:
    check(Shape(1, 2, 50, 50, special, special, 32, 16, 16), torch.float16, device)


@given(
    batch=st.integers(1, 2), heads=st.integers(1, 3), queries=st.integers(1, 70), keys=st.integers(1, 70),
    special_queries=st.integers(0, 20), special_keys=st.integers(0, 40), block_q=st.sampled_from([16, 32, 64]),
    block_k=st.sampled_from([16, 32, 64, 128]), seed=st.integers(0, 10**6),
)  # fmt: skip
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_sizes(
    device: torch.device,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    special_queries: int,
    special_keys: int,
    block_q: int,
    block_k: int,
    seed: int,
) -> None:
    shape = Shape(batch, heads, queries, keys, special_queries, special_keys, block_q, block_k, 16)
    check(shape, torch.float16, device, seed)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.5])
def test_any_scale(scale: float, device: torch.device) -> None:
    # Blocks of two steps, of which the second may hold no key at all.
    check(Shape(1, 2, 40, 150, 3, 5, 32, 128, 16), torch.bfloat16, device, scale=scale)


def test_large_scores_do_not_overflow(device: torch.device) -> None:
    shape = Shape(1, 2, 50, 50, 5, 5, 32, 16, 16)
    q, k, v = make_tokens(shape, torch.float16, device)
    lists = make_lists(shape, device)
    out, lse = forward(q * 60, k * 60, v, lists, 0.25, None)
    assert out.isfinite().all()
    torch.testing.assert_close(lse.double(), exact_logsumexp(q * 60, k * 60, lists, 0.25), rtol=1e-5, atol=1e-2)


def test_token_major_views_are_read_where_they_are(device: torch.device) -> None:
    shape = Shape(2, 3, 50, 50, 5, 5, 32, 16, 16)
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 55, 3, 3, 16, generator=generator).to(device, torch.float16)
    before = packed.clone()
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    lists = make_lists(shape, device)
    out, lse = forward(q, k, v, lists, 0.25, None)
    wanted, wanted_lse = forward(q.contiguous(), k.contiguous(), v.contiguous(), lists, 0.25, None)
    assert out.transpose(1, 2).is_contiguous()  # laid out as q is
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse)
    assert torch.equal(packed, before)


def test_offsets_past_32_bits(device: torch.device) -> None:
    shape = Shape(1, 1, 100, 130, 5, 70, 64, 64, 16)
    q, k, v = make_tokens(shape, torch.float16, device)
    lists = make_lists(shape, device)
    wanted, _ = forward(q, k, v, lists, 0.25, None)
    gap = 2**24 - 16  # the special tokens begin past number 2^31, a full block and a ragged one
    assert torch.equal(forward(q, far_apart(k, gap), v, lists, 0.25, None)[0], wanted)
    assert torch.equal(forward(q, k, far_apart(v, gap), lists, 0.25, None)[0], wanted)


def test_numbers_of_a_token_that_are_no_neighbours(device: torch.device) -> None:
    shape = Shape(1, 2, 50, 50, 5, 5, 32, 16, 16)
    q, k, v = make_tokens(shape, torch.float16, device)
    lists = make_lists(shape, device)
    strewn = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    assert torch.equal(forward(*strewn, lists, 0.25, None)[0], forward(q, k, v, lists, 0.25, None)[0])


@pytest.mark.parametrize("heads", [(1,), (0, 2), (3, 1, 0)])
def test_only_the_heads_that_are_asked_for(heads: tuple[int, ...], device: torch.device) -> None:
    shape = Shape(2, 4, 30, 50, 3, 5, 16, 32, 16)
    q, k, v = make_tokens(shape, torch.float16, device)
    lists = make_lists(shape, device)
    whole, whole_lse = forward(q, k, v, lists, 0.25, None)
    out, lse = forward(q, k, v, lists, 0.25, heads)
    others = [head for head in range(4) if head not in heads]
    assert torch.equal(out[:, heads], whole[:, heads])
    assert torch.equal(lse[:, heads], whole_lse[:, heads])
    assert out[:, others].isnan().all()
    assert lse[:, others].isnan().all()


def test_dropped_keys_are_never_read(device: torch.device) -> None:
    shape = Shape(1, 2, 50, 50, 0, 5, 32, 16, 16)
    q, k, v = make_tokens(shape, torch.float16, device)
    mask = torch.zeros(1, 2, 2, 4, dtype=torch.bool)
    mask[..., 1:3] = True
    lists = BlockLists.from_mask(mask, 50, 50, 32, 16).to(device)
    clean, _ = forward(q, k, v, lists, 0.25, None)
    dropped = ~token_mask(lists, 50, 55)[:, :, 0].unsqueeze(-1)
    k, v = k.masked_fill(dropped, float("nan")), v.masked_fill(dropped, float("nan"))
    assert torch.equal(forward(q, k, v, lists, 0.25, None)[0], clean)


def test_lists_with_room_to_spare(device: torch.device) -> None:
    shape = Shape(1, 2, 50, 50, 5, 5, 32, 16, 16)
    q, k, v = make_tokens(shape, torch.float16, device)
    lists = make_lists(shape, device)
    room = lists.rows * lists.key_blocks - lists.kept
    assert room > 0
    roomy = replace(lists, col=torch.cat([lists.col, lists.col.new_full((room,), 10**9)]), exact=False)
    assert torch.equal(forward(q, k, v, roomy, 0.25, None)[0], forward(q, k, v, lists, 0.25, None)[0])


def test_the_public_function_takes_it_by_name(device: torch.device) -> None:
    shape = Shape(1, 2, 50, 50, 5, 5, 32, 16, 16)
    tokens = [x.requires_grad_() for x in make_tokens(shape, torch.float16, device)]
    lists = make_lists(shape, device)
    out = block_sparse_attention(*tokens, lists, backend="triton")
    flow = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    ours = torch.autograd.grad(out, tokens, flow)
    assert torch.equal(out, forward(*tokens, lists, 0.25, None)[0])
    exact = [x.detach().double().requires_grad_() for x in tokens]
    wanted = torch.autograd.grad(exact_output(*exact, lists, 0.25), exact, flow.double())
    plain = torch.autograd.grad(dense_masked(*tokens, lists, 0.25), tokens, flow)
    for triple in zip(ours, plain, wanted, strict=True):
        assert_as_exact_as_torch(*triple)
