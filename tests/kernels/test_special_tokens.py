"""Special tokens (camera, registers) are exact: seen by every query, and seeing every key."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hess_plugin_cuda import BlockLists, block_count, block_sparse_attention, token_mask

BACKENDS = ["gather", "reference"]


def sparse_lists(batch: int, heads: int, patches: int, block_q: int, block_k: int, seed: int) -> BlockLists:
    """Every row keeps at most half of the blocks, one at least."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, block_count(patches, block_q), block_count(patches, block_k))
    mask = torch.rand(shape, generator=generator) < torch.rand(shape[:3], generator=generator).unsqueeze(-1) / 2
    mask.scatter_(-1, torch.randint(shape[-1], (*shape[:-1], 1), generator=generator), True)
    return BlockLists.from_mask(mask, patches, patches, block_q, block_k)


@given(
    special=st.sampled_from([0, 1, 5, 17]), frames=st.integers(1, 40), height=st.integers(1, 3),
    width=st.integers(1, 4), batch=st.integers(1, 3), block_q=st.sampled_from([4, 16, 128]),
    block_k=st.sampled_from([4, 7, 64]), seed=st.integers(0, 10**6), backend=st.sampled_from(BACKENDS),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_exact_for_any_number_of_frames(
    special: int,
    frames: int,
    height: int,
    width: int,
    batch: int,
    block_q: int,
    block_k: int,
    seed: int,
    backend: str,
) -> None:
    patches = frames * height * width
    tokens = patches + frames * special
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, 2, tokens, 4, generator=generator, dtype=torch.float64).unbind(0)
    lists = sparse_lists(batch, 2, patches, block_q, block_k, seed)
    output = block_sparse_attention(q, k, v, lists, backend=backend)
    mask = token_mask(lists, tokens, tokens)
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(output, exact, rtol=1e-11, atol=1e-12)
    dense = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(output[:, :, patches:], dense[:, :, patches:], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("special", [1, 5, 17])
def test_equal_scores_show_which_keys_are_seen(special: int, backend: str) -> None:
    """With q = 0 every seen key weighs the same, so the output counts the keys seen, without a mask of ours."""
    patches, block = 50, 8
    lists = sparse_lists(1, 2, patches, block, block, seed=3)
    tokens = patches + special
    zero = torch.zeros(1, 2, tokens, tokens, dtype=torch.float64)
    identity = torch.eye(tokens, dtype=torch.float64).expand(1, 2, -1, -1)
    seen = block_sparse_attention(zero, zero, identity, lists, backend=backend) > 0
    assert seen[:, :, patches:].all()  # special queries see everything
    assert seen[:, :, :, patches:].all()  # special keys are seen by everyone
    kept = lists.to_mask()
    for query in range(patches):
        for key in range(patches):
            assert torch.equal(seen[:, :, query, key], kept[:, :, query // block, key // block])


def test_ten_images_of_518_by_378() -> None:
    """27 x 37 patches and 5 special tokens a frame: the shape in which the published kernel drops all 50 of them."""
    frames, patches_per_frame, special = 10, 27 * 37, 5
    patches, tokens = frames * patches_per_frame, frames * (patches_per_frame + special)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, tokens, 8, generator=generator).unbind(0)
    lists = sparse_lists(1, 2, patches, 128, 64, seed=0)
    assert (lists.query_blocks, lists.key_blocks) == (79, 157)
    output = block_sparse_attention(q, k, v, lists)

    def check(start: int, stop: int, mask: Tensor) -> None:
        """Error against float64 at most twice that of plain torch in float32, plus one rounded addition."""
        mask = mask.expand(1, 2, stop - start, tokens)
        queries = q[:, :, start:stop]
        exact = F.scaled_dot_product_attention(queries.double(), k.double(), v.double(), attn_mask=mask)
        plain = (F.scaled_dot_product_attention(queries, k, v, attn_mask=mask).double() - exact).abs().max()
        error = (output[:, :, start:stop].double() - exact).abs().max()
        assert error <= 2 * plain + torch.finfo(torch.float32).eps * exact.abs().max()

    everything = torch.ones(1, 2, 1, tokens, dtype=torch.bool)
    check(patches, tokens, everything)
    kept = lists.to_mask().repeat_interleave(64, -1)[..., :patches]
    for block in (0, 1, 38, 77, 78):  # the last one is ragged
        mask = everything.clone()
        mask[..., :patches] = kept[:, :, block : block + 1]
        check(block * 128, min(block * 128 + 128, patches), mask)
