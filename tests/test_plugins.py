"""Finding adapters: built-in ones, strangers, broken strangers, and models nobody or everybody claims."""

from __future__ import annotations

import types
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hess_plugin
from hess_plugin import AdapterError, AmbiguousModel, Prediction, Site, TokenLayout, UnknownModel, fused_site, hookimpl
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.plugins import (
    BUILT_IN,
    describe_plugins,
    get_plugin_manager,
    hook_names,
    load_model,
    register,
    resolve_adapter,
)

DEVICE = {"device": torch.device("cpu"), "dtype": torch.float32}


class Distribution:
    name, version = "hess-plugin-mynet", "0.3"


class Entry:
    """What importlib.metadata gives for one entry point."""

    def __init__(self, name: str, load: Callable[[], Any], dist: Any = Distribution) -> None:
        self.name, self.load, self.dist, self.value = name, load, dist, "mynet_adapter"


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that packages with these entry points are installed."""

    def pretend(*entries: Entry) -> None:
        monkeypatch.setattr(metadata, "entry_points", lambda *, group: entries if group == "hess_plugin" else ())

    return pretend


class MyAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 2, nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MyNet(nn.Module):
    """A model no built-in adapter knows: one trailing special token a frame, one more at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.layers = nn.ModuleList([MyAttention(), MyAttention()])
        self.extra = nn.Parameter(torch.randn(1, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        frames = self.embed(images).flatten(2).transpose(1, 2)
        frames = torch.cat([frames, self.extra.expand(len(images), 1, -1)], 1)
        x = torch.cat([frames.flatten(0, 1), self.extra])[None]
        for layer in self.layers:
            x = x + layer(x)
        x = self.head(x[0, :-1].unflatten(0, (len(images), -1)))
        return x[:, :-1], x[:, -1]


def my_adapter(**changes: Any) -> types.ModuleType:
    """A stranger's adapter module."""
    module = types.ModuleType("mynet_adapter")

    def hess_claim_model(model: nn.Module) -> bool:
        return isinstance(model, MyNet)

    def hess_find_global_attention(model: nn.Module) -> list[Site]:
        return [fused_site(model, f"layers.{i}", "") for i in range(2)]

    def hess_token_layout(model: nn.Module, args: tuple[Any, ...]) -> TokenLayout:  # fewer arguments than the contract
        grid = (args[0].shape[-2] // 4, args[0].shape[-1] // 4)
        return TokenLayout(len(args[0]), grid[0] * grid[1], trailing=1, tail=1, grid=grid)

    def hess_load_model(name: str) -> nn.Module | None:
        return MyNet().eval() if name == "mynet" else None

    for hook in (hess_claim_model, hess_find_global_attention, hess_token_layout, hess_load_model):
        setattr(module, hook.__name__, hookimpl(hook))
    for name, function in changes.items():
        setattr(module, name, hookimpl(function))
    return module


def test_a_stranger_works_end_to_end(install: Callable[..., None], tmp_path: Path) -> None:
    install(Entry("mynet", my_adapter))
    model = load_model("mynet", "random", **DEVICE)
    adapter = resolve_adapter(model)
    assert adapter.name == "mynet" and adapter.family(model) == hess_plugin.Family()
    images = torch.rand(5, 3, 24, 32)
    with torch.no_grad():
        plain = model(images)[0]
        with hess_plugin.patch(model, sparsity=0.6, block_q=8, block_k=8) as handle:
            sparse = model(images)[0]
        with hess_plugin.patch(model, sparsity=0.0):
            assert torch.equal(model(images)[0], plain)
        assert torch.equal(model(images)[0], plain)
    assert handle.report().sparsity == pytest.approx(0.6, abs=0.01) and not torch.equal(sparse, plain)
    with pytest.raises(
        AdapterError, match=r"adapter 'mynet' of package hess-plugin-mynet 0\.3 gave no answer to hess_predict, which"
    ):
        adapter.predict(model, torch.rand(2, 3, 28, 28))
    assert resolve_adapter(TinyVGGT()).name == "vggt"  # ours still work


def test_a_stranger_may_bring_its_own_errors(install: Callable[..., None], room: Any, tmp_path: Path) -> None:
    def hess_compute_errors(model: MyNet, scene: Any) -> hess_plugin.Errors:
        points, camera = model(scene.images)
        return hess_plugin.Errors(camera.square().mean(), points.square().mean())

    install(Entry("mynet", lambda: my_adapter(hess_compute_errors=hess_compute_errors)))
    torch.manual_seed(0)
    model = MyNet().eval()
    profile = hess_plugin.calibrate(model, [room], output=tmp_path / "mynet.hess")
    assert profile.adapter == "mynet" and profile.sites == ("layers.0", "layers.1") and profile.num_heads == 2
    with hess_plugin.patch(model, profile=tmp_path / "mynet.hess", block_q=8, block_k=8, sparsity=0.5) as handle:
        model(room.images)
    assert handle.report().sparsity == pytest.approx(0.5, abs=0.01)


def broken_import() -> Any:
    raise ModuleNotFoundError("No module named\n 'mynet'")


def misspelt() -> Any:
    return my_adapter(hess_find_global_atention=lambda model: [])


def strange_argument() -> Any:
    return my_adapter(hess_predict=lambda model, images, colour: None)


@pytest.mark.parametrize(
    "load, reason",
    [
        (broken_import, "No module named 'mynet'"),
        (misspelt, "hess_find_global_atention"),
        (strange_argument, "colour"),
        (lambda: 1 / 0, "division by zero"),
    ],
)
def test_a_broken_stranger_is_named_and_left_out(install: Callable[..., None], load: Any, reason: str) -> None:
    install(Entry("mynet", load), Entry("other", my_adapter, dist=None))
    with pytest.warns(
        RuntimeWarning, match=r"adapter 'mynet' of package hess-plugin-mynet 0\.3 was left out"
    ) as caught:
        manager = get_plugin_manager()
    assert len(caught) == 1
    sentence = str(caught[0].message)
    assert reason in sentence and "\n" not in sentence
    assert "Repair or uninstall hess-plugin-mynet" in sentence and "HESS_DISABLE_PLUGINS=hess-plugin-mynet." in sentence
    assert {name for name, _ in manager.list_name_plugin()} == {*BUILT_IN, "other"}
    assert resolve_adapter(TinyVGGT(), manager=manager).name == "vggt"
    assert resolve_adapter(MyNet(), manager=manager).name == "other"
    register(manager, my_adapter(), "mynet")  # the name is free again
    with pytest.raises(AmbiguousModel):
        resolve_adapter(MyNet(), manager=manager)


def test_a_stranger_under_a_built_in_name_does_not_replace_ours(install: Callable[..., None]) -> None:
    install(Entry("vggt", my_adapter))
    with pytest.warns(RuntimeWarning, match="'vggt' of package hess-plugin-mynet 0.3 .* taken by hess-plugin itself"):
        assert resolve_adapter(TinyVGGT()).name == "vggt"


def test_entry_points_can_be_left_out(install: Callable[..., None]) -> None:
    install(Entry("mynet", broken_import))
    assert {name for name, _ in get_plugin_manager(entry_points=False).list_name_plugin()} == set(BUILT_IN)


@pytest.mark.parametrize("load, named", [(misspelt, "hess_find_global_atention"), (strange_argument, "colour")])
def test_a_hook_outside_the_contract_is_refused_by_name(load: Callable[[], Any], named: str) -> None:
    manager = get_plugin_manager(entry_points=False)
    with pytest.raises(AdapterError, match=rf"adapter 'mine' does not fit the contract: .*{named}") as caught:
        register(manager, load(), "mine")
    assert "hess_claim_model" in str(caught.value) and "\n" not in str(caught.value)
    assert manager.get_plugin("mine") is None
    with pytest.raises(UnknownModel):
        resolve_adapter(MyNet(), manager=manager)
    register(manager, my_adapter(), "mine")
    assert resolve_adapter(MyNet(), manager=manager).name == "mine"


def test_two_claims_are_named_and_one_can_be_chosen() -> None:
    manager = get_plugin_manager(entry_points=False)
    register(manager, my_adapter(), "b")
    register(manager, my_adapter(hess_find_global_attention=lambda model: []), "a")
    with pytest.raises(
        AmbiguousModel, match=r"MyNet \(.*\) is claimed by a and b; choose one with adapter=NAME \(--adapter NAME\)\."
    ):
        resolve_adapter(MyNet(), manager=manager)
    model = MyNet()
    assert len(resolve_adapter(model, "b", manager).sites(model)) == 2
    # The chosen adapter answers alone: no site of b for a.
    with pytest.raises(AdapterError, match="'a' found no global attention in MyNet"):
        resolve_adapter(model, "a", manager).sites(model)


def test_an_adapter_that_fails_on_a_model_does_not_keep_the_others_from_it() -> None:
    manager = get_plugin_manager(entry_points=False)
    register(manager, my_adapter(hess_claim_model=lambda model: model.no_such_part), "mine")
    sentence = "adapter 'mine' failed when asked whether it knows TinyVGGT .*no_such_part.*repair its hess_claim_model"
    with pytest.warns(RuntimeWarning, match=sentence):
        assert resolve_adapter(TinyVGGT(), manager=manager).name == "vggt"


def test_no_claim_and_unknown_names_are_told() -> None:
    manager = get_plugin_manager(entry_points=False)
    known = ", ".join(sorted(BUILT_IN))
    with pytest.raises(UnknownModel, match=rf"no adapter claims MyNet \(.*\); known: {known}; write one:"):
        resolve_adapter(MyNet(), manager=manager)
    with pytest.raises(UnknownModel, match=rf"no adapter is called 'nope'; known: {known}\."):
        resolve_adapter(MyNet(), "nope", manager)
    with pytest.raises(UnknownModel, match=rf"no adapter loads a model called 'nope'; .*{known}\."):
        load_model("nope", "random", manager=manager, **DEVICE)


def sites_with(**changes: Any) -> Callable[[nn.Module], list[Site]]:
    def find(model: nn.Module) -> list[Site]:
        site = fused_site(model, "layers.0", "")
        return [Site(**{**vars(site), **changes})]

    return find


@pytest.mark.parametrize(
    "find, sentence",
    [
        (lambda model: [], "found no global attention in MyNet"),
        (lambda model: None, "found no global attention in MyNet"),
        (sites_with(name="layers.9"), r"names a site 'layers\.9' that is not in the model"),
        (sites_with(name="layers.1"), r"names a site 'layers\.1' that is not in the model"),
        (sites_with(layout_module="body"), "layout module 'body' not in the model"),
        (lambda model: [fused_site(model, "layers.0", "")] * 2, "lists a site twice"),
        (lambda model: [fused_site(model, "head", "")], r"head \(Linear\) is not an attention module"),
    ],
)
def test_sites_that_do_not_fit_are_refused(find: Callable[[nn.Module], Any], sentence: str) -> None:
    manager = get_plugin_manager(entry_points=False)
    register(manager, my_adapter(hess_find_global_attention=lambda model: find(model)), "mine")
    with pytest.raises(AdapterError, match=sentence):
        hess_plugin.patch(MyNet(), manager=manager)


def test_images_that_do_not_fit_are_refused_before_the_model_sees_them() -> None:
    manager = get_plugin_manager(entry_points=False)
    family = hess_plugin.Family(framing=hess_plugin.Framing(14))
    register(
        manager,
        my_adapter(hess_predict=lambda model, images: Prediction, hess_describe_family=lambda model: family),
        "mine",
    )
    adapter = resolve_adapter(MyNet(), manager=manager)
    for shape in ((2, 3, 28, 30), (3, 28, 28), (2, 1, 28, 28)):
        with pytest.raises(AdapterError, match=r"H and W multiples of 14; bring .* Scene\.framed\(Framing\(14\)\)"):
            adapter.predict(MyNet(), torch.rand(shape))


def test_plugins_are_described_with_the_hooks_they_really_implement(install: Callable[..., None]) -> None:
    install(Entry("mynet", my_adapter))
    described = {plugin["name"]: plugin for plugin in describe_plugins()}
    assert set(described) == {*BUILT_IN, "mynet"}
    assert described["mynet"]["package"] == "hess-plugin-mynet 0.3"
    assert described["mynet"]["module"] == "mynet_adapter"
    assert described["mynet"]["hooks"] == [
        "hess_claim_model", "hess_find_global_attention", "hess_token_layout", "hess_load_model",
    ]  # fmt: skip
    assert described["vggt"]["package"] == "hess-plugin"
    assert described["vggt"]["module"] == "hess_plugin.adapters.vggt"
    assert set(described["pi3"]["hooks"]) < set(hook_names())
    assert described["demo"]["hooks"] == ["hess_load_model"]


def test_a_hook_without_the_marker_is_refused() -> None:
    manager, plugin = get_plugin_manager(entry_points=False), my_adapter()
    plugin.hess_predict = lambda model, images: None
    with pytest.raises(AdapterError, match=r"'mine' defines hess_predict without @hess_plugin\.hookimpl; mark it"):
        register(manager, plugin, "mine")
    assert manager.get_plugin("mine") is None


def test_managers_share_nothing() -> None:
    one, two = get_plugin_manager(entry_points=False), get_plugin_manager(entry_points=False)
    register(one, my_adapter(), "mine")
    assert two.get_plugin("mine") is None
