"""Harm curves: what they are by definition, and that measuring them changes and loses nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import hess_plugin_cuda
from hess_plugin import CalibrationError, PatchError, Profile, ProfileError, Scene, patch
from hess_plugin.block_order import BLOCK_ORDERS
from hess_plugin.calibration.calibrator import calibrate
from hess_plugin.calibration.estimate import estimate
from hess_plugin.calibration.harm import HarmSettings
from hess_plugin.calibration.harm_meter import HarmMeter, harm_meter
from hess_plugin.calibration.live_memory import LiveMemory
from hess_plugin.calibration.measuring import Measured, Protocol, measuring
from hess_plugin.demo.model import TinyVGGT, load_demo_model
from hess_plugin.demo.rooms import make_scene
from hess_plugin.harm_curves import model_curves
from hess_plugin.interception import SDPA
from hess_plugin.plugins import resolve_adapter
from hess_plugin.sparsity import SELECTORS
from hess_plugin_cuda import BlockLists, block_sparse_attention

ANY_DISTANCE = 1e6  # random weights predict points far from the truth
SMALL = HarmSettings(block_q=8, block_k=8, shares=(0.1, 0.3, 0.5, 0.9))
SPECIAL = 5  # a frame, in TinyVGGT


@pytest.fixture
def tiny_model(tiny_model: TinyVGGT) -> TinyVGGT:
    """The shared model with a camera head that does not answer the same pose for every view."""
    torch.manual_seed(1)
    nn.init.normal_(tiny_model.camera_head.pose_branch.weight, std=0.1)
    return tiny_model


@pytest.fixture(scope="module")
def rooms() -> tuple[Scene, ...]:
    return tuple(make_scene(seed, views=3) for seed in (21, 22, 23))


def measured(model: nn.Module, scene: Scene, harm: HarmSettings | None = SMALL, **options: Any) -> Measured:
    adapter = resolve_adapter(model)
    protocol = Protocol(eps=ANY_DISTANCE, harm=harm, **options)
    with measuring(adapter, model, adapter.sites(model), protocol) as measurer:
        return measurer.measure(scene)


# ---------------------------------------------------------------- by definition


class GlobalCalls(TorchFunctionMode):
    """Keeps q, k, v and the output, with its graph, of every attention call over all frames."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is SDPA and args[0].shape[2] == self.tokens:
            self.calls.append((*args[:3], output))
        return output


def masked_change(q: Tensor, k: Tensor, v: Tensor, settings: HarmSettings, count: int, order: Tensor) -> Tensor:
    """What keeping `count` blocks a row changes in one head's output ``[N, d]``, by a mask over all pairs of tokens."""
    patches, total = len(order), len(q)
    scores = q @ k.T / math.sqrt(q.shape[1])
    rows, columns = (math.ceil(patches / size) for size in (settings.block_q, settings.block_k))
    of_row, of_column = torch.full((total,), -1), torch.full((total,), -1)
    of_row[order] = torch.arange(patches) // settings.block_q
    of_column[order] = torch.arange(patches) // settings.block_k
    kept = torch.ones(total, total, dtype=torch.bool)
    for row in range(rows):
        pooled = q[of_row == row].mean(0)
        seen = torch.stack([pooled @ k[of_column == column].mean(0) for column in range(columns)])
        for column in seen.argsort(descending=True)[count:].tolist():
            kept &= ~((of_row == row)[:, None] & (of_column == column)[None, :])
    sparse = scores.masked_fill(~kept, -math.inf).softmax(-1) @ v
    return sparse - scores.softmax(-1) @ v


