"""The files of the MVSNet layout: cameras, pairs of views, depth maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hess_plugin.exceptions import SceneError
from hess_plugin.geometry import invert_rigid
from hess_plugin.scenes.formats.textfiles import read_lines, to_numbers, to_pose
from hess_plugin.scenes.images import read_mask, read_reals

SCALES = (1, 2, 4)
"""How many times larger than the map that the intrinsics are of the image may be."""

_RAW, _CROPPED = (1200, 1600), (512, 640)  # rows and columns of DTU's scans and of MVSNet's training images
_SEEN = 10  # of 255 in a depth_visual image, from where MVSNet takes the depth for known


def read_camera(path: Path, height: int, width: int, scale: int | None) -> tuple[Tensor, Tensor]:
    """A ``cam.txt``: camera-to-world `[4, 4]` and intrinsics `[3, 3]`, float64.

    The file holds the world-to-camera matrix, the intrinsics and a line on the range of depth (two to four numbers of
    several meanings, not used here). Its intrinsics are those of the image, or of the map of a half or a quarter of
    its sides that MVSNet computes depth on; the file does not say which. A map's pixel i is the image's pixel
    scale * i, as MVSNet makes it, so the first two rows are multiplied by the scale.

    Args:
        path: the file.
        height: rows of the image.
        width: columns of the image.
        scale: times the image is larger than the map; None = the one of `SCALES` that brings the principal point
            near the image's centre (an eighth of its sides), which at most one does.

    Raises:
        SceneError: when the file is damaged, or no scale fits.
    """
    words = [word for line in read_lines(path, "Camera") for word in line]
    if words[:1] != ["extrinsic"] or words[17:18] != ["intrinsic"]:
        raise SceneError(
            f"Camera file {path} does not have an extrinsic of 16 numbers and then an intrinsic; correct it."
        )
    w2c = to_pose(path, "extrinsic", to_numbers(path, "extrinsic", words[1:17], 16))
    k = torch.tensor(to_numbers(path, "intrinsic", words[18:27], 9), dtype=torch.float64).view(3, 3)
    rest = words[27:]
    if rest and not 2 <= len(rest) <= 4:
        raise SceneError(f"Camera file {path} has {len(rest)} numbers on its depth, 2 to 4 were wanted; correct it.")
    to_numbers(path, "depth range", rest, len(rest))
    scale = _fitting(path, k, height, width) if scale is None else scale
    k[:2] *= scale
    return invert_rigid(w2c), k


def read_pairs(path: Path) -> dict[int, list[int]]:
    """A ``pair.txt``: for every view the views to match it with, best score first.

    Raises:
        SceneError: when the file is missing or damaged.
    """
    lines = read_lines(path, "Pair")
    try:
        if len(lines[0]) != 1 or len(lines) != 1 + 2 * int(lines[0][0]):
            raise ValueError(f"{lines[0]} views are told, {(len(lines) - 1) / 2} are listed")
        return {int(_only(view)): _ranked(found) for view, found in zip(lines[1::2], lines[2::2], strict=True)}
    except (ValueError, IndexError) as error:
        raise SceneError(f"Pair file {path} is damaged ({error}); copy it again.") from error


def read_map(path: Path, mask: Path | None, height: int, width: int) -> Tensor:
    """Z-depth `[height, width]` float32 on the pixels of the image, 0 = not known.

    Args:
        path: PFM file of the image's size, or of a half or a quarter of its sides (the nearest value is taken), or of
            1600x1200 for a training image of 640x512, which is its middle after halving.
        mask: image of the same size, dark where depth is not known; or None.
        height: rows of the image.
        width: columns of the image.

    Raises:
        SceneError: when a file is damaged or of another size.
    """
    values = read_reals(path).astype(np.float32)
    known = np.isfinite(values) & (values > 0)
    if mask is not None:
        seen = read_mask(mask)
        if seen.shape != values.shape:
            raise SceneError(f"Mask file {mask} is {_size(seen)}, its depth is {_size(values)}; copy the two again.")
        known &= seen > _SEEN
    depth = _on_image(np.where(known, values, np.float32(0)), height, width)
    if depth is None:
        raise SceneError(f"Depth file {path} is {_size(values)}, its image is {height}x{width}; copy the two again.")
    return torch.from_numpy(np.ascontiguousarray(depth))


def _fitting(path: Path, k: Tensor, height: int, width: int) -> int:
    cx, cy = float(k[0, 2]), float(k[1, 2])
    for scale in SCALES:
        if abs(scale * cx - width / 2) <= width / 8 and abs(scale * cy - height / 2) <= height / 8:
            return scale
    raise SceneError(
        f"Camera file {path}: the principal point ({cx:g}, {cy:g}) is not near the centre of an image of "
        f"{height}x{width} (height x width), nor of a half or a quarter of it; say scale=1, 2 or 4 if it is right."
    )


def _on_image(depth: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32] | None:
    if depth.shape == (height, width):
        return depth
    if depth.shape == _RAW and (height, width) == _CROPPED:
        # Every other pixel, then 44 rows and 80 columns off each side: what was done to the training images.
        top, left = (_RAW[0] // 2 - height) // 2, (_RAW[1] // 2 - width) // 2
        return depth[::2, ::2][top : top + height, left : left + width]
    for scale in SCALES[1:]:
        if (depth.shape[0] * scale, depth.shape[1] * scale) == (height, width):
            rows, columns = (_nearest(size, scale) for size in depth.shape)
            return depth[rows][:, columns]
    return None


def _nearest(size: int, scale: int) -> NDArray[np.int64]:
    """For every pixel of the image the pixel of the map whose place in it, scale * i, is nearest."""
    return np.minimum((np.arange(size * scale) + scale // 2) // scale, size - 1)


def _only(words: Sequence[str]) -> str:
    (word,) = words
    return word


def _ranked(words: Sequence[str]) -> list[int]:
    count, found = int(words[0]), words[1:]
    if len(found) != 2 * count:
        raise ValueError(f"{count} views to match are told, {len(found) / 2} are listed")
    scores = [float(score) for score in found[1::2]]
    return [int(found[2 * i]) for i in sorted(range(count), key=lambda i: -scores[i])]


def _size(pixels: NDArray[np.generic]) -> str:
    return f"{pixels.shape[0]}x{pixels.shape[1]}"
