"""Images of cameras with lens distortion, brought to pinhole cameras through COLMAP's camera models.

The pinhole camera is the one COLMAP's own undistorter chooses: the focal lengths stay, and the image is made as
large or small as it has to be so that every one of its pixels sees the recorded image. Its size therefore differs a
little from the recorded one. A camera that is a pinhole already is left alone, and so are its images, bit for bit.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hess_plugin.exceptions import MissingDependency, SceneError

# Rows that are mapped at a time: a photograph of 24 megapixels has coordinates of several hundred megabytes.
_STRIP = 256
_OLDEST = (4, 2)  # cameras of older releases take other coordinates and do not tell whether they are pinholes


@dataclass(frozen=True)
class Lens:
    """A camera in COLMAP's terms.

    Attributes:
        model: COLMAP's name of the camera model, such as ``OPENCV`` or ``THIN_PRISM_FISHEYE``.
        width: columns of its images.
        height: rows of its images.
        params: of the model, in its order. Pixels as COLMAP counts them: the centre of the first one is at 0.5.
    """

    model: str
    width: int
    height: int
    params: tuple[float, ...]

    @property
    def pinhole(self) -> Pinhole:
        """The pinhole camera that `undistort_image` makes images of.

        Raises:
            SceneError: an unknown model, parameters that do not fit it, or no pinhole camera that sees the same.
            MissingDependency: when pycolmap is not installed.
        """
        return _undistorted(self)


@dataclass(frozen=True)
class Pinhole:
    """A camera without distortion: focal lengths and principal point in pixels, integer = pixel centre."""

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float

    @property
    def intrinsics(self) -> Tensor:
        """The same as `[3, 3]` float64."""
        return torch.tensor([[self.fx, 0, self.cx], [0, self.fy, self.cy], [0, 0, 1]], dtype=torch.float64)


def undistort_image(image: Tensor, lens: Lens, pinhole: Pinhole | None = None) -> Tensor:
    """What a pinhole camera in the same place sees.

    Args:
        image: `[C, H, W]`, any floating dtype, of `lens`.
        lens: its camera.
        pinhole: the camera wanted; None = ``lens.pinhole``.

    Returns:
        `[C, pinhole.height, pinhole.width]`, bilinear between pixel centres; black where the image does not reach.

    Raises:
        SceneError: when the image is not of the camera's size.
    """
    pinhole = pinhole or lens.pinhole
    _check_size("image", image, lens)
    if _is_same(lens, pinhole):
        return image
    flat, strips = image.flatten(1), []
    for u, v, inside in _sources(lens, pinhole):
        left, top = u.floor(), v.floor()
        right_share, low_share = (u - left).to(image.dtype), (v - top).to(image.dtype)
        columns = [(left + i).long().clamp(0, lens.width - 1) for i in (0, 1)]
        rows = [(top + i).long().clamp(0, lens.height - 1) * lens.width for i in (0, 1)]
        upper = torch.lerp(flat[:, rows[0] + columns[0]], flat[:, rows[0] + columns[1]], right_share)
        lower = torch.lerp(flat[:, rows[1] + columns[0]], flat[:, rows[1] + columns[1]], right_share)
        strips.append(torch.lerp(upper, lower, low_share) * inside)
    return torch.cat(strips, 1).view(-1, pinhole.height, pinhole.width)


def undistort_depth(depth: Tensor, lens: Lens, pinhole: Pinhole | None = None) -> Tensor:
    """The depth that a pinhole camera in the same place sees.

    Depth is z, along the axis that both cameras share, so it is moved and not rescaled.

    Args:
        depth: z-depth `[H, W]` on the pixels of `lens`, 0 = not known.
        lens: its camera.
        pinhole: the camera wanted; None = ``lens.pinhole``.

    Returns:
        `[pinhole.height, pinhole.width]`: the nearest pixel's depth, never a mean of two; 0 outside.

    Raises:
        SceneError: when the map is not of the camera's size.
    """
    pinhole = pinhole or lens.pinhole
    _check_size("depth", depth, lens)
    if _is_same(lens, pinhole):
        return depth
    flat, strips = depth.flatten(), []
    for u, v, inside in _sources(lens, pinhole):
        column, row = (u + 0.5).floor().long(), (v + 0.5).floor().long()
        index = row.clamp(0, lens.height - 1) * lens.width + column.clamp(0, lens.width - 1)
        strips.append(flat[index] * inside)
    return torch.cat(strips).view(pinhole.height, pinhole.width)


def import_pycolmap(step: str) -> Any:
    """The pycolmap module, or MissingDependency naming the step that needs it."""
    try:
        import pycolmap
    except ImportError as error:
        raise MissingDependency(f"{step} needs pycolmap: pip install pycolmap.") from error
    version = str(getattr(pycolmap, "__version__", "0"))
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < _OLDEST:
        wanted = ".".join(map(str, _OLDEST))
        raise MissingDependency(f"{step} needs pycolmap {wanted}, {version} is installed: pip install -U pycolmap.")
    return pycolmap


def _sources(lens: Lens, pinhole: Pinhole) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Where each pixel of the pinhole image lies in the recorded one: u, v and whether that is on it, by strips."""
    camera = _camera(lens)
    x = (np.arange(pinhole.width) - pinhole.cx) / pinhole.fx
    for start in range(0, pinhole.height, _STRIP):
        rows = np.arange(start, min(start + _STRIP, pinhole.height))
        rays = np.ones((len(rows) * pinhole.width, 3))
        rays[:, 0] = np.tile(x, len(rows))
        rays[:, 1] = np.repeat((rows - pinhole.cy) / pinhole.fy, pinhole.width)
        pixels: NDArray[np.float64] = camera.img_from_cam(rays) - 0.5  # COLMAP's pixel centres are at +0.5
        u, v = torch.from_numpy(pixels).unbind(1)
        # A pixel reaches half a pixel around its centre. Rays that the model cannot project come as NaN.
        inside = (u >= -0.5) & (u < lens.width - 0.5) & (v >= -0.5) & (v < lens.height - 0.5)
        yield u.where(inside, 0.0), v.where(inside, 0.0), inside


