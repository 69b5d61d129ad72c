"""Tuned masks: the least-squares problem of numpy, layers that come nearer to the original, and refusals."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hess_plugin import CalibrationError, PatchError, Scene, patch
from hess_plugin.baselines import gate_gradients, prune_heads, pruning_mask, tuned_mask, tuning
from hess_plugin.baselines.projecting import joints
from hess_plugin.baselines.tuning import DAMPING, NormalEquations
from hess_plugin.demo.model import TinyVGGT, load_demo_model
from hess_plugin.demo.rooms import make_scene
from hess_plugin.plugins import resolve_adapter
from hess_plugin.scenes.image_set import ImageSet


@pytest.fixture(scope="module")
def demo() -> TinyVGGT:
    return load_demo_model()


@pytest.fixture(scope="module")
def rooms() -> list[Scene]:
    return [make_scene(41, 2), make_scene(42, 3)]


@pytest.fixture(scope="module")
def mask() -> Tensor:
    """Keeps all of the first layer, some of the second and third, nothing of the last."""
    mask = torch.ones(4, 8, dtype=torch.float64)
    mask[1, [0, 3, 6]] = mask[2, [1, 2, 4, 5, 7]] = mask[3] = 0
    return mask


def streams(model: TinyVGGT, scenes: Sequence[Scene], layer: int) -> dict[str, Tensor]:
    """What enters one block, what goes into its output projection, and its stream behind attention: all tokens."""
    block = model.aggregator.global_blocks[layer]
    seen: dict[str, list[Tensor]] = {"before": [], "heads": [], "behind": []}
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: seen[name].append(args[0].double()[0]))
        for name, module in (("before", block), ("heads", block.attn.proj), ("behind", block.norm2))
    ]
    with torch.no_grad():
        for scene in scenes:
            model(scene.images)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def problem(model: TinyVGGT, scenes: Sequence[Scene], mask: Tensor, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """The matrix of what every kept head adds to the stream, written out, and what they should sum to."""
    block = model.aggregator.global_blocks[layer]
    whole = torch.ones_like(mask)
    whole[:layer] = mask[:layer]
    original = streams(model, scenes, layer)["behind"]
    with prune_heads(model, whole):  # the layer's own heads unmasked, those before as they are
        pruned = streams(model, scenes, layer)
    gamma, weight = block.ls1.gamma.double(), block.attn.proj.weight.double()
    columns = [
        gamma * (own @ rows.T)
        for own, rows, kept in zip(pruned["heads"].split(16, 1), weight.split(16, 1), mask[layer], strict=True)
        if kept
    ]
    wanted = original - pruned["before"] - gamma * block.attn.proj.bias.double()
    return torch.stack([c.flatten() for c in columns], 1).detach().numpy(), wanted.flatten().detach().numpy()


def least_squares(matrix: np.ndarray, wanted: np.ndarray, damping: float) -> np.ndarray:
    """Damped towards 1 by more rows, solved by numpy on the matrix itself."""
    count = matrix.shape[1]
    rows = np.sqrt(damping * (matrix**2).sum() / count) * np.eye(count)
    right = np.concatenate([wanted - matrix.sum(1), np.zeros(count)])
    return 1 + np.linalg.lstsq(np.concatenate([matrix, rows]), right, rcond=None)[0]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 4), st.sampled_from([1e-6, 1e-2, 1.0]))
def test_equations_are_those_of_the_matrix(seed: int, count: int, damping: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, width, channels = 9, 3, 5
    heads = torch.randn(tokens, count * width, generator=generator, dtype=torch.float64)
    weight = torch.randn(channels, count * width, generator=generator, dtype=torch.float64)
    wanted = torch.randn(tokens, channels, generator=generator, dtype=torch.float64)
    sums = NormalEquations.empty(count)
    sums.add(heads[:4], wanted[:4], weight)
    sums.add(heads[4:], wanted[4:], weight)
    matrix = np.stack(
        [
            (heads[:, h * width : (h + 1) * width] @ weight[:, h * width : (h + 1) * width].T).flatten().numpy()
            for h in range(count)
        ],
        1,
    )
    found = sums.solve(damping)
    np.testing.assert_allclose(found.numpy(), least_squares(matrix, wanted.flatten().numpy(), damping), atol=1e-8)
    for masks in (found, torch.ones(count, dtype=torch.float64)):
        residual = matrix @ masks.numpy() - wanted.flatten().numpy()
        assert sums.error(masks) == pytest.approx((residual**2).sum(), rel=1e-9)
    assert sums.error(found) <= sums.error(torch.ones(count, dtype=torch.float64)) * (1 + 1e-12)


def test_long_sequences_are_added_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, weight, wanted = torch.randn(50, 6), torch.randn(4, 6), torch.randn(50, 4)
    whole, parts = NormalEquations.empty(2), NormalEquations.empty(2)
    whole.add(heads, wanted, weight)
    monkeypatch.setattr(tuning, "_ROWS", 7)
    parts.add(heads, wanted, weight)
    torch.testing.assert_close(parts.gram, whole.gram)
    torch.testing.assert_close(parts.cross, whole.cross)
    assert parts.square == pytest.approx(whole.square)


def test_masks_are_those_of_numpy(demo: TinyVGGT, rooms: list[Scene], mask: Tensor) -> None:
    found = tuned_mask(demo, rooms, mask)
    assert found.dtype == torch.float64 and torch.equal(found == 0, mask == 0)
    assert bool((found[0] == 1).all()) and bool((found[1] != mask[1])[mask[1] != 0].all())
    for layer in (1, 2):
        matrix, wanted = problem(demo, rooms, found, layer)
        masks = found[layer][mask[layer] != 0].numpy()
        np.testing.assert_allclose(masks, least_squares(matrix, wanted, DAMPING), rtol=2e-3, atol=1e-4)
        tuned, plain = (((matrix @ m - wanted) ** 2).sum() for m in (masks, np.ones_like(masks)))
        assert tuned < 0.999 * plain


def test_nothing_is_tuned_where_nothing_is_pruned(demo: TinyVGGT, rooms: list[Scene]) -> None:
    whole = torch.ones(4, 8, dtype=torch.float64)
    assert torch.equal(tuned_mask(demo, rooms, whole), whole)
    assert torch.equal(tuned_mask(demo, rooms, 0 * whole), 0 * whole)


def test_a_layer_of_no_output_keeps_masks_of_one() -> None:
    sums = NormalEquations.empty(2)
    sums.add(torch.zeros(3, 4), torch.ones(3, 5), torch.ones(5, 4))
    assert sums.solve(1e-4).tolist() == [1.0, 1.0]


def test_images_alone_are_enough_and_modes_do_not_matter(demo: TinyVGGT, rooms: list[Scene], mask: Tensor) -> None:
    wanted = tuned_mask(demo, rooms, mask)
    images = [ImageSet(room.name, room.images) for room in rooms]
    demo.train()
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(tuned_mask(demo, images, mask), wanted)
        assert demo.training
    finally:
        demo.eval()
    rough = tuned_mask(demo, images, mask, autocast=torch.bfloat16)
    assert not torch.equal(rough, wanted)
    torch.testing.assert_close(rough, wanted, rtol=0.1, atol=0.1)


def test_forwards_end_at_the_layer_that_is_tuned(demo: TinyVGGT, rooms: list[Scene], mask: Tensor) -> None:
    heads: list[int] = []
    told: list[tuple[int, int, str]] = []
    hook = demo.point_head.register_forward_hook(lambda *_: heads.append(1))
    tuned_mask(demo, rooms, mask, progress=lambda *args: told.append(args))
    hook.remove()
    assert len(heads) == 1  # the forward in which projections are found
    names = [f"aggregator.global_blocks.{layer}.attn" for layer in (1, 2)]
    assert told == [(0, 2, names[0]), (1, 2, names[1]), (2, 2, "")]
    assert not any("forward" in vars(module) or module._forward_hooks for module in demo.modules())


def test_masks_out_of_range_end_the_tuning(
    demo: TinyVGGT, rooms: list[Scene], mask: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = tuned_mask(demo, rooms, mask)
    solve = NormalEquations.solve
    calls = 0

    def far(self: NormalEquations, damping: float) -> Tensor:
        nonlocal calls
        calls += 1
        return solve(self, damping) if calls == 1 else torch.full_like(self.cross, -10.5)

    monkeypatch.setattr(NormalEquations, "solve", far)
    with caplog.at_level(logging.WARNING):
        found = tuned_mask(demo, rooms, mask)
    assert torch.equal(found[1], wanted[1]) and torch.equal(found[2:], mask[2:])
    assert "tuning ends at aggregator.global_blocks.2.attn: a mask of 10.5 is out of range" in caplog.text


def test_by_name(demo: TinyVGGT, rooms: list[Scene]) -> None:
    gradients = gate_gradients(demo, rooms)
    plain = pruning_mask("kwon", gradients, 0.4, 0.5)
    found = pruning_mask("kwon-tuned", gradients, 0.4, 0.5, model=demo, scenes=rooms, damping=0.5)
    assert torch.equal(found, tuned_mask(demo, rooms, plain, damping=0.5))
    assert not torch.equal(found, tuned_mask(demo, rooms, plain)) and int((found == 0).sum()) == round(0.4 * 32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scenes": []}, CalibrationError, "no scene was given"),
        ({"scenes": iter([])}, CalibrationError, "wanted a sequence, as tuning goes through it once a layer"),
        ({"scenes": "folder"}, CalibrationError, "scenes is of type str"),
        ({"damping": 0.0}, CalibrationError, "damping is 0.0, wanted a number above 0"),
        ({"mask": torch.full((4, 8), 0.5)}, CalibrationError, "holds values other than 0 and 1"),
        ({"mask": torch.ones(4, 7)}, PatchError, r"wanted a tensor \[4, 8\]"),
    ],
)
def test_what_cannot_be_used_is_told(
    demo: TinyVGGT, rooms: list[Scene], mask: Tensor, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"scenes": rooms, "mask": mask} | changes
    with pytest.raises(error, match=message):
        tuned_mask(demo, given.pop("scenes"), given.pop("mask"), **given)


def test_a_patched_model_is_refused(demo: TinyVGGT, rooms: list[Scene], mask: Tensor) -> None:
    with patch(demo), pytest.raises(PatchError, match="remove the patch before tuning"):
        tuned_mask(demo, rooms, mask)


def test_a_site_without_a_plain_output_projection_is_told(tiny_model: TinyVGGT, room: Scene) -> None:
    attention = tiny_model.aggregator.global_blocks[1].attn
    attention.proj = nn.Sequential(nn.Flatten(0, 1), nn.Linear(32, 32), nn.Unflatten(0, (1, -1)))
    mask = torch.ones(2, 4)
    mask[0, 0] = 0
    with pytest.raises(CalibrationError, match=r"global_blocks\.1\.attn has no torch\.nn\.Linear .* untuned mask"):
        tuned_mask(tiny_model, [room], mask)


def test_the_way_into_the_residual_stream_is_found(demo: TinyVGGT, room: Scene) -> None:
    adapter = resolve_adapter(demo)
    with torch.inference_mode():
        found = joints(adapter, demo, adapter.sites(demo), demo, room.images)
    for joint, block in zip(found, demo.aggregator.global_blocks, strict=True):
        assert joint.projection is block.attn.proj and joint.block is block and joint.after is block.norm2
        torch.testing.assert_close(joint.gain, block.ls1.gamma.double(), rtol=1e-3, atol=1e-4)
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in demo.modules())


class Alone(nn.Module):
    """A block that adds its attention's output to nothing."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.attn, self.norm1 = block.attn, block.norm1

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        return self.attn(self.norm1(x), pos=pos)


def test_without_a_residual_stream_the_projection_is_reconstructed(tiny_model: TinyVGGT, room: Scene) -> None:
    block = tiny_model.aggregator.global_blocks[0] = Alone(tiny_model.aggregator.global_blocks[0])
    mask = torch.ones(2, 4, dtype=torch.float64)
    mask[0, [0, 2]] = 0
    found = tuned_mask(tiny_model, [room], mask)
    seen: list[tuple[Tensor, Tensor]] = []
    hook = block.attn.proj.register_forward_hook(lambda module, args, output: seen.append((args[0][0], output[0])))
    with torch.no_grad():
        tiny_model(room.images)
    hook.remove()
    parts = zip(seen[0][0].double().split(8, 1), block.attn.proj.weight.double().split(8, 1), strict=True)
    contributions = [(heads @ rows.T).flatten().detach() for heads, rows in parts]
    wanted = (seen[0][1].double() - block.attn.proj.bias.double()).flatten().detach()
    matrix = torch.stack([contributions[1], contributions[3]], 1).numpy()
    expected = least_squares(matrix, wanted.numpy(), DAMPING)
    np.testing.assert_allclose(found[0, [1, 3]].numpy(), expected, rtol=1e-3, atol=1e-4)
