from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hess_plugin.exceptions import SceneError
from hess_plugin.geometry import invert_rigid
from hess_plugin.scenes import Scene, read_scenes
from hess_plugin.scenes.formats.seven_scenes import COLOUR_FROM_DEPTH, HEIGHT, WIDTH
from hess_plugin.scenes.formats.splatting import reproject_depth

COLOUR_TO_DEPTH = invert_rigid(torch.tensor(COLOUR_FROM_DEPTH, dtype=torch.float64))


def intrinsics(focal: float, cx: float, cy: float) -> torch.Tensor:
    return torch.tensor([[focal, 0.0, cx], [0.0, focal, cy], [0.0, 0.0, 1.0]], dtype=torch.float64)


def write_sequence(folder: Path, studio: Any, pseudo: bool = False) -> None:
    """A Kinect in a room: the colour camera stands at the room's poses, the depth camera beside it.

    Args:
        folder: the sequence.
        studio: the room.
        pseudo: the colour camera is the one of a pose file instead of the usual calibration.
    """
    folder.mkdir(parents=True)
    colour = intrinsics(525.505, 319.5, 239.5) if pseudo else intrinsics(525, 320, 240)
    for i, c2w in enumerate(studio.c2w):
        depth_pose = c2w @ torch.tensor(COLOUR_FROM_DEPTH, dtype=torch.float64)
        image, _ = studio.pinhole(c2w, colour, HEIGHT, WIDTH)
        _, depth = studio.pinhole(depth_pose, intrinsics(585, 320, 240), HEIGHT, WIDTH)
        values = np.rint(1000 * depth).astype(np.uint16)
        values[:40], values[40:60] = 0, 65535
        Image.fromarray(image).save(folder / f"frame-{i:06d}.color.png", compress_level=1)
        Image.fromarray(values).save(folder / f"frame-{i:06d}.depth.png", compress_level=1)
        drifted = depth_pose.clone()
        drifted[:3, :3] *= 0.9998  # as recorded: not quite rotations
        np.savetxt(folder / f"frame-{i:06d}.pose.txt", drifted.numpy(), fmt="%.9e")


def write_poses(path: Path, studio: Any, frames: tuple[int, ...] = (0, 1, 2)) -> None:
    lines = []
    for i in frames:
        w2c = invert_rigid(studio.c2w[i]).numpy()
        x, y, z, w = pycolmap.Rotation3d(w2c[:3, :3]).quat
        numbers = " ".join(repr(float(number)) for number in (w, x, y, z, *w2c[:3, 3], 525.505))
        lines.append(f"seq-02/frame-{i:06d}.color.png {numbers}")
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, studio: Any) -> Path:
    scene = tmp_path_factory.mktemp("seven") / "kitchen"
    write_sequence(scene / "seq-02", studio)
    (scene / "seq-14").mkdir()
    (scene / "TrainSplit.txt").write_text("sequence2\n")
    (scene / "TestSplit.txt").write_text("sequence14\r\n")
    return scene


@pytest.fixture
def folder(recorded: Path, tmp_path: Path) -> Path:
    shutil.copytree(recorded, tmp_path / "kitchen")
    return tmp_path / "kitchen"


def read(spec: str) -> Scene:
    scene = read_scenes(spec)[0]
    assert isinstance(scene, Scene)
    return scene


def test_what_is_read_is_what_the_colour_camera_sees(recorded: Path, studio: Any) -> None:
    scene = read(f"7scenes:{recorded}")
    assert scene.name == "kitchen/seq-02" and scene.depth is not None
    torch.testing.assert_close(scene.c2w, studio.c2w, atol=1e-8, rtol=0)
    assert studio.misfit(scene) == (pytest.approx(0, abs=0.05), pytest.approx(0, abs=0.1))
    assert float((scene.depth[:, :40] > 0).float().mean()) < 0.2  # 0 and 65535 stayed "not known"
    assert float((scene.depth[:, 120:400, 100:540] > 0).float().mean()) > 0.95  # the depth camera sees less
    assert float(scene.depth.max()) < 10


