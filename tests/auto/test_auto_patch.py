"""`auto_patch`: what is patched, when, with what, and what is left alone."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hess_plugin
from hess_plugin.auto.beginning import auto_patch
from hess_plugin.auto.patcher import AutoPatch
from hess_plugin.auto.summary import describe, nothing_was_patched
from hess_plugin.demo.model import TinyVGGT, TinyVGGTConfig, load_demo_model
from hess_plugin.exceptions import PatchError, ProfileError, UnknownModel
from hess_plugin.interception import is_patched
from hess_plugin.profiles import Profile

SMALL: dict[str, Any] = {"block_q": 8, "block_k": 8}
IMAGES = torch.rand(1, 8, 3, 60, 60, generator=torch.Generator().manual_seed(1))


class SceneNet(TinyVGGT):
    """A model that is built wholly by its constructor."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__(TinyVGGTConfig(dim=32, num_heads=4, depth=2, stem=16, camera_depth=1))
        self.eval()


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = SceneNet()


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """Whatever a test begins ends with it."""
    begun: list[AutoPatch] = []
    with pytest.MonkeyPatch.context() as patcher:
        own = AutoPatch.begin
        patcher.setattr(AutoPatch, "begin", lambda self, spoken: (begun.append(self), own(self, ()))[1])
        patcher.delenv("HESS_AUTO_PATCH", raising=False)
        yield
    for made in begun:
        made.remove()


def run(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: value for name, value in model(IMAGES).items() if isinstance(value, Tensor)}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_model_is_patched_when_it_is_built() -> None:
    before = SceneNet()
    auto = hess_plugin.auto_patch(sparsity=0.5, **SMALL)
    model = SceneNet()
    assert is_patched(model) and not is_patched(before)
    plain = run(before)
    with hess_plugin.patch(before, sparsity=0.5, **SMALL):
        wanted = run(before)
    assert same(run(model), wanted) and not same(wanted, plain)
    (found,) = auto.models
    assert (found.name, found.adapter, found.model()) == ("SceneNet", "vggt", model)
    assert found.patch.report().sparsity == pytest.approx(0.5)


def test_a_model_goes_when_the_program_drops_it() -> None:
    """By its references alone, as an unpatched one does: the next model needs the memory now."""
    auto_patch(sparsity=0.5, memory="lean", **SMALL)
    model = SceneNet()
    run(model)
    twin, gone = copy.deepcopy(model), weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
        assert len(run(twin)) > 3  # a copy does not need its original
        gone = weakref.ref(twin)
        del twin
        assert gone() is None
    finally:
        gc.enable()


def test_the_end_unpatches_copies_too() -> None:
    auto = auto_patch(sparsity=0.5, **SMALL)
    twin = copy.deepcopy(SceneNet())
    assert is_patched(twin)
    auto.remove()
    assert not is_patched(twin)


def test_a_model_inside_another_a_copy_and_a_loaded_one() -> None:
    auto = auto_patch(sparsity=0.5, **SMALL)
    outer = Wrapper()
    twin = copy.deepcopy(outer.net)
    assert is_patched(outer.net) and is_patched(twin) and len(auto.models) == 1  # the copy carries the patch along
    assert same(run(outer.net), run(twin))


def test_an_unpickled_model_is_patched() -> None:
    file = io.BytesIO()
    torch.save(SceneNet(), file)
    file.seek(0)
    auto_patch(sparsity=0.5, **SMALL)
    assert is_patched(torch.load(file, weights_only=False))


def test_a_program_saves_its_model_as_it_would(tmp_path: Path) -> None:
    """A file without a trace of the patch, which a Python without hess_plugin could load if it had the model's code."""
    plain = run(SceneNet())
    auto = auto_patch(sparsity=0.5, memory="lean", **SMALL)
    model = SceneNet()
    torch.save(copy.deepcopy(model), tmp_path / "copy.pt")
    torch.save(model, tmp_path / "model.pt")
    with torch.no_grad():
        sparse = run(model)
    auto.remove()
    for name in ("model.pt", "copy.pt"):
        loaded = torch.load(tmp_path / name, weights_only=False)
        assert not is_patched(loaded) and same(run(loaded), plain) and not same(plain, sparse)
        assert b"hess_plugin.interception" not in (tmp_path / name).read_bytes()
        with hess_plugin.patch(loaded, sparsity=0.5, **SMALL):
            assert same(run(loaded), sparse)


