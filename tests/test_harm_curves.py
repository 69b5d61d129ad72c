"""Budgets over all layers: curves made comparable, and a patch that follows them at the sparsity asked for."""

from __future__ import annotations

import copy
import dataclasses
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from hess_plugin import PatchError, Profile, ProfileError, Scene, calibrate, patch
from hess_plugin.calibration.harm import HarmSettings
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.harm_curves import model_curves
from hess_plugin.plugins import resolve_adapter
from hess_plugin.profiles import weights_fingerprint
from hess_plugin.scoring import ERROR_NAMES
from hess_plugin.sites import PROJECTIONS
from hess_plugin.sparsity import allocate_by_gain, target_total

BLOCKS: dict[str, int] = {"block_q": 8, "block_k": 8}
FALLING = torch.tensor([8.0, 3.0, 1.0], dtype=torch.float64)


def images_of(views: int) -> Tensor:
    return torch.rand(views, 3, 60, 60, generator=torch.Generator().manual_seed(7))


def profile_of(model: TinyVGGT, sizes: Tensor, **changes: Any) -> Profile:
    """Curves of one shape and different sizes ``[scenes, L, H]``, the same for both errors."""
    sites = resolve_adapter(model).sites(model)
    curves = sizes.double()[..., None] * FALLING
    shares = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64).repeat(len(sizes), 1)
    fields: dict[str, Any] = {
        "adapter": "vggt",
        "sites": tuple(site.key for site in sites),
        "num_heads": 4,
        "scenes": tuple(f"scene {i}" for i in range(len(sizes))),
        "traces": {f"{e}.{p}": torch.ones_like(sizes).double() for e in ERROR_NAMES for p in PROJECTIONS},
        "camera_weight": 0.5,
        "fingerprint": weights_fingerprint(sites),
        "harm": {"camera": curves, "points": curves.clone(), "shares": shares},
    }
    return Profile(**{**fields, **changes})


SIZES = torch.tensor([[[1.0, 2.0, 3.0, 9.0], [0.0, 0.2, 0.3, 0.5]]])


# ---------------------------------------------------------------- curves


def test_no_scene_and_no_unit_of_an_error_decides(tiny_model: TinyVGGT) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.rand(3, 2, 4, generator=generator)
    plain = profile_of(tiny_model, sizes)
    louder = {name: curves.clone() for name, curves in plain.harm.items()}
    louder["points"] *= 1e-12
    louder["camera"][1] *= 1e9
    shares, wanted = model_curves(plain)
    again, found = model_curves(dataclasses.replace(plain, harm=louder))
    assert torch.equal(shares, again) and shares.tolist() == [0.1, 0.3, 0.6]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0.0)
    parts = sizes.double() / sizes.double().sum((1, 2), keepdim=True)
    torch.testing.assert_close(wanted, parts.mean(0)[..., None] * FALLING / FALLING.sum(), rtol=1e-6, atol=0.0)


