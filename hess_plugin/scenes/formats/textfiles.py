"""What the readers of several formats share: scene folders, numbers in text files, images of a stated size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hess_plugin.exceptions import SceneError
from hess_plugin.scenes.images import read_image

# Published poses are often rounded, or come from a fusion that let them drift; a transposed or scaled matrix is
# far beyond this.
_NEARLY_A_ROTATION = 0.05


def scene_folders(root: Path, is_scene: Callable[[Path], bool], wanted: str) -> list[Path]:
    """The scene folders at `root`: itself, or those of its children that are one, sorted by name.

    Args:
        root: an existing folder.
        is_scene: tells a scene's folder by what is in it.
        wanted: what a scene's folder holds, for the message.

    Raises:
        SceneError: when there is none.
    """
    if is_scene(root):
        return [root]
    found = sorted(child for child in root.iterdir() if child.is_dir() and is_scene(child)) if root.is_dir() else []
    if not found:
        raise SceneError(f"Folder {root} holds no scene: neither it nor a folder in it has {wanted}.")
    return found


def read_lines(path: Path, kind: str = "Scene") -> list[list[str]]:
    """The words of every line of a text file that is neither blank nor a ``#`` comment.

    Raises:
        SceneError: when the file is missing or not text.
    """
    if not path.is_file():
        raise SceneError(f"{kind} file {path} does not exist; restore it.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SceneError(f"{kind} file {path} cannot be read as text ({error}); copy it again.") from error
    lines = (line.split() for line in text.splitlines())
    return [words for words in lines if words and not words[0].startswith("#")]


def to_numbers(path: Path, field: str, words: Sequence[str], count: int) -> list[float]:
    """Exactly `count` finite numbers.

    Raises:
        SceneError: naming the file and the field, when there are more, fewer or others.
    """
    try:
        numbers = [float(word) for word in words]
    except ValueError as error:
        raise SceneError(f"Scene file {path}: {field} is not {count} numbers ({error}); correct it.") from error
    if len(numbers) != count:
        raise SceneError(f"Scene file {path}: {field} has {len(numbers)} numbers, {count} were wanted; correct it.")
    if not all(math.isfinite(number) for number in numbers):
        raise SceneError(f"Scene file {path}: {field} has values that are not finite; leave it out or correct it.")
    return numbers


def to_pose(path: Path, field: str, numbers: Sequence[float]) -> Tensor:
    """Sixteen numbers, row by row, as a rigid transform `[4, 4]` float64 with an exact rotation.

    Recorded rotations are seldom orthonormal to the last digit: the nearest rotation is taken.

    Raises:
        SceneError: when the matrix is not nearly a rigid transform.
    """
    pose = torch.tensor(numbers, dtype=torch.float64).view(4, 4)
    rotation, last = pose[:3, :3], torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    off = float((rotation @ rotation.T - torch.eye(3, dtype=torch.float64)).abs().max())
    if off > _NEARLY_A_ROTATION or float(torch.linalg.det(rotation)) <= 0 or not torch.allclose(pose[3], last):
        raise SceneError(
            f"Scene file {path}: {field} is not a rigid transform (its rotation is off by {off:.3g}); leave it out "
            "or correct it."
        )
    u, _, vh = torch.linalg.svd(rotation)
    pose[:3, :3], pose[3] = u @ vh, last
    return pose


def read_sized_image(path: Path, height: int, width: int, told_by: str) -> Tensor:
    """An image `[3, height, width]` whose camera was calibrated at that size.

    Args:
        path: the image file.
        height: rows that the camera has.
        width: columns that the camera has.
        told_by: who says so, for the message.

    Raises:
        SceneError: when the image is missing, damaged or of another size.
    """
    image = read_image(path)
    if tuple(image.shape[1:]) != (height, width):
        raise SceneError(
            f"Image file {path} is {image.shape[1]}x{image.shape[2]} (height x width), {told_by} says "
            f"{height}x{width}; its intrinsics would be wrong, so give the images that were calibrated."
        )
    return image
