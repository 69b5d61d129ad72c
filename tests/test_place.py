"""What depends on the device is found out where the model runs, not where it was patched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hess_plugin import plans
from hess_plugin.break_even import BreakEven, Conditions, Timing
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.exceptions import PatchError
from hess_plugin.patching import patch
from hess_plugin.place import Place
from hess_plugin.plugins import resolve_adapter
from hess_plugin.profiles import Profile
from hess_plugin.recorded_break_evens import record_break_even
from hess_plugin.scenes.scene import Scene
from hess_plugin.settings import Settings
from hess_plugin_cuda import Problem, backends

SMALL: dict[str, Any] = {"block_q": 8, "block_k": 8}


@pytest.fixture(scope="module")
def room_profile(tmp_path_factory: pytest.TempPathFactory, room: Scene) -> Profile:
    from hess_plugin.calibration.calibrator import calibrate
    from hess_plugin.demo.model import load_demo_model

    path: Path = tmp_path_factory.mktemp("place") / "demo.hess"
    calibrate(load_demo_model(), [room]).save(path)
    return Profile.load(path)


def with_limit(profile: Profile, dtype: torch.dtype) -> Profile:
    """A profile in which patching was found not to pay up to 288 patch tokens, for weights of one type on this CPU."""
    conditions = Conditions.of(torch.device("cpu"), dtype, "gather", 8, 8, None)
    never = Timing(8, 8 * 36, sparsity=0.5, dense=1.0, patched=1.3, ratio=1.3, low=1.2, high=1.4, repeats=7)
    entry = BreakEven(
        conditions,
        sparsity=0.5,
        allocation="hess",
        height=60,
        width=60,
        timings=(never,),
        versions={"torch": torch.__version__},
        date="2026-01-01T00:00:00+00:00",
    )
    return record_break_even(profile, entry)


def images(views: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.rand(1, views, 3, 60, 60, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_a_limit_is_that_of_the_type_the_model_runs_in(room_profile: Profile, tiny_model: TinyVGGT) -> None:
    settings = Settings(0.5, None, None, "hess", **SMALL)
    place = Place(settings, with_limit(room_profile, torch.float64))
    (site, *_) = resolve_adapter(tiny_model).sites(tiny_model)
    assert place.settle(site) == settings and place.backend == "gather"
    site.module.double()
    assert place.settle(site, torch.device("cpu")) == replace(settings, dense_below=289) == place.settings
    site.module.float()
    assert place.settle(site).dense_below == 0


def test_a_limit_that_is_found_late_is_kept_to(
    room_profile: Profile, tiny_model: TinyVGGT, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hess_plugin.demo.model import load_demo_model

    model = load_demo_model()
    limits = iter([0, 289])  # of the device where it is patched, and of that where it runs
    monkeypatch.setattr(Place, "_limit", lambda *_: next(limits, 289))
    with patch(model, profile=room_profile, sparsity=0.5, **SMALL) as handle, torch.no_grad():
        assert handle.report().settings["dense_below"] == 0
        model(images(8, torch.float32))
        report = handle.report()
        assert report.settings["dense_below"] == 289 and all(site.dense_calls == 1 for site in report.sites)
        model(images(9, torch.float32))
        assert all(site.dense_calls == 1 and site.calls == 2 for site in handle.report().sites)


def test_given_limits_are_left_as_they_are(room_profile: Profile) -> None:
    from hess_plugin.demo.model import load_demo_model

    model = load_demo_model()
    profile = with_limit(room_profile, torch.float32)
    with patch(model, profile=profile, sparsity=0.5, dense_below=0, **SMALL) as handle, torch.no_grad():
        model(images(8, torch.float32))
    assert handle.report().settings["dense_below"] == 0 and handle.report().sites[0].dense_calls == 0


def test_a_model_without_weights_gets_its_backend_where_they_come(tiny_model: TinyVGGT) -> None:
    with torch.device("meta"):
        model = TinyVGGT(tiny_model.config).eval()
    with patch(model, sparsity=0.5, **SMALL) as handle, torch.no_grad():
        assert handle.report().backend == "auto"
        model.load_state_dict(tiny_model.state_dict(), assign=True)
        model(images(8, torch.float32))
        assert handle.report().backend == "gather"


def test_a_backend_that_cannot_run_there_is_told_in_the_first_forward(
    tiny_model: TinyVGGT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moved to a device that the backend asked for does not know."""
    refusals: list[str | None] = [None]
    only = replace(backends.get_backend("gather"), name="only", refusal=lambda problem: refusals[-1])
    monkeypatch.setitem(backends._BACKENDS, "only", only)
    with patch(tiny_model, sparsity=0.5, backend="only", **SMALL), torch.no_grad():
        refusals.append("it has no such kernel")
        backends._choose.cache_clear()  # as another device would be another question
        with pytest.raises(PatchError, match=r"Backend 'only' cannot run float32, .* it has no such kernel"):
            tiny_model(images(8, torch.float32))


def test_a_backend_of_the_graphics_card_may_be_named_before_the_model_is_moved_there(
    tiny_model: TinyVGGT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is built on the CPU, patched, and moved; a backend for halves may be named where autocast makes them."""

    def refusal(problem: Problem) -> str | None:
        on_card = problem.device.type == "cuda" and problem.dtype == torch.bfloat16
        return None if on_card else "it runs in bfloat16 on a graphics card"

    card = replace(backends.get_backend("gather"), name="card", refusal=refusal)
    monkeypatch.setitem(backends._BACKENDS, "card", card)
    with pytest.raises(
        PatchError, match=r"'card' cannot run float32, .* on cpu: it runs in bfloat16 on a graphics card"
    ):
        patch(tiny_model, sparsity=0.5, backend="card", **SMALL)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with (
        patch(tiny_model, sparsity=0.5, backend="card", **SMALL),
        torch.no_grad(),
        pytest.raises(PatchError, match=r"'card' cannot run float32, .* on cpu"),
    ):
        tiny_model(images(8, torch.float32))  # it was not moved
    with pytest.raises(PatchError, match="no attention backend 'cart'"):
        patch(tiny_model, sparsity=0.5, backend="cart", **SMALL)


def test_under_autocast_the_backend_is_asked_for_its_type(
    tiny_model: TinyVGGT, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refusal(problem: Problem) -> str | None:
        asked.append(problem.dtype)
        return None

    monkeypatch.setitem(
        backends._BACKENDS, "asked", replace(backends.get_backend("gather"), name="asked", refusal=refusal)
    )
    place = Place(Settings(0.5, None, None, "uniform", backend="asked", **SMALL), None)
    (site, *_) = resolve_adapter(tiny_model).sites(tiny_model)
    place.settle(site)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        place.settle(site, torch.device("cpu"))
    assert asked == [torch.float32, torch.bfloat16]


def test_heads_that_keep_nearly_everything_keep_all_of_it_on_a_graphics_card() -> None:
    budgets = torch.tensor([40, 79, 80, 99, 100])
    raised, spared = plans._with_dense_heads(budgets, 100, 0.8)
    assert raised.tolist() == [40, 79, 100, 100, 100] and spared == 21
    assert plans._with_dense_heads(budgets, 100, 1.0)[0].equal(budgets)


@pytest.mark.parametrize("share", [0, 1.5, "most", None])
def test_a_share_from_which_heads_are_dense_lies_in_range(share: Any) -> None:
    with pytest.raises(PatchError, match="dense_from is"):
        Settings(0.5, None, None, "uniform", dense_from=share)