@pytest.mark.parametrize(
    "settings",
    [
        SMALL,
        HarmSettings(block_q=16, block_k=4, minimum=1, shares=(0.02, 0.4), block_order="hilbert"),
        HarmSettings(block_q=5, block_k=16, minimum=3, shares=(0.2, 0.6), block_order="tiles"),
    ],
)
def test_curves_are_what_they_are_defined_to_be(
    tiny_model: TinyVGGT, rooms: tuple[Scene, ...], settings: HarmSettings
) -> None:
    model, scene = tiny_model, rooms[0]
    found = measured(model, scene, settings, memory="plain").traces
    adapter = resolve_adapter(model)
    side = 60 // model.config.patch_size
    tokens = scene.views * (SPECIAL + side**2)
    within = BLOCK_ORDERS[settings.block_order](side, side, settings.block_k)
    order = torch.cat([f * (SPECIAL + side**2) + SPECIAL + within for f in range(scene.views)])
    with GlobalCalls(tokens) as seen:
        errors = adapter.compute_errors(model, scene.normalised(), ANY_DISTANCE)
    assert len(seen.calls) == 2 == len(found["harm.camera"])
    columns = math.ceil(len(order) / settings.block_k)
    counts = [max(settings.minimum, round(share * columns)) for share in settings.shares]
    assert found["harm.shares"].tolist() == [count / columns for count in counts]
    for kind, error in (("camera", errors.camera), ("points", errors.points)):
        assert error is not None
        gradients = torch.autograd.grad(error, [call[3] for call in seen.calls], retain_graph=True)
        for layer, ((q, k, v, _), gradient) in enumerate(zip(seen.calls, gradients, strict=True)):
            q, k, v, gradient = (x.detach().double() for x in (q, k, v, gradient))
            for head in range(4):
                metric = sum(torch.outer(gradient[0, head, t], gradient[0, head, t]) for t in order.tolist())
                metric = metric / len(order)
                for index, count in enumerate(counts):
                    change = masked_change(q[0, head], k[0, head], v[0, head], settings, count, order)[order]
                    wanted = sum(one @ metric @ one for one in change) / len(order)
                    got = found[f"harm.{kind}"][layer, head, index].item()
                    assert wanted > 0 and got == pytest.approx(wanted.item(), rel=1e-4), (kind, layer, head, count)


@pytest.mark.parametrize("selector", sorted(SELECTORS))
@pytest.mark.parametrize("pool_k", [None, 2])
def test_blocks_are_those_that_a_patch_would_keep(
    tiny_model: TinyVGGT, rooms: tuple[Scene, ...], monkeypatch: pytest.MonkeyPatch, selector: str, pool_k: int | None
) -> None:
    """At the first site, where both see the same queries and keys."""
    kept: list[BlockLists] = []

    def note(*args: Any, **options: Any) -> Tensor:
        kept.append(args[3])
        return block_sparse_attention(*args, **options)

    monkeypatch.setattr(hess_plugin_cuda, "block_sparse_attention", note)
    settings = replace(SMALL, shares=(5 / 14,), selector=selector, pool_k=pool_k)
    measured(tiny_model, rooms[0], settings)
    first, own = kept[0], len(kept)
    how = {"block_q": 8, "block_k": 8, "selector": selector, "pool_k": pool_k}
    with patch(tiny_model, allocation="equal", sparsity=1 - 5 / 14, **how), torch.no_grad():
        tiny_model(rooms[0].images)
    assert torch.equal(first.row_ptr, kept[own].row_ptr) and torch.equal(first.col, kept[own].col)


def test_nothing_else_is_changed(tiny_model: TinyVGGT, rooms: tuple[Scene, ...]) -> None:
    """Traces are the same bits with curves measured beside them, and so are the model and what it predicts."""
    before = (tiny_model(rooms[0].images)["pose_enc"], [sorted(vars(m)) for m in tiny_model.modules()])
    for memory in ("plain", "lean"):
        without, beside = (measured(tiny_model, rooms[0], harm, memory=memory).traces for harm in (None, SMALL))
        assert {"harm.camera", "harm.points", "harm.shares"} <= set(beside) - set(without)
        assert all(torch.equal(beside[name], trace) for name, trace in without.items())
    assert torch.equal(before[0], tiny_model(rooms[0].images)["pose_enc"])
    assert before[1] == [sorted(vars(m)) for m in tiny_model.modules()]


def test_little_memory_gives_the_same_curves() -> None:
    demo, scene = load_demo_model(), make_scene(41, 5)
    plain, little = (measured(demo, scene, memory=memory).traces for memory in ("plain", "lean"))
    for name in ("harm.camera", "harm.points"):
        assert bool((plain[name] > 0).all())
        torch.testing.assert_close(little[name], plain[name], rtol=1e-4, atol=0.0)
    falling = plain["harm.points"].mean((0, 1))
    assert bool((falling[1:] < falling[:-1]).all())


