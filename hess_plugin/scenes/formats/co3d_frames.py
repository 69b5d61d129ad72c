"""One frame record of CO3D (v1 and v2): its camera with OpenCV axes, its depth and its masks.

CO3D records cameras in the convention of PyTorch3D: row vectors, ``x_camera = x_world @ R + T``, with x to the left
and y up, and lengths in the image as parts of half its side, counted to the left and up from its centre.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hess_plugin.exceptions import SceneError
from hess_plugin.geometry import invert_rigid
from hess_plugin.scenes._checks import ROTATION_TOLERANCE
from hess_plugin.scenes.images import read_image, read_mask, read_words
from hess_plugin.scenes.sources import View

ISOTROPIC = "ndc_isotropic"
BY_SIDE = "ndc_norm_image_bounds"
"""What the lengths of a camera are parts of: half the shorter side (CO3D v2), or half of each axis' own (v1)."""


@dataclass(frozen=True)
class Frame:
    """One record of frame_annotations.jgz.

    Attributes:
        record: what the file holds for the frame; keys that are not known are passed over.
        told: file, sequence and frame, as messages begin.
        root: folder that the paths in the record are relative to.
    """

    record: Mapping[str, Any]
    told: str
    root: Path

    def view(self, foreground: bool = False) -> View:
        """The frame as a view; its files are opened later.

        Args:
            foreground: keep depth only where the object is, by the frame's mask.

        Raises:
            SceneError: naming the file, the sequence, the frame and the field that is wrong.
        """
        size = self._size()
        image = self._file("image", "path")
        c2w, intrinsics = self._pose(), self._intrinsics(*size)
        return View(
            str(image), functools.partial(self._read_image, image, size), c2w, intrinsics, self._depth(foreground)
        )

    def _pose(self) -> Tensor:
        rotation, shift = self._numbers("R", 3, 3), self._numbers("T", 3)
        off = float((rotation @ rotation.T - torch.eye(3, dtype=torch.float64)).abs().max())
        if off > ROTATION_TOLERANCE or float(torch.linalg.det(rotation)) <= 0:
            raise SceneError(
                f"{self.told}: viewpoint.R is no rotation (off by {off:.3g}, determinant "
                f"{float(torch.linalg.det(rotation)):.3g}); correct it or leave the sequence out."
            )
        turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))  # x left, y up to x right, y down
        w2c = torch.eye(4, dtype=torch.float64)
        w2c[:3, :3] = turn @ rotation.T
        w2c[:3, 3] = turn @ shift
        return invert_rigid(w2c)

    def _intrinsics(self, height: int, width: int) -> Tensor:
        focal, centre = self._numbers("focal_length", 2), self._numbers("principal_point", 2)
        if not bool((focal > 0).all()):
            raise SceneError(
                f"{self.told}: viewpoint.focal_length is {focal.tolist()}, two positive numbers were wanted."
            )
        form = self._part("viewpoint").get("intrinsics_format", BY_SIDE)  # v1 has no such key
        side = torch.tensor([width, height], dtype=torch.float64)
        if form == ISOTROPIC:
            unit = side.min().expand(2) / 2
        elif form == BY_SIDE:
            unit = side / 2
        else:
            raise SceneError(
                f"{self.told}: viewpoint.intrinsics_format is {form!r}, {ISOTROPIC} or {BY_SIDE} was wanted."
            )
        intrinsics = torch.diag(torch.cat([focal * unit, torch.ones(1, dtype=torch.float64)]))
        # PyTorch3D counts from the image's corner, so the first pixel's centre is at 0.5; here it is at 0.
        intrinsics[:2, 2] = side / 2 - centre * unit - 0.5
        return intrinsics

    def _depth(self, foreground: bool) -> functools.partial[Tensor] | None:
        if self.record.get("depth") is None:
            return None
        scale = self._part("depth").get("scale_adjustment")
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < float("inf"):
            raise SceneError(f"{self.told}: depth.scale_adjustment is {scale!r}, a positive number was wanted.")
        masks = []
        if self._part("depth").get("mask_path") is not None:
            masks.append((self._file("depth", "mask_path"), 1))
        if foreground:
            # The mask is the chance of the object being there, 255 = certain: more than one half.
            masks.append((self._file("mask", "path"), 128))
        return functools.partial(read_depth, self._file("depth", "path"), float(scale), masks)

    def _read_image(self, path: Path, size: tuple[int, int]) -> Tensor:
        image = read_image(path)
        if tuple(image.shape[1:]) != size:
            raise SceneError(
                f"{self.told}: image.size is {list(size)} (height, width), {path} is {list(image.shape[1:])}; its "
                "camera would be wrong, so restore the image at its recorded size."
            )
        return image

    def _part(self, field: str) -> Mapping[str, Any]:
        part = self.record.get(field)
        if not isinstance(part, dict):
            raise SceneError(f"{self.told}: {field} is {part!r}, a record was wanted; download the annotations again.")
        return part

    def _file(self, part: str, field: str) -> Path:
        name = self._part(part).get(field)
        if not isinstance(name, str) or not name:
            raise SceneError(f"{self.told}: {part}.{field} is {name!r}, a file name was wanted.")
        return self.root / name

    def _size(self) -> tuple[int, int]:
        size = self._part("image").get("size")
        if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
            raise SceneError(f"{self.told}: image.size is {size!r}, [height, width] in pixels was wanted.")
        return size[0], size[1]

    def _numbers(self, field: str, *shape: int) -> Tensor:
        value = self._part("viewpoint").get(field)
        wanted = "x".join(str(side) for side in shape)
        try:
            numbers = torch.tensor(value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise SceneError(f"{self.told}: viewpoint.{field} is not {wanted} numbers.") from error
        if tuple(numbers.shape) != shape:
            raise SceneError(f"{self.told}: viewpoint.{field} has shape {list(numbers.shape)}, {wanted} was wanted.")
        if not bool(torch.isfinite(numbers).all()):
            raise SceneError(f"{self.told}: viewpoint.{field} has values that are not finite; leave the sequence out.")
        return numbers


def read_depth(path: Path, scale: float, masks: list[tuple[Path, int]]) -> Tensor:
    """A depth file of CO3D as `[H, W]` float32 z-depth, 0 = not known.

    Args:
        path: 16-bit PNG; the bits of each value are those of a 16-bit float, not an integer to be divided.
        scale: factor from the values to the units of the poses.
        masks: files of the same size, each with the smallest value at which depth is kept.

    Raises:
        SceneError: when a file is missing, damaged or of another size.
    """
    halves = torch.from_numpy(read_words(path).view(np.float16)).float() * scale
    depth = torch.where(torch.isfinite(halves) & (halves > 0), halves, 0.0)
    for file, least in masks:
        mask = read_mask(file)
        if mask.shape != depth.shape:
            raise SceneError(
                f"Mask file {file} is {mask.shape[0]}x{mask.shape[1]}, the depth {path} is "
                f"{depth.shape[0]}x{depth.shape[1]}; the two must have one size."
            )
        depth[torch.from_numpy(mask < least)] = 0
    return depth
