"""DTU's protocol against a literal, slow reading of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from torch import Tensor

from hess_plugin.demo.rooms import make_scene
from hess_plugin.evaluation import dtu
from hess_plugin.evaluation.dtu import DtuProtocol, scan_number
from hess_plugin.evaluation.metrics import MetricSettings, measure_prediction
from hess_plugin.evaluation.thinning import visiting_order
from hess_plugin.exceptions import MissingDependency, PatchError, SceneError
from hess_plugin.geometry import Similarity
from hess_plugin.predictions import Prediction
from hess_plugin.scenes import Scene
from hess_plugin.scenes.clouds import write_cloud

Array = np.ndarray
BOX = np.array([[-10.0, -20.0, -30.0], [120.0, 40.0, 20.0]])  # 3, 2 and 1 cells of 60 mm, 14 x 7 x 6 of 10 mm
PLANE = np.array([0.1, 0.0, 2.0, 10.0])


@pytest.fixture(autouse=True)
def forget_scans() -> None:
    dtu._read.cache_clear()


def write_scan(
    folder: Path, scan: int, reference: Array, observed: Array, box: Array = BOX, side: float = 10.0
) -> None:
    (folder / "Points/stl").mkdir(parents=True, exist_ok=True)
    (folder / "ObsMask").mkdir(exist_ok=True)
    write_cloud(folder / f"Points/stl/stl{scan:03d}_total.ply", torch.from_numpy(reference))
    grid = {"ObsMask": observed.astype(np.uint8), "BB": box, "Res": side}
    scipy.io.savemat(folder / f"ObsMask/ObsMask{scan}_10.mat", grid)
    scipy.io.savemat(folder / f"ObsMask/Plane{scan}.mat", {"P": PLANE[:, None]})


def literally(predicted: Array, reference: Array, observed: Array, seed: int, threshold: float) -> dict[str, float]:
    """The protocol one point at a time."""
    there_all = np.ones(len(predicted), bool)
    for index in visiting_order(len(predicted), seed).tolist():
        if there_all[index]:
            for other in range(len(predicted)):
                if other != index and sum((predicted[other] - predicted[index]) ** 2) <= 0.2 * 0.2:
                    there_all[other] = False
    thinned = predicted[there_all]
    inside = []
    for point in thinned:
        cell = [math.floor((x - low) / 10 + 1 + 0.5) for x, low in zip(point, BOX[0], strict=True)]  # from 1, as Matlab
        within = all(1 <= i <= size for i, size in zip(cell, observed.shape, strict=True))
        inside.append(within and bool(observed[cell[0] - 1, cell[1] - 1, cell[2] - 1]))
    above = [float(PLANE[:3] @ point + PLANE[3]) > 0 for point in reference]
    data, stl = _in_cells(reference, thinned)[inside], _in_cells(thinned, reference)[above]
    precision, recall = float((data < threshold).mean()), float((stl < threshold).mean())
    accuracy, completeness = data[data < 20].mean(), stl[stl < 20].mean()
    return {
        "accuracy": accuracy,
        "completeness": completeness,
        "chamfer": (accuracy + completeness) / 2,
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
    }


def _in_cells(to: Array, origin: Array) -> Array:
    """Distances found cell by cell of 60 mm, among the points of a cell and those up to 60 mm around it."""
    distances = np.full(len(origin), 60.0)
    for cell in np.ndindex(*(np.floor((BOX[1] - BOX[0]) / 60).astype(int) + 1)):
        low = BOX[0] + np.array(cell) * 60
        searched = ((origin >= low) & (origin < low + 60)).all(1)
        near = to[((to >= low - 60) & (to < low + 120)).all(1)]
        if len(near):
            distances[searched] = np.sqrt(((origin[searched][:, None] - near[None]) ** 2).sum(-1)).min(1)
    return distances


@pytest.mark.parametrize("seed", range(6))
def test_the_protocol_is_that_of_the_twin(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    low, high = np.array([-25, -35, -45]), np.array([190, 120, 45])  # beyond the box, and beyond its last search cell
    reference = random.uniform(low, high, (130, 3)).astype(np.float32)
    observed = random.random((14, 7, 6)) < 0.7
    write_scan(tmp_path, 7, reference, observed)
    close = reference[random.integers(0, 130, 200)] + random.normal(0, 0.15, (200, 3))  # several within 0.2 mm
    predicted = np.concatenate([close, random.uniform(low, high, (60, 3)), [[500.0, 0, 0]]])
    wanted = literally(predicted, reference.astype(np.float64), observed, seed, 1.5)
    found = DtuProtocol(tmp_path, seed=seed).measure(torch.from_numpy(predicted), 7, 1.5)
    assert vars(found) == pytest.approx(wanted, rel=1e-12)
    assert 0 < found.precision < 1 and 0 < found.recall < 1
    far = DtuProtocol(tmp_path, 40.0, seed).measure(torch.from_numpy(predicted), 7, 1.5)  # F1 farther than outliers
    assert vars(far) == pytest.approx(literally(predicted, reference.astype(np.float64), observed, seed, 40.0))
    assert far.accuracy == found.accuracy and far.precision > found.precision


def test_the_protocol_by_hand(tmp_path: Path) -> None:
    observed = np.ones((14, 7, 6), bool)
    observed[5, 2, 3] = False  # x of 35 to 45, y of -5 to 5, z of -5 to 5
    reference = np.array([[0, 0, 0], [40, 0, 0], [80, 0, 0], [80, 0, -20], [-11, 0, 0], [170, 0, 0]], np.float32)
    write_scan(tmp_path, 1, reference, observed)
    predicted = torch.tensor(
        [
            [0.0, 0, 3],  # 3 mm
            [0.0, 0.1, 3],  # thinned away, or the one before it: 3 mm either way up to the last digits
            [40.0, 4, 0],  # not observed: no accuracy, but completeness
            [80.0, 0, -19],  # 1 mm from a reference point below the table
            [110.0, 0, 0],  # 30 mm: an outlier
            [-11.0, 0, 1],  # a cell that is observed, half of it before the first search cell
            [900.0, 0, 0],
        ]
    )
    scores = DtuProtocol(tmp_path).measure(predicted, 1, 3.5)
    assert scores.accuracy == pytest.approx((3 + 1) / 2, abs=0.01)
    # Above the table and searched: x of 0 (3 mm), 40 (4 mm) and 80 (19 mm); x of -11 and of 170 lie outside.
    assert scores.completeness == pytest.approx((3 + 4 + 19) / 3, abs=0.01)
    assert scores.chamfer == pytest.approx((scores.accuracy + scores.completeness) / 2)
    assert scores.precision == 2 / 4 and scores.recall == 1 / 5


def test_no_point_is_no_score(tmp_path: Path) -> None:
    write_scan(tmp_path, 2, np.zeros((3, 3), np.float32), np.ones((14, 7, 6), bool))
    for points in (torch.zeros(0, 3), torch.full((2, 3), 900.0)):
        scores = DtuProtocol(tmp_path).measure(points, 2, 1.0)
        assert math.isnan(scores.accuracy) and math.isnan(scores.completeness) and scores.f1 == 0


@pytest.fixture(scope="module")
def scan(random_similarity: Callable[[int], Similarity]) -> Scene:
    """A room of some metres told in millimetres, in a frame that is not that of its first camera."""
    room = make_scene(5, views=4).resized(20, 20)
    turn = replace(random_similarity(8), scale=torch.ones((), dtype=torch.float64))
    c2w = room.c2w.double().clone()
    c2w[:, :3, 3] *= 1000
    assert room.depth is not None
    return replace(room, name="dtu:/data/scan12", c2w=turn.apply_poses(c2w), depth=room.depth * 1000)


def predicted(scene: Scene, to_model: Similarity, noise: float = 4.0) -> Prediction:
    known = scene.world_points()
    assert known is not None
    points = known[0].double() + noise * torch.randn(known[0].shape, generator=torch.Generator().manual_seed(1))
    return Prediction(to_model.apply_poses(scene.c2w), to_model.apply(points), torch.full(points.shape[:3], 2.0), 1.0)


@pytest.fixture
def truth(scan: Scene, tmp_path: Path) -> tuple[Path, Tensor]:
    """The scan's points in its own millimetres, some of them observed."""
    cloud = scan.cloud()
    assert cloud is not None
    low, high = cloud.double().amin(0).numpy() - 100, cloud.double().amax(0).numpy() + 100
    side = 100.0
    shape = np.floor((high - low) / side).astype(int) + 1
    observed = np.random.default_rng(0).random(shape) < 0.8
    write_scan(tmp_path, 12, cloud.float().numpy(), observed, np.stack([low, high]), side)
    return tmp_path, cloud.float()


