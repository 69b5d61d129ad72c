"""Sweeps match measured sparsity, go on after a kill, and keep what they are."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from hess_plugin import PatchError, Profile, SceneError, calibrate
from hess_plugin.baselines import Pruned
from hess_plugin.demo.model import TinyVGGT, TinyVGGTConfig
from hess_plugin.demo.scenes import RoomScenes
from hess_plugin.evaluation.ablations import ablations, all_ablations, named_arms
from hess_plugin.evaluation.arms import Arm, Row
from hess_plugin.evaluation.comparison import Runner
from hess_plugin.evaluation.head_pruner import HeadPruner
from hess_plugin.evaluation.metrics import MetricSettings
from hess_plugin.evaluation.records import Measurement
from hess_plugin.evaluation.sweep import Cell, Sweep
from hess_plugin.evaluation.sweep_folder import SweepFolder
from hess_plugin.scenes.scene import Scene

ROWS = (Row(0.5), Row(sparse_ratio=0.7, cdf_threshold=0.5), Row(sparse_ratio=0.1, cdf_threshold=0.9))
NAMES = ("uniform", "equal", "hess", "uncapped", "random")
PLAN = {"rows": [vars(row) for row in ROWS], "scoring": {"camera_weight": 0.5}, "model": "tiny", "data": "rooms"}
ABOUT = {"machine": "here", "hess_plugin": "0", "command": "hess-patch sweep"}


@pytest.fixture(scope="module")
def model() -> TinyVGGT:
    torch.manual_seed(0)
    return TinyVGGT(TinyVGGTConfig(dim=32, num_heads=4, depth=2, stem=16, camera_depth=1)).eval()


@pytest.fixture(scope="module")
def profile(model: TinyVGGT) -> Profile:
    found = calibrate(model, RoomScenes("calibration", 2, 4), eps=10.0)
    traces = {name: trace.clone() for name, trace in found.traces.items()}
    for trace in traces.values():  # one head that takes more than it can hold, so that capping matters
        trace[..., 0] *= 5.0
    return Profile(found.adapter, found.sites, found.num_heads, found.scenes, traces, 0.5, found.fingerprint)


def runner(model: nn.Module, profile: Profile, **options: object) -> Runner:
    return Runner(
        model, profile=profile, metrics=MetricSettings(max_points=500), options={"block_q": 8, "block_k": 8}, **options
    )


class Killed(Exception):
    """Stands for a kill."""


class Counted(Runner):
    """Counts forwards, and dies after so many."""

    budget = 10**9

    def measure(self, scene: Scene, arm: Arm) -> Measurement:
        if self.budget == 0:
            raise Killed
        self.budget -= 1
        return super().measure(scene, arm)


def run(folder: SweepFolder, with_runner: Runner, arms: Sequence[Arm], rows: Sequence[Row] = ROWS) -> list[Cell]:
    sweep = Sweep(with_runner, RoomScenes("test", 2, 4), folder.journal())
    return sweep.run(rows, arms, folder.write_cells)


@pytest.fixture(scope="module")
def swept(
    model: TinyVGGT, profile: Profile, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SweepFolder, list[Cell]]:
    folder = SweepFolder.start(tmp_path_factory.mktemp("sweep") / "s", PLAN, ABOUT)
    return folder, run(folder, runner(model, profile), named_arms(NAMES))


def test_every_cell_is_there_and_matched(swept: tuple[SweepFolder, list[Cell]]) -> None:
    cells = swept[1]
    assert [(cell.row.label, cell.arm.name) for cell in cells] == [
        ("0", "dense"),
        *((row.label, name) for row in ROWS for name in NAMES),
    ]
    for cell in cells:
        uniform = next(c for c in cells if c.row == cell.row and c.arm.name in ("uniform", "dense"))
        assert cell.matched == (abs(cell.sparsity - uniform.sparsity) <= 0.005)
        # What full heads lose cannot be made up for at so little sparsity: told, not hidden.
        assert cell.matched or (cell.arm.name, cell.row) == ("uncapped", ROWS[2])
        assert cell.gap == pytest.approx(cell.sparsity - uniform.sparsity)
        assert [m.scene for m in cell.measurements] == RoomScenes("test", 2, 4).names
        assert {m.knob for m in cell.measurements} == {cell.arm.knob}


def test_the_lost_surplus_of_full_heads_had_to_be_matched(swept: tuple[SweepFolder, list[Cell]]) -> None:
    """Without it the uncapped arm would drop more; the knob went back until it did not."""
    found = {cell.arm.name: cell for cell in swept[1] if cell.row == ROWS[0]}
    assert found["uncapped"].arm.knob < 0.48 and found["hess"].arm.knob == 0.5
    assert len({m.knob for m in swept[0].journal().rows if m.arm == "uncapped" and m.row == "0.5"}) > 1


def test_cells_are_read_back(swept: tuple[SweepFolder, list[Cell]]) -> None:
    folder, cells = swept
    again = SweepFolder.load(folder.path).cells()
    assert [(c.row, c.arm.name, c.arm.knob, c.matched, c.gap) for c in again] == [
        (c.row, c.arm.name, c.arm.knob, c.matched, c.gap) for c in cells
    ]
    assert [c.measurements for c in again] == [c.measurements for c in cells]
    with (folder.path / "cells.csv").open() as file:
        lines = list(csv.DictReader(file))
    hess = next(line for line in lines if line["arm"] == "hess" and line["row"] == "0.5")
    uniform = next(line for line in lines if line["arm"] == "uniform" and line["row"] == "0.5")
    difference = float(hess["auc30"]) - float(uniform["auc30"])
    assert float(hess["auc30_minus_uniform"]) == pytest.approx(difference, abs=1e-12)
    assert hess["machine"] == "here" and hess["data"] == "rooms" and hess["camera_weight"] == "0.5"
    assert uniform["camera_weight"] == "" and hess["command"] == "hess-patch sweep"


@pytest.mark.parametrize("after", [1, 5, 8])
def test_a_killed_sweep_goes_on_and_ends_the_same(
    after: int, model: TinyVGGT, profile: Profile, swept: tuple[SweepFolder, list[Cell]], tmp_path: Path
) -> None:
    folder = SweepFolder.start(tmp_path / "s", PLAN, ABOUT)
    arms, rows = named_arms(NAMES), ROWS[:1]
    dying = Counted(
        model, profile=profile, metrics=MetricSettings(max_points=500), options={"block_q": 8, "block_k": 8}
    )
    dying.budget = after
    with pytest.raises(Killed):
        run(folder, dying, arms, rows)
    dying.budget = 10**9
    kept = len(folder.journal().rows)
    cells = run(SweepFolder.start(tmp_path / "s", PLAN, ABOUT), dying, arms, rows)
    assert len(folder.journal().rows) - kept == 10**9 - dying.budget
    wanted = swept[1][: len(cells)]
    for mine, theirs in zip(cells, wanted, strict=True):
        assert mine.arm.knob == theirs.arm.knob
        for metric in ("auc30", "ate", "chamfer", "sparsity"):
            assert [getattr(m, metric) for m in mine.measurements] == [getattr(m, metric) for m in theirs.measurements]
    again = Counted(model, profile=profile, metrics=MetricSettings(), options={"block_q": 8, "block_k": 8})
    again.budget = 0  # nothing is left to measure
    run(folder, again, arms, rows)


def test_heads_are_pruned_to_the_uniform_arms_sparsity(model: TinyVGGT, profile: Profile, tmp_path: Path) -> None:
    scenes, file = RoomScenes("calibration", 2, 4), tmp_path / "gates.safetensors"
    pruner = HeadPruner(model, scenes, file, 0.5)
    folder = SweepFolder.start(tmp_path / "s", PLAN, ABOUT)
    arms = named_arms(("uniform", "michel", "kwon", "kwon-tuned"))
    cells = run(folder, runner(model, profile, pruner=pruner), arms, [Row(0.5), Row(0.3)])
    assert [cell.sparsity for cell in cells if cell.arm.pruning and cell.row == Row(0.5)] == [0.5] * 3
    coarse = next(cell for cell in cells if cell.arm.name == "kwon" and cell.row == Row(0.3))
    assert not coarse.matched and coarse.sparsity == 0.25  # 8 heads in all
    assert file.exists()
    before = file.stat().st_mtime_ns
    handle = HeadPruner(model, scenes, file, 0.5)(model, "michel", 0.5)
    assert isinstance(handle, Pruned)
    handle.remove()
    assert file.stat().st_mtime_ns == before  # the gradients were read, not measured again


def test_mistakes_are_told_before_the_first_forward(model: TinyVGGT, profile: Profile, tmp_path: Path) -> None:
    folder = SweepFolder.start(tmp_path / "s", PLAN, ABOUT)
    idle = Counted(model, profile=profile, options={})
    idle.budget = 0
    for arms, words in (
        (named_arms(("hess",)), "uniform one"),
        (named_arms(("uniform", "kwon")), "gate gradients"),
        ([*named_arms(("uniform",)), *named_arms(("uniform",))], "same name"),
        ([*named_arms(("uniform",)), Arm("x", allocation="fair")], "allocation is 'fair'"),
    ):
        with pytest.raises(PatchError, match=words):
            run(folder, idle, arms)


def test_a_folder_is_one_sweep(tmp_path: Path) -> None:
    SweepFolder.start(tmp_path / "s", PLAN, ABOUT)
    SweepFolder.start(tmp_path / "s", PLAN, {**ABOUT, "machine": "elsewhere"})
    with pytest.raises(SceneError, match=r'other settings .model was "tiny", now "large"'):
        SweepFolder.start(tmp_path / "s", {**PLAN, "model": "large"}, ABOUT)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(SceneError, match="not empty and holds no sweep"):
        SweepFolder.start(tmp_path / "other", PLAN, ABOUT)
    with pytest.raises(SceneError, match="holds no sweep"):
        SweepFolder.load(tmp_path / "nothing")
    with pytest.raises(SceneError, match="no finished cell"):
        SweepFolder.load(tmp_path / "s").cells()
    for text in ("", "[]", "{}", '{"version": 9, "plan": {}, "about": {}}'):
        (tmp_path / "s" / "sweep.json").write_text(text)
        with pytest.raises(SceneError, match=r"damaged|version 9"):
            SweepFolder.load(tmp_path / "s")


def test_ablations_change_one_thing(profile: Profile) -> None:
    names = [arm.name for arm in all_ablations(profile)]
    assert names[:4] == ["hess camera 0", "hess camera 1", "hess W_K", "hess W_V"]
    assert set(names[4:]) - {"hess patch rows"} == {f"hess {n}" for n in ("scene", "raw", "linear", "softmax", "log")}
    outputs = {f"{error}.output": profile.traces[f"{error}.k"] for error in ("camera", "points")}
    with_outputs = replace(profile, traces={**profile.traces, **outputs})
    added = [arm for arm in all_ablations(with_outputs) if arm.name not in names]
    assert [(arm.name, arm.scoring and arm.scoring.projection) for arm in added] == [("hess output", "output")]
    assert ablations(profile, camera_weights=[0.5], projections=["q"], normalisations=["sum"]) == []
    for arm in all_ablations(profile):
        assert arm.scoring is not None
        own = {"camera_weight": 0.5, "projection": "q", "normalisation": "sum", "rows": "all"}
        assert sum(getattr(arm.scoring, key) != value for key, value in own.items()) == 1
