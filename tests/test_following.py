"""What a patch does where its profile was shown to harm, to help, or neither."""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hess_plugin import PatchError, Profile, ProfileError, patch
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.interception import is_patched
from hess_plugin.plugins import resolve_adapter
from hess_plugin.profiles import weights_fingerprint
from hess_plugin.scenes.scene import Scene
from hess_plugin.scoring import ERROR_NAMES, Scoring
from hess_plugin.sites import PROJECTIONS
from hess_plugin.verification import METRICS, Difference, Verification
from hess_plugin.verified_profiles import harm_digest, record_verification, traces_digest

BLOCKS: dict[str, Any] = {"block_q": 8, "block_k": 8}
ARMS = ("dense", "uniform", "hess")
SIGNS = {"helps": (1, 0), "harms": (-1, 0), "mixed": (1, 1), "undecided": (0, 0)}


@pytest.fixture
def profile(tiny_model: TinyVGGT) -> Profile:
    """A profile of the model with very unequal heads."""
    sites = resolve_adapter(tiny_model).sites(tiny_model)
    traces = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64).repeat(1, len(sites), 1)
    return Profile(
        "vggt",
        tuple(site.name for site in sites),
        4,
        ("one",),
        {f"{e}.{p}": traces for e in ERROR_NAMES for p in PROJECTIONS},
        0.5,
        weights_fingerprint(sites),
    )


def verified(profile: Profile, outcome: str, **changes: Any) -> Profile:
    """The profile with a verdict at sparsity 0.6."""
    auc30, points = (Difference(0.05 * sign, 0.01, 10) for sign in SIGNS[outcome])
    fields: dict[str, Any] = {
        "sparsity": 0.6,
        "measured": {"uniform": 0.6, "hess": 0.6},
        "scoring": Scoring(0.5),
        **BLOCKS,
        "scenes": 10,
        "views": (4, 4),
        "data": "",
        "means": {arm: dict.fromkeys(METRICS, 0.5) for arm in ARMS},
        "differences": {"auc30": auc30, "point_error": points},
        "traces": traces_digest(profile),
        "fingerprint": profile.fingerprint,
        "machine": "",
        "versions": {},
        "date": "2026-01-01",
    }
    found = Verification(**(fields | changes))
    assert found.outcome == outcome
    return record_verification(profile, found)


def run(model: nn.Module, images: Tensor, **options: Any) -> tuple[Tensor, Any]:
    """All that a patched model predicts, as one vector, and the report."""
    with torch.no_grad(), patch(model, **({"sparsity": 0.6} | BLOCKS | options)) as handle:
        predicted = model(images)
    tensors = [value.flatten() for _, value in sorted(predicted.items()) if isinstance(value, Tensor)]
    return torch.cat(tensors), handle.report()


def quiet(model: nn.Module, images: Tensor, **options: Any) -> tuple[Tensor, Any]:
    """The same, with no warning allowed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return run(model, images, **options)


@pytest.fixture
def outputs(tiny_model: TinyVGGT, room: Scene, profile: Profile) -> tuple[Tensor, Tensor]:
    """With uniform budgets and with the profile's, which differ."""
    uniform, guided = (quiet(tiny_model, room.images, profile=p)[0] for p in (None, profile))
    assert not torch.equal(uniform, guided)
    return uniform, guided


def test_a_profile_that_harms_steps_aside_and_says_so_in_one_line(
    tiny_model: TinyVGGT, room: Scene, profile: Profile, outputs: tuple[Tensor, Tensor]
) -> None:
    with pytest.warns(UserWarning) as caught:
        found, report = run(tiny_model, room.images, profile=verified(profile, "harms"))
    assert torch.equal(found, outputs[0])
    (warning,) = caught
    text = str(warning.message)
    assert "\n" not in text and text.startswith("Budgets are uniform, because this profile harms at sparsity 0.6 on 10")
    assert "AUC@30 -5.00 points (-7.69 to -2.31, worse)" in text and "verdict='ignore'" in text
    assert warning.filename == __file__  # the caller's line, not one of this package
    assert report.allocation == "uniform" and "camera_weight" not in report.settings
    assert report.settings["stepped_aside"].startswith("harms at sparsity 0.6")
    assert "stepped aside for uniform ones: it harms at" in str(report) and json.dumps(report.to_dict())