@pytest.mark.parametrize("how", ["pixels", "cameras"])
def test_a_normalised_scene_is_measured_in_the_millimetres_it_was_read_in(
    scan: Scene, truth: tuple[Path, Tensor], random_similarity: Callable[[int], Similarity], how: str
) -> None:
    protocol = DtuProtocol(truth[0], threshold=5.0)
    chosen = MetricSettings(alignment=how, dtu=protocol)
    plain = predicted(scan, Similarity.identity())
    exact = protocol.measure(plain.points.flatten(0, 2), 12, 5.0)
    assert 1 < exact.chamfer < 10
    for scene in (scan, scan.normalised(), scan.normalised().subset([0, 1, 2, 3]).normalised()):
        for seed in (2, 3):
            scores = measure_prediction(predicted(scan, random_similarity(seed)), scene, chosen)
            assert (scores.unit, scores.alignment) == ("mm", how)
            if how == "cameras":  # the centres are exact, so the alignment is
                assert scores.chamfer == pytest.approx(exact.chamfer, rel=1e-3)
                assert scores.f1 == pytest.approx(exact.f1, abs=0.01) and scores.centre_error < 0.01
            assert scores.chamfer == pytest.approx(exact.chamfer, rel=0.05)
            assert scores.point_error == pytest.approx(4 * math.sqrt(8 / math.pi), rel=0.05)
            assert scores.ate < 0.01


