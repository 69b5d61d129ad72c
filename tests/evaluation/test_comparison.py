"""Comparisons are paired, matched in sparsity, and say what was measured."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hess_plugin import PatchError, Profile, ProfileError, calibrate, patch
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.demo.scenes import RoomScenes
from hess_plugin.evaluation import comparison
from hess_plugin.evaluation.arms import Arm, scene_seed
from hess_plugin.evaluation.comparison import compare
from hess_plugin.evaluation.plots import head_sensitivity_map, trade_off
from hess_plugin.evaluation.records import METRICS, Measurement, write_csv
from hess_plugin.evaluation.statistics import summarise
from hess_plugin.evaluation.tables import comparison_table, profile_summary
from hess_plugin.interception import is_intercepted

ARMS = [Arm("dense"), *(Arm(name, 0.6, name) for name in ("uniform", "hess", "reverse", "random", "equal"))]


@pytest.fixture(scope="module")
def compared() -> tuple[TinyVGGT, Profile, list[Measurement]]:
    torch.manual_seed(0)
    from hess_plugin.demo.model import TinyVGGTConfig

    model = TinyVGGT(TinyVGGTConfig(dim=32, num_heads=4, depth=2, stem=16, camera_depth=1)).eval()
    profile = calibrate(model, RoomScenes("calibration", 2, 4), eps=10.0)
    rows = compare(model, RoomScenes("test", 3, 4), ARMS, profile=profile, block_q=8, block_k=8)
    return model, profile, rows


def test_every_arm_meets_every_scene(compared: tuple[TinyVGGT, Profile, list[Measurement]]) -> None:
    model, _, rows = compared
    assert {(row.scene, row.arm) for row in rows} == {
        (f"room-{30_000_000 + i}", arm.name) for i in range(3) for arm in ARMS
    }
    assert len(rows) == 3 * len(ARMS)
    assert not any(is_intercepted(module) for module in model.modules())


def test_arms_are_matched_in_measured_sparsity(compared: tuple[TinyVGGT, Profile, list[Measurement]]) -> None:
    for row in compared[2]:
        assert row.sparsity == pytest.approx(0.0 if row.arm == "dense" else 0.6, abs=0.005)
        assert row.seconds > 0 and math.isfinite(row.ate) and row.point_error > 0
        assert 0 <= row.auc3 <= row.auc5 <= row.auc15 <= row.auc30 <= 1


def test_calibration_and_test_rooms_are_disjoint() -> None:
    splits = [set(RoomScenes(split, 1000, 2).names) for split in ("validation", "calibration", "test")]
    assert len(set.union(*splits)) == 3000


def test_every_scene_shuffles_the_heads_in_its_own_way(
    compared: tuple[TinyVGGT, Profile, list[Measurement]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, profile, _ = compared
    seeds: list[object] = []

    def noted(*args: Any, **options: Any) -> Any:
        seeds.append(options.get("seed"))
        # Equal totals and no way around them, whatever the device and what a profile recorded of it.
        assert (options["dense_from"], options["dense_below"], options["verdict"]) == (1.0, 0, "ignore")
        return patch(*args, **options)

    monkeypatch.setattr(comparison, "patch", noted)
    scenes, arms = RoomScenes("test", 2, 3), [Arm(name, 0.6, name) for name in ("uniform", "random")]
    compare(model, scenes, arms, profile=profile, block_q=8, block_k=8)
    assert seeds == [seed for name in scenes.names for seed in (None, scene_seed(name))]


def test_a_score_arm_without_a_profile_is_refused(tiny_model: TinyVGGT) -> None:
    with pytest.raises(PatchError, match="profile"):
        compare(tiny_model, RoomScenes("test", 1, 3), [Arm("hess", 0.5, "hess")], block_q=8, block_k=8)


def test_a_score_that_cannot_be_made_is_refused_before_the_first_forward(tiny_model: TinyVGGT) -> None:
    ones = {f"{e}.{p}": torch.ones(1, 2, 4, dtype=torch.float64) for e in ("camera", "points") for p in "qkv"}
    sites = tuple(f"aggregator.global_blocks.{i}.attn" for i in range(2))
    profile = Profile("vggt", sites, 4, ("a",), ones, 0.5, "f" * 16)
    arms, scenes = [Arm("dense"), Arm("hess", 0.5, "hess")], RoomScenes("test", 1, 3)
    seen: list[str] = []

    def note(scene: str, arm: str) -> None:
        seen.append(arm)

    with pytest.raises(ProfileError, match="traces through patch rows"):
        compare(tiny_model, scenes, arms, profile=profile, rows="patch", progress=note)
    with pytest.raises(ProfileError, match="normalisation 'max' was given"):
        compare(tiny_model, scenes, arms, profile=profile, normalisation="max", progress=note)
    with pytest.raises(PatchError, match=r"normalisation log, rows all.*, and none was given"):
        compare(tiny_model, scenes, arms[:1], normalisation="log", progress=note)
    assert seen == []


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda n: st.lists(st.lists(st.floats(0, 1), min_size=n, max_size=n), min_size=3, max_size=3)
    )
)
def test_summaries_equal_the_formulas(values: list[list[float]]) -> None:
    arms = [("dense", "0"), ("uniform", "0.5"), ("hess", "0.5")]
    rows = [
        Measurement(f"s{i}", target, arm, *([value] * len(METRICS)))
        for (arm, target), column in zip(arms, values, strict=True)
        for i, value in enumerate(column)
    ]
    summaries = {s.arm: s for s in summarise(rows)}
    _, uniform, hess = (torch.tensor(column, dtype=torch.float64) for column in values)
    assert summaries["hess"].value.mean["auc30"] == pytest.approx(float(hess.mean()))
    paired = summaries["hess"].against["uniform"]
    assert paired.mean["ate"] == pytest.approx(float((hess - uniform).mean()), abs=1e-12)
    if len(hess) > 1:
        expected = float((hess - uniform).std() / len(hess) ** 0.5)
        assert paired.error["ate"] == pytest.approx(expected, abs=1e-12)
    else:
        assert math.isnan(paired.error["ate"])
    assert "uniform" not in summaries["uniform"].against and summaries["dense"].against == {}


def test_tables_csv_and_pictures(compared: tuple[TinyVGGT, Profile, list[Measurement]], tmp_path: Path) -> None:
    _, profile, rows = compared
    summaries = summarise(rows)
    table = comparison_table(summaries)
    assert table.count("\n") == len(ARMS) + 1 and "±" in table
    write_csv(tmp_path / "r.csv", rows, {"torch": torch.__version__})
    with (tmp_path / "r.csv").open() as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows) and float(read[0]["ate"]) == rows[0].ate and read[0]["torch"] == torch.__version__
    trade_off(summaries, tmp_path / "t.png", caption="x" * 400)
    head_sensitivity_map(profile, tmp_path / "h.png")
    for name in ("t.png", "h.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    text = profile_summary(profile)
    assert "most sensitive" in text and profile.fingerprint in text and "room-20000000" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["h.png", "r.csv", "t.png"]
