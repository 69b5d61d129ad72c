"""Verifying with the trained demo model: an honest profile is not rejected, adversarial ones are caught."""

from __future__ import annotations

import dataclasses
import math
import statistics
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hess_plugin import PatchError, Profile, ProfileError, ProfileMismatch, SceneError, calibrate, patch
from hess_plugin.demo.model import TinyVGGT, load_demo_model
from hess_plugin.demo.scenes import RoomScenes
from hess_plugin.evaluation.records import METRICS as RECORDED
from hess_plugin.evaluation.records import Measurement
from hess_plugin.evaluation.verify import HeldOut, Verified, _columns, _difference, arms_of, verify
from hess_plugin.interception import is_intercepted
from hess_plugin.plugins import resolve_adapter
from hess_plugin.profiles import weights_fingerprint
from hess_plugin.scenes.scene import Scene
from hess_plugin.scoring import Scoring
from hess_plugin.verified_profiles import record_verification, traces_digest

VIEWS, TEST, BLOCK, SPARSITY = 6, 8, 8, 0.85


@pytest.fixture(scope="module")
def model() -> TinyVGGT:
    return load_demo_model()


@pytest.fixture(scope="module")
def honest(model: TinyVGGT) -> Profile:
    return calibrate(model, RoomScenes("calibration", 4, VIEWS))


@pytest.fixture(scope="module")
def rooms() -> list[Scene]:
    return list(RoomScenes("test", TEST, VIEWS))


def permuted(profile: Profile, heads: torch.Tensor) -> Profile:
    """The profile with the traces of other heads: head h of layer l gets those of ``heads[l, h]``."""
    index = heads.expand(len(profile.scenes), -1, -1)
    return dataclasses.replace(
        profile, traces={name: trace.gather(-1, index) for name, trace in profile.traces.items()}
    )


def reversed_ranking(profile: Profile) -> Profile:
    """The most sensitive head of a layer gets the traces of the least sensitive one, and so on."""
    order = profile.scores().argsort(-1)
    return permuted(profile, torch.empty_like(order).scatter_(-1, order, order.flip(-1)))


def verified(model: TinyVGGT, rooms: list[Scene], profile: Profile) -> Verified:
    return verify(model, rooms, profile, [SPARSITY], block_q=BLOCK, block_k=BLOCK)


@pytest.fixture(scope="module")
def harmful(model: TinyVGGT, honest: Profile, rooms: list[Scene]) -> tuple[Profile, Verified]:
    profile = reversed_ranking(honest)
    return profile, verified(model, rooms, profile)


def test_an_honest_profile_is_not_rejected(model: TinyVGGT, honest: Profile, rooms: list[Scene]) -> None:
    found = verified(model, rooms, honest)
    (verification,) = found.verifications
    assert verification.outcome in ("helps", "undecided"), verification.text
    assert verification.differences["point_error"].mean < 0.0
    recorded = record_verification(honest, verification)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with patch(model, profile=recorded, sparsity=SPARSITY, block_q=BLOCK, block_k=BLOCK) as handle:
            assert handle.report().allocation == "hess"


def test_a_reversed_ranking_harms_and_the_patch_steps_aside(
    model: TinyVGGT, rooms: list[Scene], harmful: tuple[Profile, Verified]
) -> None:
    profile, found = harmful
    (verification,) = found.verifications
    assert verification.outcome == "harms", verification.text
    profile = record_verification(profile, verification)
    options = {"sparsity": 0.8, "block_q": BLOCK, "block_k": BLOCK}

    def points(**more: object) -> torch.Tensor:
        with torch.no_grad(), patch(model, **options, **more):  # type: ignore[arg-type]
            return model(rooms[0].images)["world_points"]

    uniform = points()
    with pytest.warns(UserWarning, match=r"^Budgets are uniform, because this profile harms at sparsity 0\.85"):
        assert torch.equal(points(profile=profile), uniform)
    with pytest.raises(ProfileError, match="this profile harms"):
        points(profile=profile, verdict="refuse")
    assert not torch.equal(points(profile=profile, verdict="ignore"), uniform)


def test_what_was_recorded_does_not_change_what_is_measured(
    model: TinyVGGT, rooms: list[Scene], harmful: tuple[Profile, Verified]
) -> None:
    profile, found = harmful
    again = verified(model, rooms[:1], record_verification(profile, found.verifications[0]))
    first = [row for row in found.rows if row.scene == rooms[0].name]
    assert [row.auc30 for row in again.rows] == [row.auc30 for row in first]
    assert [row.point_error for row in again.rows] == [row.point_error for row in first]


