"""Block orders are permutations, keep neighbours together, and change nothing but which tokens share a block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hess_plugin import PatchError, TokenLayout, patch
from hess_plugin.block_order import BLOCK_ORDERS, hilbert, tiles
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.plans import Layouts
from hess_plugin.scenes.scene import Scene
from hess_plugin.sparsity import head_weights


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(BLOCK_ORDERS)), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 4, 8, 16, 64])
)
def test_an_order_is_a_permutation(name: str, rows: int, columns: int, block: int) -> None:
    order = BLOCK_ORDERS[name](rows, columns, block)
    assert order.sort().values.tolist() == list(range(rows * columns))


@pytest.mark.parametrize("side", [2, 4, 8, 32])
def test_neighbours_on_the_hilbert_curve_are_neighbours_in_the_image(side: int) -> None:
    order = hilbert(side, side, 64)
    y, x = order // side, order % side
    assert ((y.diff().abs() + x.diff().abs()) == 1).all()
    # Every aligned run of 4^k places is a square: what makes a block compact.
    for run in order.view(-1, 4).tolist():
        assert max(i // side for i in run) - min(i // side for i in run) == 1
        assert max(i % side for i in run) - min(i % side for i in run) == 1


def test_a_tile_is_a_square_of_patches() -> None:
    first = tiles(16, 24, 64)[:64]
    assert sorted(first.tolist()) == sorted(y * 24 + x for y in range(8) for x in range(8))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 3), st.integers(0, 2), st.integers(0, 4), st.randoms())
def test_patches_come_first_in_every_layout(
    frames: int, patches: int, leading: int, trailing: int, tail: int, random: object
) -> None:
    layout = TokenLayout(frames, patches, leading=leading, trailing=trailing, tail=tail)
    within = torch.randperm(patches)
    index = layout.patches_first(within).tolist()
    assert sorted(index) == list(range(layout.tokens))
    wanted = [frame * layout.tokens_per_frame + leading + place for frame in range(frames) for place in within.tolist()]
    assert index[: layout.patch_tokens] == wanted
    assert index[layout.patch_tokens :] == sorted(index[layout.patch_tokens :])


@pytest.mark.parametrize("order", ["hilbert", "tiles"])
def test_orders_choose_other_blocks_and_the_same_share(tiny_model: TinyVGGT, room: Scene, order: str) -> None:
    outputs = {}
    for name in ("raster", order):
        with torch.no_grad(), patch(tiny_model, sparsity=0.6, block_q=8, block_k=8, block_order=name) as handle:
            outputs[name] = tiny_model(room.images)["world_points"]
        assert handle.report().sparsity == pytest.approx(0.6, abs=0.01)
    assert not torch.equal(outputs["raster"], outputs[order])


def test_an_unknown_order_is_told(tiny_model: TinyVGGT) -> None:
    with pytest.raises(PatchError, match="block_order is 'spiral', wanted one of raster, hilbert, tiles"):
        patch(tiny_model, block_order="spiral")


@pytest.mark.parametrize("order", sorted(BLOCK_ORDERS))
def test_an_order_is_made_on_the_cpu_whatever_the_default_device_is(order: str) -> None:
    layouts, layout = Layouts(order, 8), TokenLayout(2, 36, leading=1, grid=(6, 6))
    with torch.device("meta"):
        index, inverse = layouts.order(layout, torch.device("cpu"))
    assert index[inverse].tolist() == list(range(layout.tokens))


def test_a_shuffle_of_scores_does_not_hang_on_the_default_device() -> None:
    scores = torch.arange(1.0, 9.0)
    with torch.device("meta"):
        assert head_weights(scores, "random", seed=3).sort().values.tolist() == scores.tolist()