def test_depth_as_recorded_would_be_told_from_depth_as_seen(recorded: Path, studio: Any) -> None:
    """The trap of this data set: the depth file on the colour image's pixels is wrong by far more than it is here."""
    scene = read(f"7scenes:{recorded}")
    assert scene.depth is not None
    recorded_depth = np.array(Image.open(recorded / "seq-02/frame-000000.depth.png")) / 1000
    _, seen = studio.pinhole(scene.c2w[0], scene.intrinsics[0], HEIGHT, WIDTH)
    part = np.s_[120:400, 100:540]
    as_recorded = np.abs(recorded_depth[part] - seen[part]) / seen[part]
    as_read = np.abs(scene.depth[0].numpy()[part] - seen[part]) / seen[part]
    assert np.median(as_read) < 0.001 < 0.005 < np.median(as_recorded)


def test_published_poses_are_the_colour_cameras(tmp_path: Path, studio: Any) -> None:
    write_sequence(tmp_path / "kitchen/seq-02", studio, pseudo=True)
    write_poses(tmp_path / "poses.txt", studio)
    scene = read(f"7scenes:{tmp_path / 'kitchen'},poses={tmp_path / 'poses.txt'}")
    torch.testing.assert_close(scene.c2w, studio.c2w)
    assert studio.misfit(scene) == (pytest.approx(0, abs=0.05), pytest.approx(0, abs=0.1))
    assert studio.misfit(read(f"7scenes:{tmp_path / 'kitchen'}"))[0] > 1.0  # the usual calibration is half a pixel off
    write_poses(tmp_path / "poses.txt", studio, frames=(0, 2))
    torch.testing.assert_close(
        read(f"7scenes:{tmp_path / 'kitchen'},poses={tmp_path / 'poses.txt'}").c2w, studio.c2w[[0, 2]]
    )


def test_sequences_are_chosen_by_their_split(recorded: Path) -> None:
    assert read_scenes(f"7scenes:{recorded}").names == ["kitchen/seq-02", "kitchen/seq-14"]
    assert read_scenes(f"7scenes:{recorded},split=train").names == ["kitchen/seq-02"]
    assert read_scenes(f"7scenes:{recorded.parent},split=test").names == ["kitchen/seq-14"]


def test_a_frame_without_depth_has_none_known(folder: Path) -> None:
    (folder / "seq-02/frame-000001.depth.png").unlink()
    scene = read(f"7scenes:{folder}")
    assert scene.depth is not None and float(scene.depth[1].max()) == 0 < float(scene.depth[0].max())


def edit(name: str, old: str, new: str) -> Callable[[Path], object]:
    def change(scene: Path) -> None:
        text = (scene / name).read_text()
        assert old in text
        (scene / name).write_text(text.replace(old, new, 1))

    return change


POSE, COLOUR, DEPTH = (f"seq-02/frame-000001.{kind}" for kind in ("pose.txt", "color.png", "depth.png"))
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "pose missing": (lambda f: (f / POSE).unlink(), "frame-000001.pose.txt does not exist"),
    "pose cut": (lambda f: (f / POSE).write_text("1 0 0 0\n0 1 0 0\n"), "the pose has 8 numbers, 16 were wanted"),
    "pose of words": (lambda f: (f / POSE).write_text("a " * 16), "the pose is not 16 numbers"),
    "pose not finite": (lambda f: (f / POSE).write_text("nan " * 16), "the pose has values that are not finite"),
    "pose of zeros": (lambda f: (f / POSE).write_text("0 " * 16), "the pose is not a rigid transform"),
    "pose in another code": (lambda f: (f / POSE).write_bytes(b"\xff\xfe1"), "cannot be read as text"),
    "image of another size": (lambda f: Image.new("RGB", (320, 240)).save(f / COLOUR), "7-Scenes says 480x640"),
    "image truncated": (lambda f: (f / COLOUR).write_bytes((f / COLOUR).read_bytes()[:999]), "cannot be decoded"),
    "depth of 8 bits": (lambda f: Image.new("L", (640, 480)).save(f / DEPTH), "mode L, 16-bit grey was wanted"),
    "depth of another size": (lambda f: Image.new("I;16", (320, 240)).save(f / DEPTH), r"\[240, 320\], \[480, 640\]"),
    "no frames": (lambda f: [shutil.rmtree(f / "seq-02"), (f / "seq-02").mkdir()], "has no frame-"),
    "split missing": (lambda f: (f / "TrainSplit.txt").unlink(), "Split file .*TrainSplit.txt does not exist"),
    "split of another scene": (edit("TrainSplit.txt", "2", "3"), "TrainSplit.txt names 'sequence3'"),
    "split of words": (edit("TrainSplit.txt", "sequence2", "the second"), "TrainSplit.txt names 'the second'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named(folder: Path, case: str) -> None:
    damage, sentence = BROKEN[case]
    damage(folder)
    with pytest.raises(SceneError, match=sentence) as raised:
        read(f"7scenes:{folder},split=train")
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("seq-02/frame-000000.color.png 1 0 0 0 0 0 0", "has 7 numbers, 8 were wanted"),
        ("seq-02/frame-000000.color.png 1 0 0 0 0 0 x 525", "is not 8 numbers"),
        ("seq-02/frame-000000.color.png 1 1 0 0 0 0 0 525", "has no unit quaternion or no focal length"),
        ("seq-02/frame-000000.color.png 1 0 0 0 0 0 0 0", "has no unit quaternion or no focal length"),
        ("seq-09/frame-000000.color.png 1 0 0 0 0 0 0 525", "has no frame that the pose file names"),
    ],
)
def test_a_broken_pose_file_is_named(recorded: Path, tmp_path: Path, line: str, sentence: str) -> None:
    (tmp_path / "poses.txt").write_text(f"{line}\n")
    with pytest.raises(SceneError, match=sentence):
        read(f"7scenes:{recorded},poses={tmp_path / 'poses.txt'}")


