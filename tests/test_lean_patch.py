"""`patch(..., memory="lean")`: the same outputs, less alive at once, everything given back."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hess_plugin import AdapterError, Family, JoinedLayers, PatchError, patch, unpatch
from hess_plugin.calibration.live_memory import LiveMemory
from hess_plugin.demo.model import TinyVGGT, TinyVGGTConfig
from hess_plugin.memory.forwards import LeanForward
from hess_plugin.plugins import resolve_adapter

BLOCKS: dict[str, Any] = {"block_q": 8, "block_k": 8}
SMALL = 3000  # numbers in a chunk: a few of the frames below


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and groups so small that these inputs have several."""
    monkeypatch.setattr("hess_plugin.memory.chunks.CHUNK", SMALL)
    monkeypatch.setattr("hess_plugin.attention.GROUP", 1)


@pytest.fixture
def deep_model() -> TinyVGGT:
    """Six layers, of which the heads read the last."""
    torch.manual_seed(0)
    return TinyVGGT(TinyVGGTConfig(dim=32, num_heads=4, depth=6, stem=16, camera_depth=1)).eval()


def images_of(views: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(batch, views, 3, 60, 70, generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        predicted = model(images)
    return {name: value for name, value in predicted.items() if isinstance(value, Tensor)}


def peak(model: nn.Module, images: Tensor) -> int:
    """Most bytes alive in one forward besides the model."""
    run(model, images)  # tables that are kept from now on
    with LiveMemory([*model.parameters(), *model.buffers(), images]) as memory:
        run(model, images)
    return memory.peak


def everything(model: nn.Module) -> list[object]:
    """All that could be left behind in a model."""
    return [
        (name, type(module), {k: id(v) for k, v in vars(module).items()}, len(module._forward_hooks))
        for name, module in model.named_modules()
    ]


def no_worse_than_plain(model: nn.Module, images: Tensor, lean: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    """Lean outputs are as near to those in float64 as plain ones, up to a few roundings."""
    twin = copy.deepcopy(model).double()
    twin.camera_head.float().register_forward_pre_hook(lambda _, args: ([args[0][-1].float()],))  # keeps to float32
    torch.set_default_dtype(torch.float64)
    try:
        exact = run(twin, images.double())
    finally:
        torch.set_default_dtype(torch.float32)
    for name in plain:
        scale = exact[name].abs().max()
        error, plain_error = ((found[name] - exact[name]).abs().max() / scale for found in (lean, plain))
        assert error <= 2 * plain_error + 1e-7, name


# ---------------------------------------------------------------- outputs


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("views", [1, 2, 7])
@pytest.mark.parametrize("batch", [1, 2])
def test_dense_outputs_are_those_of_the_unpatched_model(deep_model: TinyVGGT, views: int, batch: int) -> None:
    images = images_of(views, batch)
    plain = run(deep_model, images)
    with patch(deep_model, sparsity=0.0, memory="lean") as handle:
        lean = run(deep_model, images)
    assert lean.keys() == plain.keys() and all(lean[name].shape == plain[name].shape for name in plain)
    no_worse_than_plain(deep_model, images, lean, plain)
    assert all(site.dense_calls == 1 for site in handle.report().sites)


def test_outputs_are_bit_equal_where_everything_is_one_chunk(deep_model: TinyVGGT) -> None:
    images = images_of(3)
    plain = run(deep_model, images)
    with patch(deep_model, sparsity=0.0, memory="lean"):
        lean = run(deep_model, images)
    assert all(torch.equal(lean[name], plain[name]) for name in plain)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("how", [{"sparsity": 0.5}, {"sparse_ratio": 0.4, "cdf_threshold": 0.6}])
def test_sparse_outputs_are_those_of_a_plain_patch(deep_model: TinyVGGT, how: dict[str, float]) -> None:
    images = images_of(5, 2)
    found, reports = [], []
    for memory in ("plain", "lean"):
        with patch(deep_model, **how, **BLOCKS, memory=memory) as handle:
            found.append(run(deep_model, images))
        reports.append(handle.report())
    # Chunks round otherwise, which may exchange two blocks of all but the same mass: the same amount is kept.
    assert [site.head_sparsity is not None for site in reports[1].sites] == [True] * 6
    assert reports[1].sparsity == pytest.approx(reports[0].sparsity, abs=0.005)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=2e-3, atol=2e-3)


def test_grouping_heads_alone_changes_no_bit_of_a_whole_model(
    deep_model: TinyVGGT, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = images_of(5, 2)
    with patch(deep_model, sparsity=0.5, **BLOCKS):
        plain = run(deep_model, images)
    monkeypatch.setattr("hess_plugin.attention.GROUP", 1)
    with patch(deep_model, sparsity=0.5, **BLOCKS, memory="lean"):
        lean = run(deep_model, images)
    assert all(torch.equal(lean[name], plain[name]) for name in plain)


@pytest.mark.usefixtures("small_chunks")
def test_under_autocast_it_is_no_worse_than_twice_the_plain_model(deep_model: TinyVGGT) -> None:
    images = images_of(5)
    exact = run(deep_model, images)
    with torch.autocast("cpu", torch.bfloat16):
        plain = run(deep_model, images)
        with patch(deep_model, sparsity=0.0, memory="lean"):
            lean = run(deep_model, images)
    for name, value in exact.items():
        assert (lean[name] - value).abs().max() <= 2 * (plain[name] - value).abs().max(), name
        assert lean[name].dtype == plain[name].dtype


@pytest.mark.usefixtures("small_chunks")
def test_inference_mode(deep_model: TinyVGGT) -> None:
    images = images_of(5)
    with patch(deep_model, sparsity=0.5, **BLOCKS, memory="lean"):
        wanted = run(deep_model, images)
        with torch.inference_mode():
            found = run(deep_model, images)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("how", [{"sparsity": 0.0}, {"sparsity": 0.7}])
def test_much_less_is_alive_at_once(deep_model: TinyVGGT, small_chunks: None, how: dict[str, float]) -> None:
    images, peaks = images_of(24), {}
    for memory in ("plain", "lean"):
        with patch(deep_model, **how, **BLOCKS, memory=memory):
            peaks[memory] = peak(deep_model, images)
    assert peaks["lean"] < 0.75 * peaks["plain"]


def test_layers_that_nothing_reads_are_not_made(deep_model: TinyVGGT) -> None:
    images = images_of(12)
    with patch(deep_model, sparsity=0.0, memory="plain"):
        plain = peak(deep_model, images)
    with patch(deep_model, sparsity=0.0, memory="lean") as handle:
        lean = peak(deep_model, images)
    layer = 12 * (6 * 7 + 5) * 2 * 32 * 4
    assert plain - lean > 3 * layer  # five of six, but the rest peaks elsewhere then
    assert handle.report().measures[-1] == "of 6 layers of aggregator only those that are read are made: 5"


def test_gradients_are_those_of_a_plain_patch(deep_model: TinyVGGT, small_chunks: None) -> None:
    weight, gradients = deep_model.aggregator.global_blocks[2].attn.qkv.weight, []
    for memory in ("plain", "lean"):
        with patch(deep_model, sparsity=0.5, **BLOCKS, memory=memory):
            loss = deep_model(images_of(3))["world_points"].square().sum()
            gradients.append(torch.autograd.grad(loss, weight)[0])
    assert torch.equal(*gradients) and bool(gradients[0].abs().sum() > 0)


def test_training_mode_is_left_alone(deep_model: TinyVGGT, small_chunks: None) -> None:
    images, plain = images_of(2), run(deep_model.train(), images_of(2))
    with patch(deep_model, sparsity=0.0, memory="lean"), torch.no_grad():
        predicted = deep_model(images)
    assert len(predicted["patch_tokens"]) == 6 and torch.equal(predicted["world_points"], plain["world_points"])


# ---------------------------------------------------------------- undo


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("how", ["remove", "unpatch", "exception"])
def test_undo_leaves_no_trace(deep_model: TinyVGGT, how: str) -> None:
    images = images_of(3)
    plain, before = run(deep_model, images), everything(deep_model)
    handle = patch(deep_model, sparsity=0.5, **BLOCKS, memory="lean")
    run(deep_model, images)
    if how == "unpatch":
        assert unpatch(deep_model) == 6
    elif how == "exception":
        with pytest.raises(ZeroDivisionError), handle:
            raise ZeroDivisionError
    else:
        handle.remove()
        handle.remove()
    assert everything(deep_model) == before
    assert all(torch.equal(value, plain[name]) for name, value in run(deep_model, images).items())


@pytest.mark.usefixtures("small_chunks")
def test_an_exception_in_the_middle_of_a_forward_leaves_nothing_behind(deep_model: TinyVGGT) -> None:
    images = images_of(5)
    block = deep_model.aggregator.global_blocks[3]
    with patch(deep_model, sparsity=0.5, **BLOCKS, memory="lean"):
        wanted, before = run(deep_model, images), everything(deep_model)
        breaking = block.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(deep_model, images)
        breaking.remove()
        assert everything(deep_model) == before
        assert all(torch.equal(value, wanted[name]) for name, value in run(deep_model, images).items())
        with torch.no_grad():
            assert None not in deep_model.aggregator(images)[0]  # not thought to be inside the model still


@pytest.mark.usefixtures("small_chunks")
def test_a_deepcopy_is_lean_and_independent(deep_model: TinyVGGT) -> None:
    images = images_of(5)
    with patch(deep_model, sparsity=0.5, **BLOCKS, memory="lean"):
        wanted = run(deep_model, images)
        twin = copy.deepcopy(deep_model)
        with torch.no_grad():
            for weight in deep_model.parameters():
                weight.zero_()
        assert all(torch.equal(value, wanted[name]) for name, value in run(twin, images).items())
    assert any(isinstance(vars(module).get("forward"), LeanForward) for module in twin.modules())
    assert unpatch(twin) == 6
    assert not any("forward" in vars(module) for module in (*twin.modules(), *deep_model.modules()))


def test_a_patch_that_fails_half_way_gives_everything_back(
    deep_model: TinyVGGT, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = resolve_adapter(deep_model).family(deep_model)
    family = replace(own, separable=(*own.separable, ("nowhere.to_be", 0)))
    monkeypatch.setattr("hess_plugin.adapting.Adapter.family", lambda *_: family)
    before = everything(deep_model)
    with pytest.raises(AdapterError, match=r"names 'nowhere\.to_be', which TinyVGGT does not have"):
        patch(deep_model, sparsity=0.5, memory="lean")
    assert everything(deep_model) == before


def test_a_forward_of_another_tool_is_kept_and_told(deep_model: TinyVGGT, caplog: pytest.LogCaptureFixture) -> None:
    head = deep_model.point_head
    head.forward = lambda *args, **kwargs: type(head).forward(head, *args, **kwargs)  # type: ignore[method-assign]
    own = head.forward
    with patch(deep_model, sparsity=0.0, memory="lean"):
        assert head.forward is own
    assert head.forward is own and "point_head keeps the forward that another tool gave it" in caplog.text


def test_signatures_stay_to_be_seen(deep_model: TinyVGGT) -> None:
    before = inspect.signature(deep_model.forward), inspect.signature(deep_model.point_head.forward)
    with patch(deep_model, sparsity=0.0, memory="lean"):
        assert (inspect.signature(deep_model.forward), inspect.signature(deep_model.point_head.forward)) == before


@pytest.mark.parametrize("memory", ["", "frugal", None])
def test_unknown_ways_are_refused(tiny_model: TinyVGGT, memory: Any) -> None:
    with pytest.raises(PatchError, match=r"memory is .*, wanted one of plain, lean"):
        patch(tiny_model, memory=memory)


def test_plain_replaces_no_forward_but_those_of_the_sites(tiny_model: TinyVGGT) -> None:
    with patch(tiny_model, sparsity=0.5) as handle:
        replaced = [name for name, module in tiny_model.named_modules() if "forward" in vars(module)]
    assert replaced == ["aggregator.global_blocks.0.attn", "aggregator.global_blocks.1.attn"]
    assert handle.report().measures == () and handle.report().settings["memory"] == "plain"


def test_the_report_tells_what_was_done(deep_model: TinyVGGT) -> None:
    with patch(deep_model, sparsity=0.5, memory="lean") as handle:
        report = handle.report()
    assert report.settings["memory"] == "lean" and report.to_dict()["measures"] == report.measures
    assert report.measures[1] == (
        "15 modules in chunks: point_head, aggregator.patch_embed, aggregator.frame_blocks.*, "
        "aggregator.global_blocks.*.mlp, depth_head"
    )
    assert "lean memory: attention of 6 sites in groups of heads" in str(report)


# ---------------------------------------------------------------- layers


def test_called_alone_the_aggregator_gives_every_layer(deep_model: TinyVGGT, small_chunks: None) -> None:
    images = images_of(3)
    with torch.no_grad():
        plain, _ = deep_model.aggregator(images)
        with patch(deep_model, sparsity=0.0, memory="lean"):
            lean, start = deep_model.aggregator(images)
    assert start == 5 and len(lean) == 6
    for own, other in zip(lean, plain, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_inside_the_model_what_is_not_read_is_none(deep_model: TinyVGGT) -> None:
    seen: list[Any] = []
    hook = deep_model.aggregator.register_forward_hook(lambda module, args, output: seen.extend(output[0]))
    with patch(deep_model, sparsity=0.0, memory="lean"):
        run(deep_model, images_of(2))
    hook.remove()
    assert seen[:-1] == [None] * 5 and isinstance(seen[-1], Tensor)


class Odd(nn.Module):
    """A head that reads a layer nobody said is read."""

    def forward(self, tokens: list[Tensor]) -> Tensor:
        return tokens[2].sum()


def test_a_head_that_nobody_knows_keeps_every_layer(deep_model: TinyVGGT) -> None:
    deep_model.odd_head = Odd()
    with patch(deep_model, sparsity=0.0, memory="lean") as handle:
        seen: list[Any] = []
        hook = deep_model.aggregator.register_forward_hook(lambda module, args, output: seen.extend(output[0]))
        run(deep_model, images_of(2))
        hook.remove()
    assert len(seen) == 6 and None not in seen and len(handle.measures) == 2


class GivesLayers(TinyVGGT):
    """Somebody's own, which returns the layers as well."""

    def forward(self, images: Tensor) -> dict[str, Any]:
        return {**super().forward(images), "layers": self.aggregator(images)[0]}


def test_a_model_whose_own_forward_may_return_the_layers_keeps_them_all() -> None:
    torch.manual_seed(0)
    model = GivesLayers(TinyVGGTConfig(dim=32, num_heads=4, depth=6, stem=16, camera_depth=1)).eval()
    with torch.no_grad(), patch(model, sparsity=0.0, memory="lean") as handle:
        layers = model(images_of(2))["layers"]
    assert len(layers) == 6 and all(isinstance(layer, Tensor) for layer in layers) and len(handle.measures) == 2


class Layered(nn.Module):
    """Joins layers as `join` says: what a model may do otherwise than is expected."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = (nn.ModuleList(nn.Linear(6, 6) for _ in range(4)) for _ in range(2))
        self.join = join

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for one, two in zip(self.first, self.second, strict=True):
            x = one(x)
            y = two(x)
            found.append(self.join(x.view(2, 5, 6), y.view(2, 5, 6)))
            x = y
        return found


class Whole(nn.Module):
    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = Layered(join)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.layers(x)


@pytest.mark.parametrize(
    ("join", "made"),
    [
        (lambda a, b: torch.cat([a, b], dim=-1), [1, 3]),
        (lambda a, b: torch.cat((a, b), 2), [1, 3]),
        (lambda a, b: torch.concat([a, b], dim=2), [1, 3]),
        (lambda a, b: torch.cat([a, b], dim=-1) * 1.0, [1, 3]),  # looked at on its way: not-a-number, no number
        (lambda a, b: torch.cat([a, b], dim=1), [0, 1, 2, 3]),
        (lambda a, b: torch.cat([b, a], dim=-1), [0, 1, 2, 3]),
        (lambda a, b: torch.cat([a.clone(), b], dim=-1), [0, 1, 2, 3]),
        (lambda a, b: torch.cat([a[:, :3], b[:, :3]], dim=-1), [0, 1, 2, 3]),
        (lambda a, b: torch.cat([a, b, b], dim=-1), [0, 1, 2, 3]),
        (lambda a, b: torch.stack([a, b]), [0, 1, 2, 3]),
        (lambda a, b: torch.cat([a, b], dim=-1, out=torch.empty(2, 5, 12)), [0, 1, 2, 3]),
    ],
)
def test_only_what_two_blocks_of_an_unread_layer_returned_is_left_out(
    join: Callable[[Tensor, Tensor], Tensor], made: list[int]
) -> None:
    import contextlib

    from hess_plugin.memory.lean import make_lean

    torch.manual_seed(0)
    model, x = Whole(join).eval(), torch.randn(10, 6)
    family = Family(joined_layers=JoinedLayers("layers", ("layers.first", "layers.second"), (1, 3)))
    with torch.no_grad(), contextlib.ExitStack() as undo:
        plain = model(x)
        make_lean(model, family, [], undo)
        lean = model(x)
    for index, (own, other) in enumerate(zip(lean, plain, strict=True)):
        if index in made:
            assert torch.equal(own, other)
        else:
            assert own is None or bool(own.isnan().all())
