"""Which heads go: counts, importance, search and rearrangement, against brute force."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hess_plugin import CalibrationError, ProfileMismatch
from hess_plugin.baselines import METHODS, GateGradients, kwon_mask, michel_mask, pruning_mask
from hess_plugin.baselines.kwon import gate_fisher, rearrange, search
from hess_plugin.baselines.michel import head_importance
from hess_plugin.baselines.mixing import pruned_count
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.scenes.scene import Scene

NAN = torch.nan


def gradients(camera: Any, points: Any) -> GateGradients:
    camera, points = (torch.as_tensor(values, dtype=torch.float64) for values in (camera, points))
    sites = tuple(f"site{i}" for i in range(camera.shape[1]))
    return GateGradients("a", sites, tuple(f"scene{i}" for i in range(len(camera))), camera, points, "")


def random_gradients(seed: int, scenes: int, layers: int, heads: int) -> GateGradients:
    generator = torch.Generator().manual_seed(seed)
    camera, points = torch.randn(2, scenes, layers, heads, generator=generator, dtype=torch.float64)
    return gradients(camera * torch.rand(layers, heads, generator=generator), points * 100)


def cost(mask: Tensor, fisher: Tensor) -> Tensor:
    """What pruning costs in each layer: ``[L]``."""
    return torch.einsum("lh,lhk,lk->l", 1 - mask, fisher, 1 - mask)


shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))


@given(st.integers(0, 999), shapes, st.floats(0, 0.99), st.sampled_from([0.0, 0.3, 1.0]))
def test_as_many_heads_go_as_the_sparsity_says(
    seed: int, shape: tuple[int, int, int], sparsity: float, weight: float
) -> None:
    given_ = random_gradients(seed, *shape)
    total = shape[1] * shape[2]
    for make in (michel_mask, kwon_mask):
        mask = make(given_, sparsity, weight)
        assert mask.dtype == torch.float64 and tuple(mask.shape) == shape[1:]
        assert set(mask.flatten().tolist()) <= {0.0, 1.0}
        pruned = int((mask == 0).sum())
        assert pruned == round(sparsity * total) and abs(pruned / total - sparsity) <= 0.5 / total + 1e-12


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, NAN, "0.5", True, None])
def test_no_other_sparsity_is_taken(sparsity: Any) -> None:
    with pytest.raises(CalibrationError, match=r"sparsity is .*, wanted a number from 0"):
        pruned_count(sparsity, 2, 4)


def test_importance_by_hand() -> None:
    camera = [[[1.0, -2.0], [0.0, 4.0]], [[-3.0, 2.0], [0.0, -4.0]]]  # means of sizes: 2 2 | 0 4, size 8
    points = [[[10.0, 0.0], [0.0, 0.0]], [[NAN, NAN], [NAN, NAN]]]  # one scene: 10 0 | 0 0, size 10
    found = head_importance(gradients(camera, points), 0.25)
    mixed = 0.25 * torch.tensor([[2.0, 2.0], [0.0, 4.0]]) / 8 + 0.75 * torch.tensor([[10.0, 0.0], [0.0, 0.0]]) / 10
    wanted = mixed.double() / mixed.double().norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_gradients_of_opposite_sign_do_not_cancel() -> None:
    camera = [[[5.0, 1.0]], [[-5.0, 1.0]]]
    assert michel_mask(gradients(camera, camera), 0.5, 1.0).tolist() == [[1.0, 0.0]]
    assert kwon_mask(gradients(camera, camera), 0.5, 1.0).tolist() == [[1.0, 0.0]]


def test_a_layer_without_gradient_goes_first() -> None:
    camera = [[[0.0, 0.0], [1.0, 2.0]]]
    assert michel_mask(gradients(camera, camera), 0.5, 0.5).tolist() == [[0.0, 0.0], [1.0, 1.0]]


@given(st.integers(0, 999), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_units_of_errors_do_not_matter(seed: int, one: float, other: float) -> None:
    first = random_gradients(seed, 3, 2, 3)
    second = gradients(first.camera * one, first.points * other)
    torch.testing.assert_close(head_importance(second, 0.5), head_importance(first, 0.5))
    torch.testing.assert_close(gate_fisher(second, 0.5), gate_fisher(first, 0.5))


@given(st.integers(0, 999), shapes)
def test_the_weight_chooses_one_error(seed: int, shape: tuple[int, int, int]) -> None:
    both = random_gradients(seed, *shape)
    alone = gradients(both.camera, torch.full_like(both.points, NAN))
    assert torch.equal(gate_fisher(both, 1.0), gate_fisher(alone, 1.0))
    # An error that no scene has is left to the other.
    torch.testing.assert_close(head_importance(alone, 0.3), head_importance(both, 1.0))
    torch.testing.assert_close(gate_fisher(alone, 0.3), 0.3 * gate_fisher(both, 1.0))
    for make in (michel_mask, kwon_mask):
        with pytest.raises(CalibrationError, match=r"with camera_weight 0\.0 no gate has a gradient"):
            make(alone, 0.5, 0.0)
        with pytest.raises(CalibrationError, match=r"camera_weight is 1\.5"):
            make(both, 0.5, 1.5)


def test_the_fisher_matrix_is_the_mean_of_outer_products() -> None:
    given_ = random_gradients(5, 3, 2, 4)
    found = gate_fisher(given_, 0.25)
    wanted = torch.zeros(2, 4, 4, dtype=torch.float64)
    for values, weight in ((given_.camera, 0.25), (given_.points, 0.75)):
        each = torch.stack([torch.stack([torch.outer(row, row) for row in scene]) for scene in values]).mean(0)
        wanted += weight * each / sum(float(layer.trace()) for layer in each)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)


@given(st.integers(0, 9999), st.integers(1, 2), st.integers(1, 4), st.data())
def test_no_set_of_heads_has_less_diagonal_information(seed: int, layers: int, heads: int, data: st.DataObject) -> None:
    fisher = gate_fisher(random_gradients(seed, 3, layers, heads), 0.5)
    count = data.draw(st.integers(0, layers * heads))
    diagonal = fisher.diagonal(dim1=1, dim2=2).flatten()
    mask = search(fisher, count)
    least = min(float(diagonal[list(subset)].sum()) for subset in itertools.combinations(range(layers * heads), count))
    assert float(diagonal[mask.flatten() == 0].sum()) == pytest.approx(least, rel=1e-12, abs=1e-15)
    assert int((mask == 0).sum()) == count


@given(st.integers(0, 9999), st.integers(1, 3), st.integers(1, 6), st.data())
def test_rearranging_never_costs_and_keeps_counts(seed: int, layers: int, heads: int, data: st.DataObject) -> None:
    fisher = gate_fisher(random_gradients(seed, 3, layers, heads), 0.5)
    mask = search(fisher, data.draw(st.integers(0, layers * heads)))
    after = rearrange(mask, fisher)
    assert torch.equal(after.sum(1), mask.sum(1)) and set(after.flatten().tolist()) <= {0.0, 1.0}
    assert bool((cost(after, fisher) <= cost(mask, fisher) + 1e-12).all())


def test_heads_that_cancel_are_pruned_together() -> None:
    # Heads 1 and 2 do opposite things: the diagonal prunes 0 and 3, together 1 and 2 cost nothing.
    camera = [[[1.0, 2.0, -2.0, 1.0]], [[1.0, 3.0, -3.0, 1.0]]]
    fisher = gate_fisher(gradients(camera, camera), 1.0)
    assert search(fisher, 2).tolist() == [[0.0, 1.0, 1.0, 0.0]]
    mask = kwon_mask(gradients(camera, camera), 0.5, 1.0)
    best = min(
        (torch.ones(1, 4, dtype=torch.float64).index_fill(1, torch.tensor(pair), 0.0)
         for pair in itertools.combinations(range(4), 2)),
        key=lambda m: float(cost(m, fisher)),
    )  # fmt: skip
    assert best.tolist() == [[1.0, 0.0, 0.0, 1.0]]
    assert float(cost(mask, fisher)) <= float(cost(search(fisher, 2), fisher))


def test_rearranging_swaps_where_one_swap_is_best() -> None:
    # Pruned first: 0 and 1, which add up; head 2 takes back what 0 does.
    camera = [[[1.0, 1.1, -1.2, 9.0]]]
    fisher = gate_fisher(gradients(camera, camera), 1.0)
    before = search(fisher, 2)
    after = rearrange(before, fisher)
    assert before.tolist() == [[0.0, 0.0, 1.0, 1.0]] and after.tolist() == [[1.0, 0.0, 0.0, 1.0]]
    assert float(cost(after, fisher)) < 0.01 * float(cost(before, fisher))


def test_methods_by_name(tiny_model: TinyVGGT, room: Scene) -> None:
    given_ = random_gradients(1, 3, 2, 4)
    assert METHODS == ("michel", "kwon", "kwon-tuned")
    assert torch.equal(pruning_mask("michel", given_, 0.5, 0.5), michel_mask(given_, 0.5, 0.5))
    assert torch.equal(pruning_mask("kwon", given_, 0.5, 0.5), kwon_mask(given_, 0.5, 0.5))
    with pytest.raises(CalibrationError, match="method is 'random', wanted one of michel, kwon, kwon-tuned"):
        pruning_mask("random", given_, 0.5, 0.5)
    with pytest.raises(CalibrationError, match="give model and scenes"):
        pruning_mask("kwon-tuned", given_, 0.5, 0.5)
    with pytest.raises(ProfileMismatch, match="measured with sites"):
        pruning_mask("kwon-tuned", given_, 0.5, 0.5, model=tiny_model, scenes=[room])
    with pytest.raises(CalibrationError, match="sparsity is 1"):
        pruning_mask("kwon", given_, 1, 0.5)
