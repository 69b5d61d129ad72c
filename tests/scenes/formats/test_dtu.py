"""The reference points of DTU's evaluation, and the part of space that they are compared in."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from hess_plugin.exceptions import MissingDependency, SceneError
from hess_plugin.scenes import Scene, read_scenes
from hess_plugin.scenes.clouds import write_cloud
from hess_plugin.scenes.formats.dtu import DtuVolume, read_volume

CAMERA = "extrinsic\n1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n\nintrinsic\n9 0 8\n0 9 6\n0 0 1\n\n425.0 2.5\n"


def read(spec: str) -> Scene:
    [scene] = read_scenes(spec)
    assert isinstance(scene, Scene)
    return scene


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A scan of one view."""
    scan = tmp_path / "scans" / "scan4"
    for name in ("images", "cams"):
        (scan / name).mkdir(parents=True)
    Image.new("RGB", (16, 12)).save(scan / "images/00000000.png")
    (scan / "cams/00000000_cam.txt").write_text(CAMERA)
    return scan


def write_truth(root: Path, scan: int, points: np.ndarray) -> None:
    (root / "Points/stl").mkdir(parents=True)
    (root / "ObsMask").mkdir()
    write_cloud(root / "Points/stl" / f"stl{scan:03d}_total.ply", torch.from_numpy(points))
    mask = np.zeros((4, 5, 6), np.uint8)
    mask[1:3, 1:4, 1:5] = 1
    box = np.array([[-10.0, -20.0, -30.0], [20.0, 20.0, 20.0]])
    scipy.io.savemat(root / "ObsMask" / f"ObsMask{scan}_10.mat", {"ObsMask": mask, "BB": box, "Res": 10.0, "Margin": 1})
    scipy.io.savemat(root / "ObsMask" / f"Plane{scan}.mat", {"P": np.array([[0.0], [0.0], [2.0], [10.0]])})


def test_the_cloud_is_cut_as_the_evaluation_cuts_it(recorded: Path, tmp_path: Path) -> None:
    grid = np.mgrid[-12:22:4, -22:22:4, -32:22:4].reshape(3, -1).T + 0.3
    write_truth(tmp_path / "truth", 4, grid.astype(np.float32))
    spec = f"dtu:{recorded},truth={tmp_path / 'truth'}"
    scene = read(spec)
    assert scene.points is not None
    cell = np.rint((grid - [-10, -20, -30]) / 10)
    kept = (cell >= 1).all(-1) & (cell < [3, 4, 5]).all(-1) & (2 * grid[:, 2] + 10 > 0)
    torch.testing.assert_close(scene.points, torch.from_numpy(grid[kept]).float())
    shutil.rmtree(tmp_path / "truth/ObsMask")
    whole = read(spec).points
    assert whole is not None and len(whole) == len(grid)
    shutil.move(tmp_path / "truth/Points", recorded.parent / "Points")
    assert read(f"dtu:{recorded.parent},scans=4").points is not None  # found beside the scans, too
    assert read(f"dtu:{recorded}").points is None
    with pytest.raises(SceneError, match=r"stl004_total.ply does not exist; unpack DTU's Points.zip"):
        read(spec)


# Halves are half way between two cells, where rounding has a choice.
numbers = st.floats(-12, 20, width=32) | st.integers(-10, 16).map(lambda halves: halves / 2)
points = st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=20)


@given(points, st.integers(0, 99), st.sampled_from([1.0, 2.5, 4.0]))
@example([(-3.5 + i, 0.5 + j, 3.5 + k) for i in range(2) for j in range(3) for k in range(4)], 0, 1.0)
def test_the_volume_is_that_of_the_twin(points: list[tuple[float, float, float]], seed: int, spacing: float) -> None:
    random = torch.Generator().manual_seed(seed)
    observed = torch.rand(3, 4, 5, generator=random) < 0.5
    corner = torch.tensor([-4.0, 0.0, 3.0], dtype=torch.float64)
    plane = torch.tensor([0.5, -1.0, 2.0, 3.0], dtype=torch.float64)
    volume = DtuVolume(observed, corner, spacing, plane, corner + 4 * spacing)
    inside, above = volume.observable(torch.tensor(points)), volume.above_plane(torch.tensor(points))
    for point, is_inside, is_above in zip(points, inside.tolist(), above.tolist(), strict=True):
        # The Matlab code's index, from 1: round((p - BB(1, :)) / Res + 1), halves away from zero.
        one = [int(np.trunc(x + np.copysign(0.5, x))) for x in (np.array(point) - corner.numpy()) / spacing + 1]
        within = all(1 <= i <= size for i, size in zip(one, (3, 4, 5), strict=True))
        assert is_inside == (within and bool(observed[tuple(np.array(one) - 1)]))
        assert is_above == (0.5 * point[0] - point[1] + 2 * point[2] + 3 > 0)


MAT = "ObsMask/ObsMask4_10.mat"


def save(name: str, **values: object) -> Callable[[Path], object]:
    return lambda root: scipy.io.savemat(root / name, values)


BOX = np.zeros((2, 3))
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "mask is text": (lambda f: (f / MAT).write_text("hello"), "ObsMask4_10.mat is not a Matlab file"),
    "mask cut": (lambda f: (f / MAT).write_bytes((f / MAT).read_bytes()[:300]), "ObsMask4_10.mat is not a Matlab file"),
    "mask empty": (lambda f: (f / MAT).write_bytes(b""), "ObsMask4_10.mat is not a Matlab file"),
    "mask missing": (lambda f: (f / MAT).unlink(), "ObsMask4_10.mat does not exist"),
    "plane missing": (lambda f: (f / "ObsMask/Plane4.mat").unlink(), "Plane4.mat does not exist"),
    "no box": (save(MAT, ObsMask=np.ones((2, 2, 2)), Res=1.0), "ObsMask4_10.mat has no BB"),
    "box of words": (save(MAT, ObsMask=np.ones((2, 2, 2)), BB="x", Res=1.0), "BB is <U1"),
    "flat mask": (save(MAT, ObsMask=np.ones((2, 2)), BB=BOX, Res=1.0), r"ObsMask is \(2, 2\)"),
    "no spacing": (save(MAT, ObsMask=np.ones((2, 2, 2)), BB=BOX, Res=0.0), "Res is 0.0"),
    "plane of three": (save("ObsMask/Plane4.mat", P=np.ones(3)), r"P is float64 \(1, 3\)"),
    "plane not finite": (save("ObsMask/Plane4.mat", P=np.full(4, np.nan)), "P is float64"),
    "nothing inside": (save(MAT, ObsMask=np.zeros((2, 2, 2)), BB=BOX, Res=1.0), "has no point in the scan's observed"),
    "cloud missing": (lambda f: shutil.rmtree(f / "Points"), "stl004_total.ply does not exist"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_truth_is_named(recorded: Path, tmp_path: Path, case: str) -> None:
    write_truth(tmp_path, 4, np.zeros((5, 3), np.float32))
    damage, sentence = DAMAGED[case]
    damage(tmp_path)
    with pytest.raises(SceneError, match=sentence) as raised:
        read(f"dtu:{recorded},truth={tmp_path}")
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_scipy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_truth(tmp_path, 4, np.zeros((5, 3), np.float32))
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(MissingDependency, match="pip install scipy"):
        read_volume(tmp_path, 4)
