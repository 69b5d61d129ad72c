"""A COLMAP model, text or binary, read through pycolmap after its files were found whole."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hess_plugin.exceptions import SceneError
from hess_plugin.geometry import invert_rigid
from hess_plugin.scenes.formats.distortion import Lens, import_pycolmap

FILES = ("cameras", "images", "points3D")


@dataclass(frozen=True, eq=False)
class Posed:
    """One registered image.

    Attributes:
        name: the image's path, relative to the folder of images.
        c2w: camera-to-world `[4, 4]` float64, OpenCV axes.
        lens: its camera.
    """

    name: str
    c2w: Tensor
    lens: Lens


def is_model(folder: Path) -> bool:
    """Whether a folder looks like a COLMAP model: it has cameras, text or binary."""
    return any((folder / f"cameras{suffix}").is_file() for suffix in (".bin", ".txt"))


def registered_images(folder: Path) -> list[Posed]:
    """The registered images of a model, sorted by name.

    Raises:
        SceneError: naming the file that is missing or damaged.
        MissingDependency: when pycolmap is not installed.
    """
    model = _read_model(folder)
    lenses = {
        number: Lens(camera.model_name, camera.width, camera.height, tuple(map(float, camera.params)))
        for number, camera in model.cameras.items()
    }
    found = []
    for image in model.images.values():
        if image.has_pose:  # COLMAP writes no others today
            c2w = torch.eye(4, dtype=torch.float64)
            c2w[:3] = torch.from_numpy(image.cam_from_world().matrix())
            found.append(Posed(_name(folder, image), invert_rigid(c2w), lenses[image.camera_id]))
    return sorted(found, key=lambda posed: posed.name)


def triangulated_points(folder: Path, track: int = 2) -> Tensor:
    """The points of a model `[M, 3]` float32 in its world frame, in the order of their ids.

    Args:
        folder: the model.
        track: number of images a point must be seen in.

    Raises:
        SceneError: naming the file that is missing or damaged, or when no point is seen that often.
        MissingDependency: when pycolmap is not installed.
    """
    points = _read_model(folder).points3D
    kept = [points[number].xyz for number in sorted(points) if points[number].track.length() >= track]
    if not kept:
        raise SceneError(f"COLMAP model {folder} has no point seen in {track} images; ask for a shorter track.")
    return torch.from_numpy(np.array(kept)).to(torch.float32)


def has_points(folder: Path) -> bool:
    """Whether a model has points at all, from the first bytes of its file; exports of other tools often have none."""
    binary, text = folder / "points3D.bin", folder / "points3D.txt"
    if _is_binary(folder):
        with binary.open("rb") as file:
            return file.read(8) != bytes(8)
    if not text.is_file():
        return False
    with text.open(encoding="utf-8", errors="replace") as lines:
        return any(line.strip() and not line.startswith("#") for line in lines)


def _name(folder: Path, image: Any) -> str:
    try:
        return str(image.name)
    except UnicodeDecodeError as error:
        raise SceneError(f"COLMAP model {folder} has an image name that is not UTF-8; rename that image.") from error


def _is_binary(folder: Path) -> bool:
    return all((folder / f"{name}.bin").is_file() for name in FILES)


def _read_model(folder: Path) -> Any:
    """The model as pycolmap's Reconstruction.

    pycolmap fills cameras that a file cut short lacks with whatever memory holds, and where points or frames are cut
    short it allocates until no memory is left: that the files are whole is made sure of here.
    """
    pycolmap = import_pycolmap("Reading a COLMAP model")
    suffix = ".bin" if _is_binary(folder) else ".txt"
    _check_complete(folder, suffix)
    if suffix == ".bin":
        for name, size in _SIZES.items():
            if (path := folder / f"{name}.bin").is_file():
                _check_whole(path, size)
    try:
        model = pycolmap.Reconstruction(str(folder))
    except (ValueError, IndexError, RuntimeError, MemoryError, OSError) as error:
        cause = " ".join(str(error).split())
        raise SceneError(f"COLMAP model {folder} cannot be read ({cause}); copy it again.") from error
    if suffix == ".txt":
        held = {"cameras": len(model.cameras), "images": len(model.images), "points3D": len(model.points3D)}
        for name, number in held.items():
            _check_stated(folder / f"{name}.txt", number)
    return model


def _check_complete(folder: Path, suffix: str) -> None:
    missing = [f"{name}{suffix}" for name in FILES if not (folder / f"{name}{suffix}").is_file()]
    if missing:
        raise SceneError(f"COLMAP model {folder} has no {missing[0]}; give a folder with {', '.join(FILES)}.")
    extra = [name for name in ("rigs", "frames") if (folder / f"{name}{suffix}").is_file()]
    if len(extra) == 1:
        other = {"rigs": "frames", "frames": "rigs"}[extra[0]]
        raise SceneError(f"COLMAP model {folder} has {extra[0]}{suffix} and no {other}{suffix}; copy it again.")


def _check_stated(path: Path, held: int) -> None:
    """COLMAP's text files say in a comment how many entries follow; one that is cut at a line's end is still text."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.startswith("#"):
                return
            _, found, rest = line.partition("Number of ")
            number = rest.partition(":")[2].partition(",")[0].strip()
            if found and number.isdigit() and int(number) != held:
                raise SceneError(f"COLMAP file {path} holds {held} of {number} entries; copy it again.")