def test_wrong_options_are_named(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(SceneError, match="option split is 'val', train, test or all"):
        read_scenes(f"7scenes:{recorded},split=val")
    for name in ("a", "b"):
        (tmp_path / name / "seq-01").mkdir(parents=True)
    with pytest.raises(SceneError, match=r"poses of x\.txt are those of one scene, .* holds 2"):
        read_scenes(f"7scenes:{tmp_path},poses=x.txt")
    with pytest.raises(SceneError, match="holds no scene: neither it nor a folder in it has folders seq-01"):
        read_scenes(f"7scenes:{tmp_path / 'a' / 'seq-01'}")


def test_nothing_is_opened_before_it_is_asked_for(folder: Path) -> None:
    for file in (folder / "seq-02").iterdir():
        file.write_text("nothing")
    assert read_scenes(f"7scenes:{folder}").names == ["kitchen/seq-02", "kitchen/seq-14"]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_moved_depth_is_that_of_the_twin(data: st.DataObject) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    rows, columns, high, wide = (data.draw(st.integers(1, 7)) for _ in range(4))
    depth = np.where(random.random((rows, columns)) < 0.3, 0, random.uniform(0.5, 4, (rows, columns)))
    k, target = intrinsics(4.0, columns / 2, rows / 2), intrinsics(data.draw(st.floats(2, 6)), wide / 2, high / 2)
    move = torch.eye(4, dtype=torch.float64)
    move[:3, :3] = torch.from_numpy(pycolmap.Rotation3d(random.normal(0, 1.0, 3)).matrix())
    move[:3, 3] = torch.from_numpy(random.normal(0, 2.0, 3))
    expected = np.zeros((high, wide))
    for v in range(rows):
        for u in range(columns):
            if depth[v, u] == 0:
                continue
            ray = np.array([(u - columns / 2) / 4, (v - rows / 2) / 4, 1.0])
            x, y, z = move.numpy()[:3, :3] @ (depth[v, u] * ray) + move.numpy()[:3, 3]
            if z <= 0:
                continue
            column = int(np.floor(float(target[0, 0]) * x / z + wide / 2 + 0.5))
            row = int(np.floor(float(target[1, 1]) * y / z + high / 2 + 0.5))
            if 0 <= row < high and 0 <= column < wide and (expected[row, column] == 0 or z < expected[row, column]):
                expected[row, column] = z
    found = reproject_depth(torch.from_numpy(depth), k, target, move, (high, wide))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_depth_moved_nowhere_stays(studio: Any) -> None:
    k = intrinsics(20.0, 7.5, 5.5)
    _, depth = studio.pinhole(studio.c2w[0], k, 12, 16)
    moved = reproject_depth(torch.from_numpy(depth), k, k, torch.eye(4), (12, 16))
    torch.testing.assert_close(moved, torch.from_numpy(depth))
    assert COLOUR_TO_DEPTH.shape == (4, 4)