def test_the_end_unpatches_and_leaves_later_models_alone() -> None:
    with auto_patch(sparsity=0.5, **SMALL) as auto:
        model = SceneNet()
        assert auto.active
    auto.remove()
    assert not auto.active and not is_patched(model) and not is_patched(SceneNet())


def test_a_dropped_model_gives_its_memory_back() -> None:
    auto = auto_patch(sparsity=0.5, **SMALL)
    model = SceneNet()
    run(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and auto.models[0].model() is None
    assert "measured sparsity 0.5000" in describe(auto.models[0])  # what it did is still known


def test_with_a_profile_a_model_is_patched_when_its_weights_are_loaded(demo_profile: Path) -> None:
    state = load_demo_model().state_dict()
    auto = auto_patch(demo_profile, sparsity=0.5, **SMALL)
    model = TinyVGGT().eval()
    assert not is_patched(model) and auto.waiting == ["TinyVGGT"]
    model.load_state_dict(state)
    assert is_patched(model) and auto.waiting == []
    reference = load_demo_model()
    auto.remove()
    with hess_plugin.patch(reference, profile=demo_profile, sparsity=0.5, **SMALL):
        wanted = run(reference)
    with hess_plugin.patch(model, profile=demo_profile, sparsity=0.5, **SMALL):
        assert same(run(model), wanted)


@pytest.mark.parametrize("part", ["model", "aggregator"])
def test_else_before_its_first_forward(demo_profile: Path, part: str) -> None:
    """Weights that are copied without load_state_dict; also where a part of the model is called alone."""
    source = load_demo_model()
    with hess_plugin.patch(source, profile=demo_profile, sparsity=0.5, **SMALL), torch.no_grad():
        wanted = run(source) if part == "model" else source.aggregator(IMAGES)[0][-1]
    auto = auto_patch(demo_profile, sparsity=0.5, **SMALL)
    model = TinyVGGT().eval()
    with torch.no_grad():
        for target, value in zip(model.parameters(), source.parameters(), strict=True):
            target.copy_(value)
        for target, value in zip(model.buffers(), source.buffers(), strict=True):
            target.copy_(value)
    assert not is_patched(model)
    if part == "model":
        assert same(run(model), wanted)
    else:
        with torch.no_grad():
            assert torch.equal(model.aggregator(IMAGES)[0][-1], wanted)
    assert is_patched(model) and auto.models[0].patch.report().sites[0].calls == 1
    auto.remove()
    assert not model._forward_pre_hooks and not model._load_state_dict_post_hooks


def test_a_copy_of_a_waiting_model_waits_for_itself(demo_profile: Path) -> None:
    auto = auto_patch(demo_profile, sparsity=0.5, **SMALL)
    model = TinyVGGT().eval()
    twin = copy.deepcopy(model)
    twin.load_state_dict(load_demo_model().state_dict())
    assert is_patched(twin) and not is_patched(model)
    auto.remove()
    for module in (*model.modules(), *twin.modules()):
        assert not module._forward_pre_hooks and not module._load_state_dict_post_hooks


def test_other_weights_stay_dense_and_it_is_said(demo_profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    auto = auto_patch(demo_profile, sparsity=0.5, **SMALL)
    model = TinyVGGT().eval()
    found = run(model)
    assert not is_patched(model) and not auto.models
    assert "TinyVGGT was not patched" in auto.refusals[0] and "weights" in auto.refusals[0]
    assert capsys.readouterr().err == f"hess-patch: {auto.refusals[0]}\n"
    auto.remove()
    assert same(run(model), found)
    lax = auto_patch(demo_profile, sparsity=0.5, strict=False, **SMALL)
    assert is_patched(TinyVGGT()) and len(lax.models) == 1


def test_a_model_of_another_family_or_shape_stays_as_it_is(
    demo_profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = replace(Profile.load(demo_profile), adapter="pi3")
    auto = auto_patch(other, sparsity=0.5, **SMALL)
    assert not is_patched(SceneNet())
    assert "the profile is of adapter 'pi3' and this model of 'vggt'" in auto.refusals[0]
    auto.remove()
    auto = auto_patch(demo_profile, sparsity=0.5, **SMALL)
    SceneNet(), SceneNet()
    assert len(auto.refusals) == 1 and "SceneNet was not patched: " in auto.refusals[0]  # said once
    assert capsys.readouterr().err.count("SceneNet") == 2


def test_a_model_that_waits_is_saved_and_taken_out_of_another(demo_profile: Path, tmp_path: Path) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.aggregator = self.net = TinyVGGT().eval()  # claims as its inside does

        def forward(self, x: Tensor) -> Any:
            return self.net(x)

    state = load_demo_model().state_dict()
    auto = auto_patch(demo_profile, sparsity=0.5, **SMALL)
    net = Around().net
    assert auto.waiting == ["TinyVGGT"]
    torch.save(net, tmp_path / "waiting.pt")
    net.load_state_dict(state)
    assert is_patched(net)
    auto.remove()
    loaded = torch.load(tmp_path / "waiting.pt", weights_only=False)
    assert not is_patched(loaded) and loaded(IMAGES)


def test_nothing_that_fails_while_it_waits_comes_out_of_the_program(
    demo_profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_demo_model()
    auto = auto_patch(demo_profile, sparsity=0.5, **SMALL)
    model = TinyVGGT().eval()
    monkeypatch.setattr("hess_plugin.auto.waiting.weights_fingerprint", lambda sites: 1 / 0)
    model.load_state_dict(plain.state_dict())
    assert not is_patched(model) and "division by zero" in auto.refusals[0]
    monkeypatch.setattr("hess_plugin.auto.patcher.patch", lambda *_, **__: 1 / 0)
    assert same(run(model), run(plain)) and "ZeroDivisionError" in auto.refusals[1]


def test_a_weightless_model_is_waited_for(demo_profile: Path) -> None:
    auto_patch(demo_profile, sparsity=0.5, **SMALL)
    with torch.device("meta"):
        model = TinyVGGT().eval()
    model.load_state_dict(load_demo_model().state_dict(), assign=True)
    assert is_patched(model)


def test_models_are_built_without_weights() -> None:
    auto = auto_patch(sparsity=0.5, allocation="equal", **SMALL)
    with torch.device("meta"):
        model = SceneNet()
    model.load_state_dict(SceneNet().state_dict(), assign=True)
    run(model)
    assert auto.models[0].patch.report().sparsity == pytest.approx(0.5)


def test_a_layout_that_cannot_be_told_runs_dense() -> None:
    plain = SceneNet()
    auto = auto_patch(sparsity=0.5, **SMALL)
    model = SceneNet()
    own = model.aggregator.forward
    model.aggregator.forward = lambda pictures: own(pictures)  # the adapter looks for another name
    with torch.no_grad():
        found = model.aggregator(pictures=IMAGES)[0][-1]
        assert torch.equal(found, plain.aggregator(IMAGES)[0][-1])
    assert "hess_token_layout" in str(auto.models[0].patch.report().sites[0].unfit)


@pytest.mark.parametrize("calls", [0, 2])
def test_a_module_that_attends_otherwise_runs_as_it_is(calls: int) -> None:
    auto = auto_patch(sparsity=0.5, **SMALL)
    model, plain = SceneNet(), SceneNet()
    hess_plugin.unpatch(plain)

    def attend(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        for _ in range(calls):
            q = nn.functional.scaled_dot_product_attention(q, q, q)
        return q.transpose(1, 2).flatten(2)

    kind = type(model.aggregator.global_blocks[0].attn)
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(kind, "forward", attend)
        assert same(run(model), run(plain))
        assert "scaled_dot_product_attention" in str(auto.models[0].patch.report().sites[0].unfit)
        with hess_plugin.patch(plain, sparsity=0.5, **SMALL), pytest.raises(PatchError, match=f"{calls} times"):
            run(plain)


def test_replicas_of_data_parallel_run_as_they_are() -> None:
    """What replicate does on several graphics cards: copies of the modules' attributes, marked."""
    plain = SceneNet()
    auto = auto_patch(sparsity=0.5, **SMALL)
    model = SceneNet()

    def replica(module: nn.Module) -> nn.Module:
        twin = module._replicate_for_data_parallel()
        twin._parameters = dict(module._parameters)
        for name, child in module._modules.items():
            if child is not None:
                twin._modules[name] = replica(child)
        return twin

    assert same(run(replica(model)), run(plain)) and is_patched(model)
    assert "DataParallel" in str(auto.models[0].patch.report().sites[0].unfit)


def test_a_call_that_cannot_be_sparse_runs_dense() -> None:
    """A program that calls a block itself gets what the unpatched model gives, and is not stopped."""
    plain = SceneNet()
    auto = auto_patch(sparsity=0.5, **SMALL)
    model = SceneNet()
    site = "aggregator.global_blocks.0.attn"
    tokens = torch.rand(1, 50, 32)
    with torch.no_grad():
        assert torch.equal(model.get_submodule(site)(tokens), plain.get_submodule(site)(tokens))
    report = auto.models[0].patch.report()
    assert report.sites[0].unfit_calls == 1 and "50 tokens" in str(report.sites[0].unfit)
    run(model)
    assert "1 attention calls ran dense: " in describe(auto.models[0])
    assert "1 calls could not be made sparse and ran dense: " in str(auto.models[0].patch.report())


def test_a_patch_that_the_program_asks_for_goes_first() -> None:
    auto = auto_patch(sparsity=0.5, **SMALL)
    model = SceneNet()
    with hess_plugin.patch(model, sparsity=0.75, **SMALL) as handle:
        run(model)
        with pytest.raises(PatchError, match="patched already"):
            hess_plugin.patch(model)
    assert handle.report().sparsity == pytest.approx(0.75, abs=0.01) and not is_patched(model)
    assert describe(auto.models[0]).endswith("and never called.")
    with hess_plugin.patch(model, sparsity=0.75, **SMALL):
        auto.remove()
        assert is_patched(model)


def test_of_two_the_first_patches_and_the_second_says_nothing_false(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = auto_patch(sparsity=0.5, **SMALL), auto_patch(sparsity=0.9)
    assert is_patched(SceneNet()) and len(first.models) == 1 and not second.models and second.copies == 1
    nothing_was_patched(second, None)
    assert capsys.readouterr().err == ""


def test_adapters_that_fail_or_quarrel_stop_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrong:
        asked = 0

        @hess_plugin.hookimpl
        def hess_claim_model(self, model: nn.Module) -> bool:
            Wrong.asked += 1
            raise RuntimeError("wrong in\nmany ways")

    class Twin:
        @hess_plugin.hookimpl
        def hess_claim_model(self, model: nn.Module) -> bool:
            return hasattr(model, "aggregator")

    def manager() -> Any:
        made = hess_plugin.get_plugin_manager(entry_points=False)
        made.register(Wrong(), "wrong")
        made.register(Twin(), "twin")
        return made

    monkeypatch.setattr("hess_plugin.auto.patcher.get_plugin_manager", manager)
    auto = auto_patch(sparsity=0.5, **SMALL)
    assert not is_patched(SceneNet()) and Wrong.asked > 10  # asked again: it may be an odd module's fault
    assert "SceneNet was not patched: it is claimed by twin and vggt; choose one with adapter=NAME" in auto.refusals[0]
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith("(RuntimeError: wrong in many ways), which is taken as a no; repair its hess_claim_model.")
    assert len(said) == 2  # each is told once
    auto.remove()
    auto_patch(sparsity=0.5, adapter="vggt", **SMALL)
    assert is_patched(SceneNet())


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"sparsty": 0.5}, PatchError, "there is no option 'sparsty'; wanted one of sparsity,"),
        ({"model": 1}, PatchError, "there is no option 'model'"),
        ({"sparsity": 1.5}, PatchError, "sparsity is 1.5"),
        ({"allocation": "hess"}, PatchError, "none was given; give a profile"),
        ({"adapter": "nobody"}, UnknownModel, "no adapter is called 'nobody'"),
        ({"profile": "nowhere.hess"}, ProfileError, "nowhere.hess"),
        ({"profile": 3}, PatchError, "profile is of type int"),
        ({"verdict": "x"}, PatchError, "verdict is 'x'"),
        ({"unfit": "x"}, PatchError, "unfit is 'x'"),
        ({"strict": 3}, PatchError, "strict is 3"),
        ({"backend": "fast"}, PatchError, "backend is 'fast', wanted one of auto, "),
    ],
)
def test_a_mistake_is_told_at_once(options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        auto_patch(**options)


def test_the_environment_gives_what_the_call_leaves_open(monkeypatch: pytest.MonkeyPatch, demo_profile: Path) -> None:
    monkeypatch.setenv("HESS_AUTO_PATCH", f"sparsity=0.9,block_q=8,block_k=8,strict=false,profile={demo_profile}")
    auto = auto_patch(sparsity=0.5)
    TinyVGGT()
    report = auto.models[0].patch.report()
    assert report.settings["sparsity"] == 0.5 and report.settings["block_q"] == 8 and report.allocation == "hess"
    auto.remove()
    monkeypatch.setenv("HESS_AUTO_PATCH", "sparsty=0.5")
    with pytest.raises(PatchError, match="in the variable HESS_AUTO_PATCH: there is no option 'sparsty'"):
        auto_patch()
    monkeypatch.setenv("HESS_AUTO_PATCH", "off")
    off = auto_patch(sparsity=0.5)
    assert not off.active and not is_patched(SceneNet())


def test_a_forked_worker_counts_anew_whatever_the_parent_was_doing() -> None:
    """Also where a thread of the parent held the counters; refusals and silence are the parent's to tell."""
    auto = auto_patch(sparsity=0.5, **SMALL)
    model = SceneNet()
    run(model)
    auto.refusals.append("Other was not patched: told by the parent.")
    for tally in auto.models[0].patch._tallies:
        tally._lock.acquire()
    auto._in_worker()
    assert auto.used() == [] and auto.refusals == [] and not auto.models[0].patch.was_called()
    run(model)
    assert [site.calls for site in auto.used()[0].patch.report().sites] == [1, 1]
    assert auto.models[0].patch.report().sparsity == pytest.approx(0.5)


def test_why_nothing_was_patched(demo_profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    auto = auto_patch(demo_profile, **SMALL)
    model = TinyVGGT()
    nothing_was_patched(auto, None)
    assert "TinyVGGT was built, but the profile's weights were not loaded and it was never called." in (
        capsys.readouterr().err
    )
    del model


def test_a_model_that_was_never_called_and_one_that_was_too_small() -> None:
    auto = auto_patch(sparsity=0.5)
    model = SceneNet()
    assert describe(auto.models[0]) == "SceneNet was patched (adapter vggt, 2 sites) and never called."
    with torch.no_grad():
        model(IMAGES[:, :1])
    assert "1 forward, all of them dense: the input is too short to drop anything." in describe(auto.models[0])
    auto.remove()
    zero = auto_patch(sparsity=0.0)
    run(SceneNet())
    assert "all of them dense, as asked for." in describe(zero.models[0])
    assert repr(zero) == "<AutoPatch, active, 1 models patched>" and zero.models[0].patch.was_called()