def test_errors_are_mixed_by_the_weight_and_a_missing_one_leaves_the_other(tiny_model: TinyVGGT) -> None:
    profile = profile_of(tiny_model, SIZES)
    other = {name: curves.clone() for name, curves in profile.harm.items()}
    other["camera"] = other["camera"].flip(2)
    profile = dataclasses.replace(profile, harm=other)
    camera, points = (model_curves(profile, weight)[1] for weight in (1.0, 0.0))
    torch.testing.assert_close(camera, points.flip(1), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(model_curves(profile)[1], (camera + points) / 2, rtol=1e-12, atol=0.0)
    alone = {**other, "camera": torch.full_like(other["camera"], torch.nan)}
    without = dataclasses.replace(profile, harm=alone)
    torch.testing.assert_close(model_curves(without, 0.3)[1] / 0.7, points, rtol=1e-12, atol=0.0)
    with pytest.raises(ProfileError, match=r"with camera_weight 1\.0 the profile has no harm curves"):
        model_curves(without, 1.0)


def test_scenes_without_an_error_or_without_harm_do_not_count(tiny_model: TinyVGGT) -> None:
    sizes = torch.cat([SIZES, SIZES.flip(2), SIZES, SIZES])
    profile = profile_of(tiny_model, sizes)
    harm = {name: curves.clone() for name, curves in profile.harm.items()}
    harm["camera"][1] = harm["points"][1] = torch.nan
    for curves in harm.values():
        curves[2] = torch.nan  # too few blocks
    harm["camera"][3] = harm["points"][3] = 0.0
    _, found = model_curves(dataclasses.replace(profile, harm=harm))
    torch.testing.assert_close(found, model_curves(profile_of(tiny_model, SIZES))[1], rtol=1e-12, atol=0.0)


def test_scenes_of_different_sizes_meet_on_all_shares(tiny_model: TinyVGGT) -> None:
    profile = profile_of(tiny_model, torch.cat([SIZES, SIZES]))
    harm = {name: curves.clone() for name, curves in profile.harm.items()}
    harm["shares"][1] = torch.tensor(
        [0.2, 0.2, 0.6], dtype=torch.float64
    )  # two shares that came to one number of blocks
    shape = torch.tensor([5.0, 5.0, 1.0], dtype=torch.float64)
    for name in ERROR_NAMES:
        harm[name][1] = SIZES[0].double()[..., None] * shape
    shares, curves = model_curves(dataclasses.replace(profile, harm=harm))
    assert shares.tolist() == [0.1, 0.2, 0.3, 0.6]
    first, second = torch.tensor([8.0, 5.5, 3.0, 1.0]), torch.tensor([6.0, 5.0, 4.0, 1.0])
    parts = (SIZES[0] / SIZES.sum()).double()
    wanted = parts[..., None] * (first / first.sum() + second / second.sum()) / 2
    torch.testing.assert_close(curves, wanted.double(), rtol=1e-6, atol=1e-12)


def test_a_profile_without_curves_says_how_to_get_them(tiny_model: TinyVGGT) -> None:
    profile = profile_of(tiny_model, SIZES, harm={})
    with pytest.raises(
        ProfileError, match=r"calibrated without them; calibrate again with --harm .* or take .* 'hess'"
    ):
        patch(tiny_model, profile=profile, allocation="harm", sparsity=0.5)
    with pytest.raises(PatchError, match="'harm' divides budgets by a profile and none was given"):
        patch(tiny_model, allocation="harm", sparsity=0.5)


# ---------------------------------------------------------------- patches


@pytest.mark.parametrize("sparsity", [0.3, 0.65, 0.75, 0.85])
@pytest.mark.parametrize("memory", ["plain", "lean"])
def test_one_total_is_divided_over_all_layers(tiny_model: TinyVGGT, sparsity: float, memory: str) -> None:
    profile, rows = profile_of(tiny_model, SIZES), 18
    with (
        torch.inference_mode(),
        patch(tiny_model, profile=profile, allocation="harm", sparsity=sparsity, memory=memory, **BLOCKS) as handle,
    ):
        tiny_model(images_of(4))
    report = handle.report()
    total = target_total(sparsity, 8, rows, rows)
    assert report.sparsity == pytest.approx(1 - total / (8 * rows**2), abs=1e-12)
    wanted = allocate_by_gain(total, *model_curves(profile), rows=rows, columns=rows)
    for site, budgets in zip(report.sites, wanted.tolist(), strict=True):
        assert site.head_sparsity == pytest.approx([1 - budget / rows**2 for budget in budgets], abs=1e-12)
    first, second = (site.sparsity or 0.0 for site in report.sites)
    assert first < sparsity < second  # nearly all harm is in the first layer
    assert report.allocation == "harm" and "allocation harm" in str(report)


def test_sparsity_zero_is_dense_bit_for_bit(tiny_model: TinyVGGT) -> None:
    plain = tiny_model(images_of(3))
    with patch(tiny_model, profile=profile_of(tiny_model, SIZES), allocation="harm", sparsity=0.0, **BLOCKS) as handle:
        found = tiny_model(images_of(3))
    assert handle.report().sparsity == 0.0
    assert all(torch.equal(found[name], plain[name]) for name in ("pose_enc", "world_points", "depth"))


def test_a_layer_that_keeps_everything_is_dense(tiny_model: TinyVGGT) -> None:
    """Where one layer bears all harm it keeps all blocks, by its own attention call."""
    profile = profile_of(tiny_model, torch.tensor([[[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]]]))
    with patch(tiny_model, profile=profile, allocation="harm", sparsity=0.4, **BLOCKS) as handle:
        tiny_model(images_of(4))
    report = handle.report()
    assert [site.dense_calls for site in report.sites] == [1, 0]
    assert report.sparsity == pytest.approx(0.4, abs=1e-3) and report.sites[0].sparsity == 0.0
    wanted = [0.8] * 4  # of heads that nothing is known of, all get the same
    assert report.sites[1].head_sparsity == pytest.approx(wanted, abs=1 / 18**2)


def test_other_sizes_and_a_copy_get_budgets_of_their_own(tiny_model: TinyVGGT) -> None:
    profile = profile_of(tiny_model, SIZES)
    with patch(tiny_model, profile=profile, allocation="harm", sparsity=0.7, **BLOCKS) as handle:
        for views in (2, 4, 2, 5):
            tiny_model(images_of(views))
        copy.deepcopy(tiny_model)(images_of(3))
    kept, pairs = 0, 0
    for views in (2, 4, 2, 5, 3):
        rows = -(-views * 36 // 8)
        kept, pairs = kept + target_total(0.7, 8, rows, rows), pairs + 8 * rows**2
    assert handle.report().sparsity == pytest.approx(1 - kept / pairs, abs=1e-12)


def test_the_camera_weight_turns_budgets_and_the_rest_of_the_score_does_not(tiny_model: TinyVGGT) -> None:
    profile = profile_of(tiny_model, SIZES)
    harm = {**profile.harm, "camera": profile.harm["camera"].flip(1)}
    profile = dataclasses.replace(profile, harm=harm)

    def layers(**options: Any) -> list[float]:
        with patch(tiny_model, profile=profile, allocation="harm", sparsity=0.7, **BLOCKS, **options) as handle:
            tiny_model(images_of(4))
        return [site.sparsity or 0.0 for site in handle.report().sites]

    assert layers(camera_weight=0.0) == layers(camera_weight=1.0)[::-1]
    assert layers(camera_weight=0.0)[0] < layers()[0] == pytest.approx(0.7, abs=1e-2)
    assert layers(projection="v", normalisation="log") == layers()


def test_a_shortfall_is_told_of_the_whole_model(tiny_model: TinyVGGT, caplog: pytest.LogCaptureFixture) -> None:
    profile = profile_of(tiny_model, SIZES)
    options: dict[str, Any] = {"profile": profile, "allocation": "harm", **BLOCKS}
    with caplog.at_level(logging.WARNING, "hess_plugin"):
        with patch(tiny_model, sparsity=0.7, **options):
            tiny_model(images_of(4))  # the first layer keeps much more than .3
        assert caplog.records == []
        with patch(tiny_model, sparsity=0.95, **options):
            tiny_model(images_of(2))
    assert [record.message.partition(":")[0] for record in caplog.records] == ["sparsity 0.95 asked for, 0.78 reached"]


@pytest.mark.parametrize(
    "rule", [{"sparse_ratio": 0.5}, {"cdf_threshold": 0.9}, {"sparse_ratio": 0.5, "cdf_threshold": 0.9}]
)
def test_rules_leave_the_total_open(tiny_model: TinyVGGT, rule: dict[str, float]) -> None:
    with pytest.raises(PatchError, match=r"divides one total over all layers, .* give a sparsity\."):
        patch(tiny_model, profile=profile_of(tiny_model, SIZES), allocation="harm", **rule)
    with patch(tiny_model, profile=profile_of(tiny_model, SIZES), allocation="harm") as handle:
        assert handle.report().settings["sparsity"] == 0.73


def test_curves_that_were_measured_serve_any_sparsity(tiny_model: TinyVGGT, room: Scene) -> None:
    profile = calibrate(tiny_model, [room], eps=1e6, harm=HarmSettings(**BLOCKS))
    for sparsity in (0.2, 0.5, 0.8):
        with patch(tiny_model, profile=profile, allocation="harm", sparsity=sparsity, **BLOCKS) as handle:
            tiny_model(room.images)
        assert handle.report().sparsity == pytest.approx(sparsity, abs=1e-3)
