"""Attention over block lists against dense masked attention in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hess_plugin_cuda.gather
from hess_plugin_cuda import BlockLists, block_count, block_sparse_attention, reference_attention, token_mask

from .interpreted.kernel_problems import assert_as_exact_as_torch, dense_masked

LOW = [torch.float32, torch.bfloat16, torch.float16]


def make_tokens(batch: int, heads: int, tokens: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in float64; scores of a standard deviation of about two."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, tokens, width, generator=generator, dtype=torch.float64).unbind(0)
    return q * 2, k, v


def make_lists(
    batch: int, heads: int, patches: int, block_q: int, block_k: int, *, seed: int = 0, full_heads: int = 0
) -> BlockLists:
    """Ragged lists: a fullness for each head, a count for each row, the first heads full."""
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (batch, heads, block_count(patches, block_q), block_count(patches, block_k))
    mask = torch.rand(shape, generator=generator) < torch.rand(batch, heads, 1, 1, generator=generator)
    mask.scatter_(-1, torch.randint(shape[-1], (*shape[:-1], 1), generator=generator), True)
    mask[:, :full_heads] = True
    return BlockLists.from_mask(mask, patches, patches, block_q, block_k).check()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("backend", ["gather", "reference", "auto"])
@pytest.mark.parametrize(
    ("batch", "heads", "patches", "special", "block_q", "block_k", "width"),
    [
        (1, 2, 256, 0, 32, 16, 16),  # everything divides
        (2, 3, 203, 7, 32, 16, 24),  # ragged on both sides
        (1, 4, 576, 80, 8, 8, 12),  # many small blocks
        (1, 2, 300, 5, 128, 64, 64),  # the default blocks
        (1, 2, 36, 5, 128, 64, 8),  # a single block
        (2, 1, 100, 1, 16, 100, 8),  # T_k = 1
        (1, 1, 1, 0, 128, 64, 8),  # a single token
    ],
)
def test_error_is_that_of_plain_torch(
    dtype: torch.dtype,
    backend: str,
    batch: int,
    heads: int,
    patches: int,
    special: int,
    block_q: int,
    block_k: int,
    width: int,
) -> None:
    q, k, v = (x.to(dtype) for x in make_tokens(batch, heads, patches + special, width))
    lists = make_lists(batch, heads, patches, block_q, block_k)
    exact = reference_attention(q, k, v, lists, width**-0.5, dtype=torch.float64)
    output = block_sparse_attention(q, k, v, lists, backend=backend)
    assert output.dtype == dtype
    assert output.shape == q.shape
    assert_as_exact_as_torch(output, dense_masked(q, k, v, lists), exact)


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 90), st.integers(0, 20), st.integers(1, 40),
    st.integers(1, 40), st.integers(0, 10**6), st.integers(0, 1),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_gather_is_the_reference_whatever_the_shapes(
    batch: int, heads: int, patches: int, special: int, block_q: int, block_k: int, seed: int, full: int
) -> None:
    q, k, v = make_tokens(batch, heads, patches + special, 4, seed)
    lists = make_lists(batch, heads, patches, block_q, block_k, seed=seed, full_heads=full)
    output = block_sparse_attention(q, k, v, lists, backend="gather")
    torch.testing.assert_close(output, dense_masked(q, k, v, lists), rtol=1e-12, atol=1e-12)


def test_reference_is_dense_masked_attention() -> None:
    q, k, v = make_tokens(2, 3, 107, 8)
    lists = make_lists(2, 3, 100, 16, 8)
    output = block_sparse_attention(q, k, v, lists, backend="reference")
    torch.testing.assert_close(output, dense_masked(q, k, v, lists), rtol=1e-12, atol=1e-12)


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = make_tokens(2, 3, 210, 8)
    lists = make_lists(2, 3, 203, 16, 8)
    whole = block_sparse_attention(q, k, v, lists)
    monkeypatch.setattr(hess_plugin_cuda.gather._Gathering, "_chunk_tokens", lambda self: 1)
    torch.testing.assert_close(block_sparse_attention(q, k, v, lists), whole, rtol=1e-13, atol=1e-13)


def test_every_item_is_computed_as_if_alone() -> None:
    q, k, v = make_tokens(3, 2, 105, 8)
    lists = make_lists(3, 2, 100, 16, 8, full_heads=1)
    together = block_sparse_attention(q, k, v, lists)
    mask = lists.to_mask()
    for item in range(3):
        one = slice(item, item + 1)
        own = BlockLists.from_mask(mask[one], 100, 100, 16, 8)
        alone = block_sparse_attention(q[one], k[one], v[one], own)
        torch.testing.assert_close(together[one], alone, rtol=1e-12, atol=1e-12)


def test_more_keys_than_queries() -> None:
    (q, _, _), (_, k, v) = make_tokens(1, 2, 33, 8), make_tokens(1, 2, 71, 8, seed=1)
    mask = torch.rand(1, 2, 4, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[..., 3] = True
    lists = BlockLists.from_mask(mask, 30, 64, 8, 8)
    output = block_sparse_attention(q, k, v, lists)
    torch.testing.assert_close(output, dense_masked(q, k, v, lists), rtol=1e-12, atol=1e-12)


def test_scale_is_used() -> None:
    q, k, v = make_tokens(1, 2, 105, 8)
    lists = make_lists(1, 2, 100, 16, 8, full_heads=1)
    scaled = block_sparse_attention(q, k, v, lists, scale=0.05)
    unit = block_sparse_attention(q * 0.05, k, v, lists, scale=1.0)
    torch.testing.assert_close(scaled, unit, rtol=1e-12, atol=1e-12)


def test_two_runs_are_bit_for_bit_the_same() -> None:
    q, k, v = (x.float() for x in make_tokens(2, 3, 210, 16))
    lists = make_lists(2, 3, 203, 16, 8)
    assert torch.equal(block_sparse_attention(q, k, v, lists), block_sparse_attention(q, k, v, lists))


def test_strided_views_are_accepted_and_left_alone() -> None:
    packed = torch.randn(2, 105, 3, 3, 8, generator=torch.Generator().manual_seed(0))
    before = packed.clone()
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    lists = make_lists(2, 3, 100, 16, 8, full_heads=1)
    output = block_sparse_attention(q, k, v, lists)
    alike = block_sparse_attention(q.contiguous(), k.contiguous(), v.contiguous(), lists)
    torch.testing.assert_close(output, alike)
    assert torch.equal(packed, before)


def test_dropped_keys_are_never_read() -> None:
    q, k, v = make_tokens(1, 2, 105, 8)
    mask = torch.zeros(1, 2, 7, 13, dtype=torch.bool)
    mask[..., ::2] = True
    lists = BlockLists.from_mask(mask, 100, 100, 16, 8)
    clean = block_sparse_attention(q, k, v, lists)[:, :, :100]
    dropped = ~token_mask(lists, 105, 105)[:, :, 0].unsqueeze(-1)
    k, v = k.masked_fill(dropped, float("nan")), v.masked_fill(dropped, float("nan"))
    assert torch.equal(block_sparse_attention(q, k, v, lists)[:, :, :100], clean)


def test_nothing_dropped_is_one_dense_call(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.float() for x in make_tokens(2, 3, 105, 8))
    lists = BlockLists.full(2, 3, 100, 100, 16, 8)
    dense = F.scaled_dot_product_attention(q, k, v)
    shapes = []

    def watched(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        shapes.append(q.shape)
        return dense

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    assert block_sparse_attention(q, k, v, lists) is dense
    assert shapes == [q.shape]


def test_heads_that_keep_everything_share_one_dense_call(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = make_tokens(2, 4, 105, 8)
    lists = make_lists(2, 4, 100, 16, 8, full_heads=2)
    shapes, dense = [], F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, **options: float) -> Tensor:
        if k.shape[2] == 105:
            shapes.append(list(q.shape))
        return dense(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    output = block_sparse_attention(q, k, v, lists)
    assert [1, 4, 105, 8] in shapes  # two heads of two items
    torch.testing.assert_close(output[:, :2], dense(q, k, v)[:, :2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("special", [0, 5])
def test_gradients_are_those_of_the_reference(special: int) -> None:
    tokens = [x.requires_grad_() for x in make_tokens(2, 3, 83 + special, 8)]
    lists = make_lists(2, 3, 83, 16, 8, full_heads=1)
    flow = torch.randn(tokens[0].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gradients = [
        torch.autograd.grad(block_sparse_attention(*tokens, lists, backend=backend), tokens, flow)
        for backend in ("gather", "reference")
    ]
    for ours, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", LOW)
def test_gradients_are_as_exact_as_those_of_plain_torch(dtype: torch.dtype) -> None:
    exact = [x.to(dtype).double().requires_grad_() for x in make_tokens(1, 2, 205, 16)]
    low = [x.detach().to(dtype).requires_grad_() for x in exact]
    lists = make_lists(1, 2, 200, 32, 16)
    flow = torch.randn(exact[0].shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    wanted = torch.autograd.grad(dense_masked(*exact, lists), exact, flow.double())
    plain = torch.autograd.grad(dense_masked(*low, lists), low, flow)
    ours = torch.autograd.grad(block_sparse_attention(*low, lists), low, flow)
    for triple in zip(ours, plain, wanted, strict=True):
        assert_as_exact_as_torch(*triple)


@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_gradients_do_not_follow_an_autocast_that_the_forward_did_not_have(backend: str) -> None:
    tokens = [x.float().requires_grad_() for x in make_tokens(1, 2, 105, 8)]
    lists = make_lists(1, 2, 100, 16, 8, full_heads=1)
    output = block_sparse_attention(*tokens, lists, backend=backend)
    wanted = torch.autograd.grad(output.sum(), tokens, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = torch.autograd.grad(output.sum(), tokens)
    for one, other in zip(given, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("patches", "special"), [(96, 0), (100, 0), (96, 5)])
def test_outputs_are_tensors_of_their_own(patches: int, special: int) -> None:
    tokens = [x.requires_grad_() for x in make_tokens(1, 2, patches + special, 8)]
    output = block_sparse_attention(*tokens, make_lists(1, 2, patches, 16, 8))
    assert output.is_contiguous() and not output._is_view()


def test_gradient_of_a_key_seen_by_many_rows_keeps_growing(monkeypatch: pytest.MonkeyPatch) -> None:
    """1024 rows add 1/513 each; a sum kept in bfloat16 would stop at 256 of them."""
    monkeypatch.setattr(hess_plugin_cuda.gather._Gathering, "_chunk_tokens", lambda self: 1)
    q = k = torch.zeros(1, 1, 1025, 4, dtype=torch.bfloat16)
    v = torch.zeros_like(q).requires_grad_()
    mask = torch.tensor([True, False]).expand(1, 1, 1024, 2)
    lists = BlockLists.from_mask(mask, 1024, 1024, 1, 512)
    (gradient,) = torch.autograd.grad(block_sparse_attention(q, k, v, lists).sum(), v)
    assert gradient[0, 0, -1].tolist() == pytest.approx([1024 / 513 + 1 / 1025] * 4, rel=1e-2)


def test_gradcheck() -> None:
    tokens = [x.requires_grad_() for x in make_tokens(1, 2, 11, 3)]
    lists = make_lists(1, 2, 9, 4, 2)
    assert torch.autograd.gradcheck(lambda *x: block_sparse_attention(*x, lists), tokens)


def test_gradient_of_some_inputs_only() -> None:
    q, k, v = make_tokens(1, 2, 105, 8)
    lists = make_lists(1, 2, 100, 16, 8)
    v.requires_grad_()
    block_sparse_attention(q, k, v, lists).sum().backward()
    assert v.grad is not None
    assert v.grad.sum() == pytest.approx(105 * 2 * 8)  # each of these outputs is a weighted mean of v


def test_inference_mode() -> None:
    q, k, v = make_tokens(1, 2, 105, 8)
    lists = make_lists(1, 2, 100, 16, 8, full_heads=1)
    expected = block_sparse_attention(q, k, v, lists)
    with torch.inference_mode():
        assert torch.equal(block_sparse_attention(q, k, v, lists), expected)


def test_q_and_k_follow_the_dtype_of_v() -> None:
    q, k, v = (x.float() for x in make_tokens(1, 2, 105, 8))
    lists = make_lists(1, 2, 100, 16, 8)
    mixed = block_sparse_attention(q, k, v.bfloat16(), lists)
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, block_sparse_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), lists))


@pytest.mark.parametrize("full", [False, True])
def test_autocast_gives_the_dtype_that_torch_gives(full: bool) -> None:
    q, k, v = (x.float() for x in make_tokens(1, 2, 105, 8))
    lists = BlockLists.full(1, 2, 100, 100, 16, 8) if full else make_lists(1, 2, 100, 16, 8)
    low = block_sparse_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), lists)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        assert torch.equal(block_sparse_attention(q, k, v, lists), low)
        assert torch.equal(block_sparse_attention(q, k, v.bfloat16(), lists), low)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (x.half() for x in make_tokens(1, 2, 105, 8))
    lists = make_lists(1, 2, 100, 16, 8)
    assert block_sparse_attention(q * 60, k * 60, v, lists).isfinite().all()


TOKENS = torch.zeros(1, 2, 20, 8)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"q": [1.0]}, TypeError, "q must be a tensor"),
        ({"k": TOKENS.int()}, TypeError, "k must be float16, .* got torch.int32"),
        ({"v": TOKENS[0]}, ValueError, r"v must be \[B, H, N, d\]"),
        ({"q": TOKENS[:, :, :0]}, ValueError, "no size zero"),
        ({"k": TOKENS[:, :, :19]}, ValueError, "k and v must have one shape"),
        ({"q": TOKENS[:, :1]}, ValueError, "q and k must agree"),
        ({"q": TOKENS[..., :4]}, ValueError, "q and k must agree"),
        ({"q": TOKENS.to("meta")}, ValueError, "q is on meta, v on cpu"),
        ({"lists": torch.ones(1, 2, 3, 3)}, TypeError, "lists must be BlockLists; got Tensor"),
        ({"lists": make_lists(1, 3, 20, 8, 8)}, ValueError, "1 items x 3 heads; q has 1 x 2"),
        ({"lists": make_lists(1, 2, 21, 8, 8)}, ValueError, "21 patch tokens of q, which has only 20"),
        ({"backend": "magic"}, ValueError, "no attention backend 'magic'; choose one of auto, .*gather, reference"),
    ],
)
def test_refuses(changes: dict[str, object], error: type[Exception], says: str) -> None:
    arguments: dict[str, object] = {"q": TOKENS, "k": TOKENS, "v": TOKENS, "lists": make_lists(1, 2, 20, 8, 8)}
    with pytest.raises(error, match=says):
        block_sparse_attention(**(arguments | changes))  # type: ignore[arg-type]