def test_shuffled_heads_are_caught(model: TinyVGGT, honest: Profile, rooms: list[Scene]) -> None:
    """Shuffled once, by a rotation that leaves no head its own traces."""
    heads = torch.arange(honest.num_heads).roll(3).repeat(len(honest.sites), 1)
    (verification,) = verified(model, rooms, permuted(honest, heads)).verifications
    assert verification.outcome in ("harms", "undecided"), verification.text
    assert verification.differences["auc30"].mean < 0.0 < verification.differences["point_error"].mean


def test_numbers_are_those_of_the_measurements(harmful: tuple[Profile, Verified]) -> None:
    profile, found = harmful
    (verification,) = found.verifications
    assert len(found.rows) == 3 * TEST and {row.arm for row in found.rows} == {"dense", "uniform", "hess"}
    by_arm = {arm: {r.scene: r for r in found.rows if r.arm == arm} for arm in ("dense", "uniform", "hess")}
    for arm, rows in by_arm.items():
        for metric, mean in verification.means[arm].items():
            assert mean == pytest.approx(statistics.fmean(getattr(row, metric) for row in rows.values()))
    for metric, difference in verification.differences.items():
        values = [getattr(by_arm["hess"][s], metric) - getattr(by_arm["uniform"][s], metric) for s in by_arm["hess"]]
        assert difference.mean == pytest.approx(statistics.fmean(values)) and difference.scenes == TEST
        assert difference.error == pytest.approx(statistics.stdev(values) / math.sqrt(TEST))
    assert verification.measured == pytest.approx({"uniform": SPARSITY, "hess": SPARSITY}, abs=0.01)
    assert (verification.sparsity, verification.block_q, verification.block_k) == (SPARSITY, BLOCK, BLOCK)
    assert verification.views == (VIEWS, VIEWS) and verification.scoring == Scoring(profile.camera_weight)
    assert (verification.traces, verification.fingerprint) == (traces_digest(profile), profile.fingerprint)
    assert verification.versions["torch"] == torch.__version__


# ---------------------------------------------------------------- with a small random model


@pytest.fixture
def small(tiny_model: TinyVGGT) -> Profile:
    return calibrate(tiny_model, RoomScenes("calibration", 1, 4), eps=10.0)


def test_several_sparsities_are_measured_together(tiny_model: TinyVGGT, small: Profile) -> None:
    seen: list[tuple[str, str]] = []
    scenes = RoomScenes("test", 2, 4)
    found = verify(
        tiny_model,
        scenes,
        small,
        [0.5, 0.7312345678, 0.5],
        scoring=Scoring(0.2, "k"),
        block_q=BLOCK,
        block_k=BLOCK,
        data="rooms",
        progress=lambda scene, arm: seen.append((scene, arm)),
    )
    assert [v.sparsity for v in found.verifications] == [0.5, 0.7312345678] and len(found.rows) == len(seen) == 10
    for verification in found.verifications:
        assert verification.outcome == "undecided" and "give at least 8, better 20" in verification.text
        assert verification.scenes == 2 and verification.scoring == Scoring(0.2, "k") and verification.data == "rooms"
        assert verification.measured == pytest.approx(
            dict.fromkeys(("uniform", "hess"), verification.sparsity), abs=0.02
        )
        assert record_verification(small, verification).metadata["verdicts"]
    assert not any(is_intercepted(module) for module in tiny_model.modules())


def test_scenes_without_depth_give_a_verdict_on_cameras(tiny_model: TinyVGGT, small: Profile) -> None:
    scenes = [dataclasses.replace(scene, depth=None) for scene in RoomScenes("test", 8, 3)]
    (verification,) = verify(tiny_model, scenes, small, [0.6], block_q=BLOCK, block_k=BLOCK).verifications
    assert set(verification.tested) == {"auc30"} and math.isnan(verification.means["hess"]["point_error"])
    assert record_verification(small, verification).metadata["verdicts"][0]["means"]["hess"]["point_error"] is None


