"""The demo model has VGGT's structure, names and outputs, at any number of views."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from hess_plugin.demo.heads import DenseHead
from hess_plugin.demo.layers import RotaryEmbedding2D
from hess_plugin.demo.model import TinyVGGT, TinyVGGTConfig

SMALL = TinyVGGTConfig(dim=32, num_heads=2, depth=2, stem=16, camera_depth=1, camera_iterations=2)


@pytest.fixture()
def model() -> TinyVGGT:
    torch.manual_seed(0)
    return TinyVGGT(SMALL).eval()


@pytest.mark.parametrize("views", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 2])
def test_output_shapes(model: TinyVGGT, views: int, batch: int) -> None:
    out = model(torch.rand(batch, views, 3, 60, 60))
    assert out["pose_enc"].shape == (batch, views, 9)
    assert [pose.shape for pose in out["pose_enc_list"]] == [(batch, views, 9)] * SMALL.camera_iterations
    assert out["depth"].shape == (batch, views, 30, 30, 1)
    assert out["world_points"].shape == (batch, views, 30, 30, 3)
    assert out["depth_conf"].shape == out["world_points_conf"].shape == (batch, views, 30, 30)
    assert out["images"].shape == (batch, views, 3, 60, 60)
    assert (out["depth"] > 0).all() and (out["depth_conf"] >= 1).all() and (out["world_points_conf"] >= 1).all()


def test_unbatched_images_and_other_sizes(model: TinyVGGT) -> None:
    out = model(torch.rand(3, 3, 40, 80))
    assert out["world_points"].shape == (1, 3, 20, 40, 3)


def test_batch_members_do_not_mix(model: TinyVGGT) -> None:
    images = torch.rand(2, 3, 3, 60, 60)
    with torch.no_grad():
        together, alone = model(images), model(images[1])
    torch.testing.assert_close(together["world_points"][1:], alone["world_points"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together["pose_enc"][1:], alone["pose_enc"], atol=1e-5, rtol=1e-4)


def test_order_of_later_views_does_not_matter(model: TinyVGGT) -> None:
    """Only the first view is special: permuting the others permutes the outputs."""
    images, order = torch.rand(4, 3, 60, 60), torch.tensor([0, 3, 1, 2])
    with torch.no_grad():
        plain, permuted = model(images), model(images[order])
    torch.testing.assert_close(plain["world_points"][:, order], permuted["world_points"], atol=1e-5, rtol=1e-4)


def test_patch_tokens_read_their_patch_and_a_rim(model: TinyVGGT) -> None:
    images = torch.full((1, 3, 60, 60), 0.4)
    changed = images.clone()
    changed[:, :, 53:57, 3:7] = 1.0
    with torch.no_grad():
        embed = model.aggregator.patch_embed
        moved = (embed(changed) - embed(images)).abs().sum(-1).reshape(6, 6)
    assert moved[5, 0] > 0 and (moved > 0).sum() == 1


def test_dense_maps_are_laid_out_like_the_image() -> None:
    head = DenseHead(8, patch_size=10, stride=2, channels=1, activation="linear")
    order = torch.arange(25.0)  # inside a patch: five rows of five
    head.mlp = _Stub(torch.stack([order, order], dim=-1).flatten())
    head.norm = torch.nn.Identity()
    tokens = torch.zeros(1, 1, 5 + 6, 8)
    tokens[0, 0, 5:, 0] = 100 * torch.arange(6.0)  # two rows of three patches
    values, _ = head([tokens], torch.zeros(1, 1, 3, 20, 30), 5)
    assert values.shape == (1, 1, 10, 15, 1)
    assert values[0, 0, 7, 11, 0] == 500 + 2 * 5 + 1


class _Stub(torch.nn.Module):
    def __init__(self, inside: torch.Tensor) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[..., :1] + self.inside


def test_structure_is_upstreams(model: TinyVGGT) -> None:
    aggregator = model.aggregator
    assert aggregator.patch_start_idx == 5 and aggregator.patch_size == 10
    assert aggregator.camera_token.shape == (1, 2, 1, 32) and aggregator.register_token.shape == (1, 2, 4, 32)
    tokens, start = aggregator(torch.rand(1, 2, 3, 60, 60))
    assert [t.shape for t in tokens] == [(1, 2, 41, 64)] * 2 and start == 5
    block = aggregator.global_blocks[0]
    for part in ("norm1", "attn", "ls1", "norm2", "mlp", "ls2"):
        assert hasattr(block, part)
    assert block.attn.qkv.weight.shape == (96, 32)
    assert (block.attn.num_heads, block.attn.head_dim) == (2, 16)
    assert block.attn.rope is not None


def test_positions_mark_special_tokens_and_frames(model: TinyVGGT) -> None:
    seen: list[torch.Tensor] = []
    attention = model.aggregator.global_blocks[0].attn
    handle = attention.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["pos"]), with_kwargs=True)
    model(torch.rand(3, 3, 40, 60))
    handle.remove()
    special = (seen[0][0] == 0).all(-1).reshape(3, -1)
    assert special[:, :5].all() and not special[:, 5:].any()
    assert seen[0][0].max(0).values.tolist() == [4, 6]


def test_one_attention_call_per_forward(model: TinyVGGT) -> None:
    attention = model.aggregator.global_blocks[0].attn
    with patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as spy:
        attention(torch.rand(1, 7, 32), pos=torch.zeros(1, 7, 2, dtype=torch.long))
    assert spy.call_count == 1


def test_gradient_reaches_every_global_block(model: TinyVGGT) -> None:
    # The pose branch starts at zero, which would cut the camera's gradient: any trained value will do.
    torch.nn.init.normal_(model.camera_head.pose_branch.weight, std=0.1)
    for key in ("pose_enc", "world_points", "depth"):
        model.zero_grad()
        model(torch.rand(3, 3, 60, 60))[key].square().sum().backward()
        for block in model.aggregator.global_blocks:
            gradient = block.attn.qkv.weight.grad
            assert gradient is not None and gradient.abs().sum() > 0, key


def test_rotary_embedding_sees_only_differences() -> None:
    rope = RotaryEmbedding2D()
    q, k = torch.rand(1, 1, 1, 16), torch.rand(1, 1, 1, 16)

    def score(a: tuple[int, int], b: tuple[int, int]) -> torch.Tensor:
        return (rope(q, torch.tensor([[a]])) * rope(k, torch.tensor([[b]]))).sum()

    torch.testing.assert_close(score((1, 2), (3, 5)), score((4, 7), (6, 10)))
    assert not torch.isclose(score((1, 2), (3, 5)), score((1, 2), (5, 3)))
    torch.testing.assert_close(rope(q, torch.zeros(1, 1, 2, dtype=torch.long)), q)