def test_f1_keeps_its_distance_where_the_protocol_sets_none(scan: Scene, truth: tuple[Path, Tensor]) -> None:
    scene, prediction = scan.normalised(), predicted(scan, Similarity.identity())
    as_set = MetricSettings(threshold=5 / scene.scale, dtu=DtuProtocol(truth[0]))
    in_mm = MetricSettings(dtu=DtuProtocol(truth[0], threshold=5.0))
    assert measure_prediction(prediction, scene, as_set).f1 == pytest.approx(
        measure_prediction(prediction, scene, in_mm).f1, abs=1e-3
    )
    assert measure_prediction(prediction, scene, MetricSettings(dtu=DtuProtocol(truth[0]))).f1 > 0.99


@pytest.mark.parametrize(
    "name, number", [("scan4", 4), ("dtu:/data/dtu/scan114", 114), ("scan009", 9), ("scan4_train", 4)]
)
def test_the_scan_is_told_by_the_name(name: str, number: int) -> None:
    assert scan_number(name) == number


@pytest.mark.parametrize("name", ["room", "scan", "scan4b", "scan4/left", "rescan4"])
def test_a_scene_that_is_no_scan_is_told(scan: Scene, tmp_path: Path, name: str) -> None:
    scene = replace(scan, name=name)
    with pytest.raises(SceneError, match=f"Scene {name} is not named scan<N>"):
        measure_prediction(predicted(scan, Similarity.identity()), scene, MetricSettings(dtu=DtuProtocol(tmp_path)))


MISSING = {
    "Points/stl/stl003_total.ply": "stl003_total.ply does not exist; unpack DTU's Points.zip there",
    "ObsMask/ObsMask3_10.mat": "ObsMask3_10.mat does not exist; unpack DTU's SampleSet.zip there",
    "ObsMask/Plane3.mat": "Plane3.mat does not exist; unpack DTU's SampleSet.zip there",
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write_scan(tmp_path, 3, np.zeros((3, 3), np.float32), np.ones((14, 7, 6), bool))
    (tmp_path / name).unlink()
    with pytest.raises(SceneError, match=MISSING[name]):
        DtuProtocol(tmp_path).measure(torch.zeros(2, 3), 3, 1.0)


def test_other_mistakes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SceneError, match=r"absent does not exist; give the one with DTU's Points and ObsMask\.$"):
        DtuProtocol(tmp_path / "absent")
    with pytest.raises(PatchError, match=r"DTU's threshold is 0\.0, wanted a distance above 0 in millimetres"):
        DtuProtocol(tmp_path, threshold=0.0)
    write_scan(tmp_path, 3, np.zeros((3, 3), np.float32), np.ones((14, 7, 6), bool))
    (tmp_path / "ObsMask/ObsMask3_10.mat").unlink()
    (tmp_path / "ObsMask/Plane3.mat").unlink()
    with pytest.raises(SceneError, match=r"ObsMask3_10\.mat does not exist"):
        DtuProtocol(tmp_path).measure(torch.zeros(2, 3), 3, 1.0)
    monkeypatch.setitem(sys.modules, "scipy.spatial", None)
    write_scan(tmp_path, 4, np.zeros((3, 3), np.float32), np.ones((14, 7, 6), bool))
    with pytest.raises(MissingDependency, match="pip install scipy"):
        DtuProtocol(tmp_path).measure(torch.zeros(2, 3), 4, 1.0)