def test_other_weights_are_refused_or_verified_as_what_they_are(tiny_model: TinyVGGT, small: Profile) -> None:
    own = weights_fingerprint(resolve_adapter(tiny_model).sites(tiny_model))
    other = dataclasses.replace(small, fingerprint="0" * 16)
    scenes = RoomScenes("test", 1, 4)
    with pytest.raises(ProfileMismatch, match="--any-weights"):
        verify(tiny_model, scenes, other, [0.6], block_q=BLOCK, block_k=BLOCK)
    found = verify(tiny_model, scenes, other, [0.6], block_q=BLOCK, block_k=BLOCK, strict=False)
    assert found.verifications[0].fingerprint == own


def test_nothing_dropped_is_nothing_to_verify(tiny_model: TinyVGGT, small: Profile) -> None:
    with pytest.raises(PatchError, match=r"at sparsity 0\.6 nothing was dropped.*more views or smaller blocks"):
        verify(tiny_model, RoomScenes("test", 1, 2), small, [0.6], block_q=128, block_k=64)


@pytest.mark.parametrize("sparsities", [[0.0], [1.0], [0.5, math.nan], [-0.1], []])
def test_a_sparsity_that_cannot_be_verified_is_refused(
    tiny_model: TinyVGGT, small: Profile, sparsities: list[float]
) -> None:
    with pytest.raises(PatchError, match=r"above 0.* and below 1"):
        verify(tiny_model, RoomScenes("test", 1, 4), small, sparsities)


# ---------------------------------------------------------------- held-out scenes


class Unread:
    """Scenes that must not be read to know their names."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.read = names, list[int]()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> str:
        self.read.append(index)
        return self.names[index]

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abcdef"), max_size=6, unique=True))
def test_scenes_of_the_calibration_are_left_out_by_name(names: list[str]) -> None:
    traces = {f"{e}.{p}": torch.ones(2, 1, 2, dtype=torch.float64) for e in ("camera", "points") for p in "qkv"}
    profile = Profile("vggt", ("x",), 2, ("b", "e"), traces, 0.5, "f" * 16)
    kept = [name for name in names if name not in "be"]
    scenes = Unread(names)
    if not kept:
        with pytest.raises(SceneError, match=f"none of {len(names)} scenes is held out"):
            HeldOut(scenes, profile)  # type: ignore[arg-type]
        return
    held_out = HeldOut(scenes, profile)  # type: ignore[arg-type]
    assert scenes.read == [] and held_out.names == kept and held_out.left_out == [n for n in names if n in "be"]
    assert [held_out[i] for i in range(len(held_out))] == kept and len(scenes.read) == len(kept)
    assert list(held_out) == kept


def test_a_list_of_scenes_is_held_out_too(tiny_model: TinyVGGT, small: Profile) -> None:
    scenes = [*RoomScenes("calibration", 1, 4), *RoomScenes("test", 1, 4)]
    found = verify(tiny_model, scenes, small, [0.6], block_q=BLOCK, block_k=BLOCK)
    assert {row.scene for row in found.rows} == {scenes[1].name} and found.verifications[0].scenes == 1
    assert all(isinstance(row, Measurement) and math.isnan(row.chamfer) for row in found.rows)


def test_sparsities_that_are_nearly_the_same_are_not_mixed() -> None:
    arms = arms_of([0.73, 0.730001])
    rows = [Measurement("s", arm.label, arm.name, float(i), *[0.0] * 12) for i, arm in enumerate(arms)]
    for sparsity, values in ((0.73, [0.0, 1.0, 2.0]), (0.730001, [0.0, 3.0, 4.0])):
        assert [column["s"].auc30 for column in _columns(rows, sparsity).values()] == values


def test_a_prediction_too_broken_to_measure_does_not_leave_its_arm_the_easier_scenes() -> None:
    """Three of twenty scenes that only uniform budgets survive: the rest must not make the profile look better."""
    columns: dict[str, dict[str, Measurement]] = {"uniform": {}, "hess": {}}
    for i in range(20):
        broken = i < 3
        for arm, auc, error in (("uniform", 0.8, 0.1), ("hess", 0.0 if broken else 0.81, math.nan if broken else 0.05)):
            values = {**dict.fromkeys(RECORDED, 0.5), "auc30": auc, "point_error": error + 0.001 * i}
            columns[arm][f"s{i}"] = Measurement(f"s{i}", "0.73", arm, **values)
    assert _difference(columns, "point_error").scenes == 0
    assert _difference(columns, "auc30").scenes == 20 and _difference(columns, "auc30").mean < 0
