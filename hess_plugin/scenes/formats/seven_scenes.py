"""7-Scenes, as it is unpacked.

    <scene>/TrainSplit.txt, TestSplit.txt               lines such as "sequence1"
    <scene>/seq-01/frame-000000.color.png               640x480
    <scene>/seq-01/frame-000000.depth.png               16-bit, millimetres, 0 and 65535 = not known
    <scene>/seq-01/frame-000000.pose.txt                4x4, camera-to-world, metres

One scene is one sequence, named ``<scene>/seq-01``; the root is one such folder or a folder of them.

What is recorded does not fit together: the poses are the depth camera's, the depth is not registered to the colour
images, and neither camera's calibration comes with the data. The usual practice is followed (the preparation of the
data in DSAC* and ACE): focal lengths of 585 pixels for depth, as published with the data, and 525 for colour, a fixed
transform between the two taken from another Kinect's calibration at LIRIS, principal points at (320, 240). Here the
pose becomes the colour camera's, and the depth is moved into the colour camera with the nearest surface kept.
Rotations, which the tracker let drift, are made orthonormal.

That makes the cameras and the depth consistent with each other, and with the images to a few pixels only: all of it
is another device's calibration, and the poses come from fusing depth. ``poses=FILE`` takes the colour cameras instead
from a file of poses that were reconstructed from the images (Brachmann et al., "On the Limits of Pseudo Ground Truth
in Visual Camera Re-localisation", ICCV 2021), lines

    seq-01/frame-000000.color.png qw qx qy qz tx ty tz f

of world-to-camera transforms and the focal length in pixels, for a principal point in the middle of the image. Frames
that it does not name are left out. Depth keeps the calibration above.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch
from torch import Tensor

from hess_plugin.exceptions import SceneError
from hess_plugin.geometry import invert_rigid, quaternion_to_matrix
from hess_plugin.scenes.formats.splatting import reproject_depth
from hess_plugin.scenes.formats.textfiles import read_lines, read_sized_image, scene_folders, to_numbers, to_pose
from hess_plugin.scenes.images import read_depth
from hess_plugin.scenes.sources import SceneSource, View

HEIGHT, WIDTH = 480, 640
DEPTH_FOCAL, COLOUR_FOCAL = 585.0, 525.0
COLOUR_FROM_DEPTH = (
    (9.9996518012567637e-01, 2.6765126468950343e-03, -7.9041012313000904e-03, -2.5558943178152542e-02),
    (-2.7409311281316700e-03, 9.9996302803027592e-01, -8.1504520778013286e-03, 1.0109636268061706e-04),
    (7.8819942130445332e-03, 8.1718328771890631e-03, 9.9993554558014031e-01, 2.0318321729487039e-03),
    (0.0, 0.0, 0.0, 1.0),
)
"""From the depth to the colour camera of a Kinect, metres: https://projet.liris.cnrs.fr/voir/activities-dataset/,
page kinect-calibration; the same numbers are in the 7-Scenes preparation of DSAC* and ACE."""

_INVALID = 65535
_SPLITS = {"train": "TrainSplit.txt", "test": "TestSplit.txt"}
_SEQUENCE, _FRAME = re.compile(r"seq-(\d+)"), re.compile(r"frame-(\d+)\.color\.png")

OPTIONS = {
    "split": "train, test or all: which sequences (all)",
    "poses": "file of colour camera poses and focal lengths, for a root of one scene (the recorded poses)",
}


def find_sources(root: Path, split: str = "all", poses: str = "") -> list[SceneSource]:
    """The sequences at `root`, by scene and number.

    Args:
        root: one scene's folder or a folder of scenes.
        split: ``train``, ``test`` or ``all``.
        poses: file of colour cameras; empty = the recorded poses of the depth camera, moved.

    Raises:
        SceneError: when there is no sequence or an option is wrong.
    """
    if split not in (*_SPLITS, "all"):
        raise SceneError(f"7-Scenes' option split is {split!r}, train, test or all was wanted.")
    scenes = scene_folders(root, lambda folder: bool(_sequences(folder)), "folders seq-01, seq-02, ...")
    if poses and len(scenes) > 1:
        raise SceneError(f"The poses of {poses} are those of one scene, {root} holds {len(scenes)}; give one of them.")
    cameras = read_poses(Path(poses).expanduser()) if poses else None
    sources = []
    for scene in scenes:
        for sequence in _chosen(scene, split):
            views = functools.partial(_views, sequence, cameras)
            sources.append(SceneSource(f"{scene.resolve().name}/{sequence.name}", sequence, views))
    return sources


def read_poses(path: Path) -> dict[str, tuple[Tensor, float]]:
    """Camera-to-world `[4, 4]` float64 and focal length in pixels of every image a pose file names.

    Raises:
        SceneError: naming the file and the image of a line that is wrong.
    """
    cameras = {}
    for name, *words in read_lines(path, "Pose"):
        *quaternion, tx, ty, tz, focal = to_numbers(path, f"pose of {name}", words, 8)
        w, x, y, z = quaternion
        if not abs(w * w + x * x + y * y + z * z - 1) < 1e-3 or not focal > 0:
            raise SceneError(f"Pose file {path}: {name} has no unit quaternion or no focal length; correct it.")
        w2c = torch.eye(4, dtype=torch.float64)
        w2c[:3, :3] = quaternion_to_matrix(torch.tensor([x, y, z, w], dtype=torch.float64))
        w2c[:3, 3] = torch.tensor([tx, ty, tz], dtype=torch.float64)
        cameras[name] = (invert_rigid(w2c), focal)
    return cameras


def _sequences(scene: Path) -> list[Path]:
    if not scene.is_dir():
        return []
    found = [child for child in scene.iterdir() if child.is_dir() and _SEQUENCE.fullmatch(child.name)]
    return sorted(found, key=lambda path: path.name)


def _chosen(scene: Path, split: str) -> list[Path]:
    found = _sequences(scene)
    if split == "all":
        return found
    by_number = {int(path.name.removeprefix("seq-")): path for path in found}
    path, chosen = scene / _SPLITS[split], []
    for words in read_lines(path, "Split"):
        number = words[0].removeprefix("sequence")
        if len(words) != 1 or not number.isdigit() or int(number) not in by_number:
            raise SceneError(f"Split file {path} names {' '.join(words)!r}, of which there is no folder; restore it.")
        chosen.append(by_number[int(number)])
    return sorted(chosen, key=lambda folder: folder.name)


def _views(sequence: Path, cameras: dict[str, tuple[Tensor, float]] | None) -> list[View]:
    views = []
    for image in sorted(path for path in sequence.iterdir() if _FRAME.fullmatch(path.name)):
        stem = image.name.removesuffix(".color.png")
        if cameras is None:
            c2w, k = _colour_pose(sequence / f"{stem}.pose.txt"), _intrinsics(COLOUR_FOCAL, 320.0, 240.0)
        elif (name := f"{sequence.name}/{image.name}") in cameras:
            c2w, focal = cameras[name]
            k = _intrinsics(focal, WIDTH / 2 - 0.5, HEIGHT / 2 - 0.5)
        else:
            continue
        file = sequence / f"{stem}.depth.png"
        depth = functools.partial(_depth, file, k) if file.is_file() else None
        views.append(View(str(image), functools.partial(_image, image), c2w, k, depth))
    if not views:
        what = "no frame-*.color.png" if cameras is None else "no frame that the pose file names"
        raise SceneError(f"Sequence {sequence} has {what}; restore its files or choose another.")
    return views


def _colour_pose(path: Path) -> Tensor:
    words = [word for line in read_lines(path, "Pose") for word in line]
    depth_pose = to_pose(path, "the pose", to_numbers(path, "the pose", words, 16))
    return depth_pose @ invert_rigid(_colour_from_depth())


def _colour_from_depth() -> Tensor:
    return torch.tensor(COLOUR_FROM_DEPTH, dtype=torch.float64)


def _intrinsics(focal: float, cx: float, cy: float) -> Tensor:
    return torch.tensor([[focal, 0, cx], [0, focal, cy], [0, 0, 1]], dtype=torch.float64)


def _image(path: Path) -> Tensor:
    return read_sized_image(path, HEIGHT, WIDTH, "7-Scenes")


def _depth(path: Path, colour: Tensor) -> Tensor:
    millimetres = read_depth(path, 1.0)
    if tuple(millimetres.shape) != (HEIGHT, WIDTH):
        raise SceneError(f"Depth file {path} is {list(millimetres.shape)}, [{HEIGHT}, {WIDTH}] was wanted; restore it.")
    metres = torch.where(millimetres == _INVALID, 0.0, millimetres.double() / 1000)
    own = _intrinsics(DEPTH_FOCAL, 320.0, 240.0)
    return reproject_depth(metres, own, colour, _colour_from_depth(), (HEIGHT, WIDTH)).to(torch.float32)