def _check_whole(path: Path, size: Callable[[bytes, int], int]) -> None:
    """Walk through a binary file's entries by their sizes."""
    data = path.read_bytes()
    try:
        (count,) = struct.unpack_from("<Q", data)
        offset = 8
        for _ in range(count):
            offset = size(data, offset)
    except (struct.error, ValueError, OverflowError) as error:
        raise SceneError(f"COLMAP file {path} ends in the middle of an entry; copy it again.") from error
    if offset != len(data):
        raise SceneError(f"COLMAP file {path} has {len(data)} bytes, its entries take {offset}; copy it again.")


def _after_camera(data: bytes, offset: int) -> int:
    """Id, model, width, height; then as many parameters as the model has."""
    _, model, _, _ = struct.unpack_from("<IiQQ", data, offset)
    pycolmap = import_pycolmap("Reading a COLMAP model")
    known = {int(value): value for value in pycolmap.CameraModelId.__members__.values()}
    if model not in known or known[model] == pycolmap.CameraModelId.INVALID:
        raise ValueError(f"camera model {model} is not known")
    return offset + 24 + 8 * len(pycolmap.Camera.create_from_model_id(0, known[model], 1.0, 1, 1).params)


def _after_image(data: bytes, offset: int) -> int:
    """Id, pose and camera; the name up to a zero; number of observations, 24 bytes each."""
    observations = data.index(b"\0", offset + 64) + 1
    (count,) = struct.unpack_from("<Q", data, observations)
    return observations + 8 + 24 * int(count)


def _after_point(data: bytes, offset: int) -> int:
    """Id, position, colour and error; number of images that see it, 8 bytes each."""
    (count,) = struct.unpack_from("<Q", data, offset + 43)
    return offset + 51 + 8 * int(count)


def _after_rig(data: bytes, offset: int) -> int:
    """Id, number of sensors; the first of them, 8 bytes; the others, each with a pose or without."""
    (count,) = struct.unpack_from("<I", data, offset + 4)
    offset += 8 + 8 * min(int(count), 1)
    for _ in range(1, count):
        (has_pose,) = struct.unpack_from("<B", data, offset + 8)
        offset += 9 + 56 * bool(has_pose)
    return offset


def _after_frame(data: bytes, offset: int) -> int:
    """Id, rig and pose; number of images, 16 bytes each."""
    (count,) = struct.unpack_from("<I", data, offset + 64)
    return offset + 68 + 16 * int(count)


_SIZES: dict[str, Callable[[bytes, int], int]] = {
    "cameras": _after_camera,
    "images": _after_image,
    "points3D": _after_point,
    "rigs": _after_rig,
    "frames": _after_frame,
}