def test_refuse_raises_and_leaves_the_model_alone(tiny_model: TinyVGGT, room: Scene, profile: Profile) -> None:
    with pytest.raises(ProfileError, match=r"^this profile harms at sparsity 0\.6 .*; leave it out") as error:
        quiet(tiny_model, room.images, profile=verified(profile, "harms"), verdict="refuse")
    assert "\n" not in str(error.value) and not is_patched(tiny_model)
    for outcome in ("helps", "undecided"):
        quiet(tiny_model, room.images, profile=verified(profile, outcome), verdict="refuse")


@pytest.mark.parametrize("outcome", SIGNS)
def test_ignore_uses_the_profile_without_a_word(
    tiny_model: TinyVGGT, room: Scene, profile: Profile, outputs: tuple[Tensor, Tensor], outcome: str
) -> None:
    found, report = quiet(tiny_model, room.images, profile=verified(profile, outcome), verdict="ignore")
    assert torch.equal(found, outputs[1]) and report.allocation == "hess" and "stepped_aside" not in report.settings


@pytest.mark.parametrize("outcome", ["helps", "undecided"])
def test_a_profile_not_shown_to_harm_is_used_without_a_word(
    tiny_model: TinyVGGT, room: Scene, profile: Profile, outputs: tuple[Tensor, Tensor], outcome: str
) -> None:
    assert torch.equal(quiet(tiny_model, room.images, profile=verified(profile, outcome))[0], outputs[1])


@pytest.mark.parametrize("verdict", ["follow", "refuse"])
def test_a_mixed_one_is_used_with_a_warning(
    tiny_model: TinyVGGT, room: Scene, profile: Profile, outputs: tuple[Tensor, Tensor], verdict: str
) -> None:
    with pytest.warns(UserWarning, match=r"^Budgets follow this profile, which helps and harms: mixed at") as caught:
        found, report = run(tiny_model, room.images, profile=verified(profile, "mixed"), verdict=verdict)
    assert torch.equal(found, outputs[1]) and report.allocation == "hess" and len(caught) == 1


def test_verdicts_of_another_score_sparsity_traces_or_allocation_are_passed_over(
    tiny_model: TinyVGGT, room: Scene, profile: Profile, outputs: tuple[Tensor, Tensor]
) -> None:
    harmed = verified(profile, "harms")
    reversed_ = {name: trace.flip(-1) for name, trace in harmed.traces.items()}
    for options in (
        {"profile": harmed, "camera_weight": 0.4},
        {"profile": harmed, "projection": "k"},
        {"profile": harmed, "normalisation": "log"},
        {"profile": harmed, "sparsity": 0.75},
        {"profile": harmed, "sparsity": None, "sparse_ratio": 0.6},
        {"profile": dataclasses.replace(harmed, traces=reversed_)},
    ):
        assert quiet(tiny_model, room.images, **options)[1].allocation == "hess"
    for allocation in ("reverse", "uncapped", "random", "equal", "uniform"):
        _, report = quiet(tiny_model, room.images, profile=harmed, allocation=allocation)
        assert report.allocation == allocation and "stepped_aside" not in report.settings
    with pytest.warns(UserWarning, match=r"at sparsity 0\.6 .*verified with blocks of 8 x 8"):
        assert run(tiny_model, room.images, profile=harmed, sparsity=0.7, block_q=16)[1].allocation == "uniform"