@pytest.mark.parametrize("memory", ["plain", "lean"])
def test_heads_in_groups_and_repeated_calls_give_the_same_curves(
    tiny_model: TinyVGGT, rooms: tuple[Scene, ...], monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    wanted = measured(tiny_model, rooms[0], memory=memory).traces
    monkeypatch.setattr("hess_plugin.calibration.harm_site.GROUP", 1)
    original = HarmMeter.measure

    def twice(self: HarmMeter, errors: Any, predict: Callable[[], Any]) -> Any:
        return original(self, errors, lambda: (predict(), predict()))

    monkeypatch.setattr(HarmMeter, "measure", twice)
    found = measured(tiny_model, rooms[0], memory=memory).traces
    for name in ("harm.camera", "harm.points", "harm.shares"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=0.0)


def test_autocast_and_predictions_as_truth(tiny_model: TinyVGGT, rooms: tuple[Scene, ...]) -> None:
    exact = measured(tiny_model, rooms[0]).traces["harm.points"]
    rounded = measured(tiny_model, rooms[0], autocast=torch.bfloat16).traces["harm.points"]
    torch.testing.assert_close(rounded, exact, rtol=0.5, atol=exact.max().item() * 0.05)
    assert not torch.equal(rounded, exact)
    itself = measured(tiny_model, rooms[0], target="self").traces
    assert bool((itself["harm.camera"] > 0).all() and (itself["harm.points"] > 0).all())


# ---------------------------------------------------------------- what cannot be measured


def test_shares_that_are_one_number_of_blocks_have_one_harm(tiny_model: TinyVGGT, rooms: tuple[Scene, ...]) -> None:
    found = measured(tiny_model, rooms[0], replace(SMALL, shares=(0.001, 0.1, 0.99))).traces
    assert found["harm.shares"].tolist() == [2 / 14, 2 / 14, 1.0]
    curves = found["harm.points"]
    assert torch.equal(curves[..., 0], curves[..., 1]) and bool((curves[..., 2] == 0).all())  # all kept is no harm


def test_an_error_that_a_scene_lacks_has_no_curve(tiny_model: TinyVGGT, rooms: tuple[Scene, ...]) -> None:
    found = measured(tiny_model, replace(rooms[0], depth=None)).traces
    assert bool(found["harm.points"].isnan().all()) and bool((found["harm.camera"] > 0).all())
    assert bool(found["harm.shares"].isfinite().all())


def test_a_scene_of_few_blocks_has_no_curves_and_says_so(tiny_model: TinyVGGT, rooms: tuple[Scene, ...]) -> None:
    coarse = replace(SMALL, block_k=64)  # 108 patches
    profile = calibrate(tiny_model, rooms[:1], eps=ANY_DISTANCE, harm=coarse)
    assert profile.has_harm and all(bool(curves.isnan().all()) for curves in profile.harm.values())
    facts = profile.metadata["measured"][rooms[0].name]
    assert facts["harm"] == "no curves: there are 2 key blocks, and every row keeps 2"
    assert torch.equal(
        profile.traces["camera.q"], calibrate(tiny_model, rooms[:1], eps=ANY_DISTANCE).traces["camera.q"]
    )
    with pytest.raises(ProfileError, match="the profile has no harm curves; calibrate on scenes that have"):
        patch(tiny_model, profile=profile, allocation="harm", sparsity=0.5)
    both = calibrate(tiny_model, [rooms[0].subset([0, 1]), rooms[1]], eps=ANY_DISTANCE, harm=replace(SMALL, block_k=30))
    assert both.harm["shares"].isnan().all(1).tolist() == [False, False]
    mixed = calibrate(
        tiny_model, [rooms[0].subset([0, 1]), rooms[1]], eps=ANY_DISTANCE, harm=replace(SMALL, block_k=40)
    )
    assert mixed.harm["shares"].isnan().all(1).tolist() == [True, False]
    shares, curves = model_curves(mixed)
    assert shares.tolist() == pytest.approx([2 / 3, 1.0]) and bool((curves[..., 0] > 0).all())


def test_attention_that_no_blocks_can_be_left_out_of_is_told(
    tiny_model: TinyVGGT, rooms: tuple[Scene, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    monkeypatch.setattr("hess_plugin.demo.layers._attend", causal)
    with pytest.raises(PatchError, match=r"in another way than plain self-attention .* calibrate without harm curves"):
        calibrate(tiny_model, rooms[:1], eps=ANY_DISTANCE, harm=SMALL)
    assert calibrate(tiny_model, rooms[:1], eps=ANY_DISTANCE).harm == {}


def test_sites_of_different_lengths_are_told(tiny_model: TinyVGGT) -> None:
    adapter = resolve_adapter(tiny_model)
    with harm_meter(adapter, tiny_model, adapter.sites(tiny_model), SMALL) as meter:
        assert meter is not None and meter.kept(20, "a") == [2, 6, 10, 18]
        with pytest.raises(PatchError, match="b has 21 key blocks and another site 20"):
            meter.kept(21, "b")


def test_gradients_that_are_not_finite_skip_the_scene(
    tiny_model: TinyVGGT, rooms: tuple[Scene, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hess_plugin.calibration import measuring as module

    def spoil(*args: Any, **options: Any) -> dict[str, Tensor]:
        found = module_head_traces(*args, **options)
        return {name: trace.nan_to_num() for name, trace in found.items()}

    module_head_traces = module.head_traces
    monkeypatch.setattr(module, "head_traces", spoil)
    monkeypatch.setattr("hess_plugin.calibration.harm_site.SiteMeter._collect", _collect_nan)
    with pytest.raises(
        CalibrationError, match=r"gradient by the attention of aggregator\.global_blocks\.0\.attn is not"
    ):
        measured(tiny_model, rooms[0])


def _collect_nan(self: Any, gradient: Tensor, *, patches: Tensor) -> None:
    for metric in self._metrics.values():
        metric.fill_(torch.nan)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"block_q": 0}, "harm settings: block_q is 0"),
        ({"selector": "best"}, "harm settings: selector is 'best'"),
        ({"block_order": "spiral"}, "harm settings: block_order is 'spiral'"),
        ({"minimum": True}, "harm settings: minimum is True"),
        ({"shares": ()}, r"harm shares are \(\), wanted some ascending"),
        ({"shares": (0.5, 0.5)}, "harm shares are"),
        ({"shares": (0.0, 0.5)}, "harm shares are"),
        ({"shares": (0.5, 1.0)}, "harm shares are"),
        ({"shares": (0.5, math.nan)}, "harm shares are"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CalibrationError, match=sentence):
        HarmSettings(**options)


# ---------------------------------------------------------------- in a calibration


def test_the_profile_holds_the_curves_of_every_scene(
    tiny_model: TinyVGGT, rooms: tuple[Scene, ...], tmp_path: Path
) -> None:
    scenes = [rooms[0], rooms[1].subset([0, 1]), replace(rooms[2], depth=None)]
    profile = calibrate(tiny_model, scenes, eps=ANY_DISTANCE, harm=SMALL, output=tmp_path / "a.hess")
    loaded = Profile.load(tmp_path / "a.hess")
    assert loaded.metadata["harm"] == SMALL.to_json() == profile.metadata["harm"]
    for index, scene in enumerate(scenes):
        alone = measured(tiny_model, scene)
        for name in ("camera", "points", "shares"):
            torch.testing.assert_close(
                loaded.harm[name][index], alone.traces[f"harm.{name}"], rtol=0, atol=0, equal_nan=True
            )
        assert loaded.metadata["measured"][scene.name]["harm"].startswith("measured keeping 2 to ")
    assert "harm" not in calibrate(tiny_model, rooms[:1], eps=ANY_DISTANCE).metadata
    handle = patch(tiny_model, profile=loaded, allocation="harm", sparsity=0.6, block_q=8, block_k=8)
    with handle:
        tiny_model(rooms[0].images)
    assert handle.report().sparsity == pytest.approx(0.6, abs=1e-3)


def test_a_killed_calibration_goes_on_and_other_settings_are_refused(
    tiny_model: TinyVGGT, rooms: tuple[Scene, ...], tmp_path: Path
) -> None:
    def kill(done: int, total: int, scene: str) -> None:
        if done == 2 and scene:
            raise KeyboardInterrupt

    how: dict[str, Any] = {"eps": ANY_DISTANCE, "output": tmp_path / "a.hess"}
    wanted = calibrate(tiny_model, rooms, eps=ANY_DISTANCE, harm=SMALL)
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_model, rooms, harm=SMALL, progress=kill, **how)
    for other in (None, replace(SMALL, block_k=16), replace(SMALL, shares=(0.5,))):
        with pytest.raises(CalibrationError, match=r"a\.hess\.partial is of a calibration with harm = \{'block_q': 8"):
            calibrate(tiny_model, rooms, harm=other, **how)
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    hook = tiny_model.register_forward_pre_hook(count)
    found = calibrate(tiny_model, rooms, harm=SMALL, **how)
    hook.remove()
    assert forwards == 2  # of the last scene alone: with gradient, and without
    assert all(torch.equal(found.harm[name], wanted.harm[name]) for name in ("camera", "points", "shares"))
    assert not (tmp_path / "a.hess.partial").exists()


def test_the_estimate_counts_the_second_forward() -> None:
    model, scene, flops = load_demo_model(), make_scene(43, 6), []
    adapter = resolve_adapter(model)
    for harm in (None, replace(SMALL, shares=(0.2, 0.5))):
        protocol = Protocol(harm=harm)
        found = estimate(adapter, model, 6, 60, 60, protocol, timed=False)
        real = LiveMemory([*model.parameters(), *model.buffers()])
        with measuring(adapter, model, adapter.sites(model), protocol) as measurer, real:
            measurer.measure(scene)
        assert found.activations == pytest.approx(real.peak, rel=0.05)
        flops.append((found.flops, real.flops))
    (less, really_less), (more, really_more) = flops
    assert more - less == pytest.approx(really_more - really_less, rel=0.1) and more > 1.05 * less