@functools.lru_cache(maxsize=4096)  # a model may have one camera an image, and each is asked for several times
def _undistorted(lens: Lens) -> Pinhole:
    pycolmap, camera = import_pycolmap("Removing lens distortion"), _camera(lens)
    if not camera.is_perspective():
        raise SceneError(f"A camera of model {lens.model} has no pinhole image; give images of another camera.")
    if not (camera.is_perspective_pinhole() and camera.is_undistorted()):
        camera = pycolmap.undistort_camera(pycolmap.UndistortCameraOptions(), camera)
    cx, cy = camera.principal_point_x - 0.5, camera.principal_point_y - 0.5
    return Pinhole(camera.width, camera.height, camera.focal_length_x, camera.focal_length_y, cx, cy)


def _camera(lens: Lens) -> Any:
    pycolmap = import_pycolmap("Removing lens distortion")
    if lens.model not in pycolmap.CameraModelId.__members__ or lens.model == "INVALID":
        raise SceneError(f"Camera model {lens.model!r} is not one that COLMAP knows; correct the camera.")
    camera = pycolmap.Camera(model=lens.model, width=lens.width, height=lens.height, params=list(lens.params))
    finite = all(map(math.isfinite, lens.params))
    if not camera.verify_params() or not finite or lens.width < 1 or lens.height < 1:
        raise SceneError(
            f"A camera of model {lens.model} is {lens.width}x{lens.height} with {len(lens.params)} parameters, wanted "
            f"are a size and finite {camera.params_info}; correct the camera."
        )
    return camera


def _is_same(lens: Lens, pinhole: Pinhole) -> bool:
    camera = _camera(lens)
    return bool(camera.is_perspective_pinhole() and camera.is_undistorted()) and lens.pinhole == pinhole


def _check_size(field: str, pixels: Tensor, lens: Lens) -> None:
    if tuple(pixels.shape[-2:]) != (lens.height, lens.width):
        raise SceneError(
            f"The {field} is {pixels.shape[-2]}x{pixels.shape[-1]}, its camera {lens.height}x{lens.width} (height x "
            "width); give the one that was calibrated."
        )