def test_a_verdict_on_blocks_chosen_otherwise_says_so(tiny_model: TinyVGGT, room: Scene, profile: Profile) -> None:
    harmed = verified(profile, "harms")
    with pytest.warns(UserWarning, match=r"\(verified with .* 8 x 8 chosen by mass, not restore, parts of 4 x 8\)"):
        report = run(tiny_model, room.images, profile=harmed, selector="restore", pool_q=4)[1]
    assert report.allocation == "uniform" and report.settings["selector"] == "restore"
    both = verified(harmed, "helps", selection="restore, parts of 4 x 8")
    assert quiet(tiny_model, room.images, profile=both, selector="restore", pool_q=4)[1].allocation == "hess"


def test_a_patch_by_harm_follows_the_verdict_on_harm(tiny_model: TinyVGGT, room: Scene, profile: Profile) -> None:
    curves = torch.linspace(1.0, 0.1, 3).double().expand(1, len(profile.sites), 4, 3)
    shares = torch.tensor([[0.1, 0.3, 0.7]]).double()
    profile = dataclasses.replace(profile, harm={"camera": curves, "points": curves, "shares": shares})
    arms: dict[str, Any] = {
        "allocation": "harm",
        "measured": {"uniform": 0.6, "harm": 0.6},
        "means": {arm: dict.fromkeys(METRICS, 0.5) for arm in ("dense", "uniform", "harm")},
    }
    score = verified(profile, "harms")
    assert quiet(tiny_model, room.images, profile=score, allocation="harm")[1].allocation == "harm"
    harm = verified(profile, "harms", harm=harm_digest(profile), **arms)
    assert quiet(tiny_model, room.images, profile=harm)[1].allocation == "hess"
    with pytest.warns(UserWarning, match="Budgets are uniform, because this profile harms"):
        assert run(tiny_model, room.images, profile=harm, allocation="harm")[1].allocation == "uniform"
    with pytest.raises(ProfileError, match="this profile harms"):
        run(tiny_model, room.images, profile=harm, allocation="harm", verdict="refuse")
    other = dataclasses.replace(harm, harm={**harm.harm, "shares": shares / 2})
    assert quiet(tiny_model, room.images, profile=other, allocation="harm")[1].allocation == "harm"


def test_a_verdict_is_about_the_weights_it_was_measured_on(tiny_model: TinyVGGT, room: Scene, profile: Profile) -> None:
    """Of a profile of other weights, what was measured with this model's counts; and the other way round."""
    mine, other = profile.fingerprint, "0" * 16
    foreign = dataclasses.replace(profile, fingerprint=other)
    with pytest.warns(UserWarning, match="Budgets are uniform"):
        found = verified(foreign, "harms", fingerprint=mine)
        assert run(tiny_model, room.images, profile=found, strict=False)[1].allocation == "uniform"
    for owner, measured in ((foreign, other), (profile, other)):
        found = verified(owner, "harms", fingerprint=measured)
        assert quiet(tiny_model, room.images, profile=found, strict=False)[1].allocation == "hess"


def test_a_damaged_verdict_is_told_and_can_be_passed_over(tiny_model: TinyVGGT, room: Scene, profile: Profile) -> None:
    for damaged in ([{}], "harms", None, [None]):
        broken = dataclasses.replace(profile, metadata={"verdicts": damaged})
        with pytest.raises(ProfileError, match="a verdict in the profile is damaged"):
            patch(tiny_model, profile=broken, **BLOCKS)
        assert not is_patched(tiny_model)
        assert quiet(tiny_model, room.images, profile=broken, verdict="ignore")[1].allocation == "hess"
    none = dataclasses.replace(profile, metadata={"verdicts": []})
    assert quiet(tiny_model, room.images, profile=none)[1].allocation == "hess"


@pytest.mark.parametrize("given", ["", "Follow", None, True])
def test_an_unknown_choice_is_refused(tiny_model: TinyVGGT, given: Any) -> None:
    with pytest.raises(PatchError, match="wanted one of follow, refuse, ignore"):
        patch(tiny_model, verdict=given)
