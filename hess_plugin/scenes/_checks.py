"""What a well-formed scene is: one check a field, each failing with a sentence that names scene and field."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hess_plugin.exceptions import SceneError

if TYPE_CHECKING:
    from hess_plugin.scenes.scene import Scene

# Poses come from text files and float32 tools; a real mistake (scaled, sheared, mirrored) is far larger.
ROTATION_TOLERANCE = 1e-3


def check_scene(scene: Scene) -> None:
    """Raise SceneError at the first field of `scene` that is malformed."""
    name, images = scene.name, scene.images
    check_images(name, images)
    views, _, height, width = images.shape
    check_poses(name, scene.c2w, views)
    check_intrinsics(name, scene.intrinsics, views)
    if scene.depth is not None:
        _check_shape(name, "depth", scene.depth, (views, height, width))
        _check_finite(name, "depth", scene.depth)
        if float(scene.depth.min()) < 0:
            raise SceneError(f"Scene {name}: depth has negative values; write 0 where depth is not known.")
    if scene.points is not None:
        _check_shape(name, "points", scene.points, (None, 3))
        _check_finite(name, "points", scene.points)
    if not 0 < scene.scale < float("inf"):
        raise SceneError(f"Scene {name}: scale is {scene.scale}, a positive number was wanted.")
    if scene.to_recorded is not None:
        _check_shape(name, "to_recorded", scene.to_recorded, (4, 4))


def check_images(name: str, images: Tensor) -> None:
    """Raise SceneError unless `images` is `[S, 3, H, W]` float32 in [0, 1]."""
    _check_shape(name, "images", images, (None, 3, None, None))
    if images.dtype != torch.float32:
        raise SceneError(f"Scene {name}: images are {images.dtype}, float32 was wanted: convert them.")
    _check_finite(name, "images", images)
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        raise SceneError(f"Scene {name}: images span [{low:.3g}, {high:.3g}], rescale them to [0, 1].")


def check_poses(name: str, c2w: Tensor, views: int) -> None:
    """Raise SceneError unless `c2w` is `[views, 4, 4]` of rigid transforms."""
    _check_shape(name, "c2w", c2w, (views, 4, 4))
    _check_finite(name, "c2w", c2w)
    pose = c2w.double()
    rotation = pose[:, :3, :3]
    identity = torch.eye(3, dtype=torch.float64, device=c2w.device)
    off = (rotation @ rotation.transpose(1, 2) - identity).abs().amax(dim=(1, 2))
    bad = (off > ROTATION_TOLERANCE) | (torch.linalg.det(rotation) <= 0)
    if bool(bad.any()):
        view = int(bad.nonzero()[0])
        raise SceneError(
            f"Scene {name}: c2w of view {view} has no rotation matrix (off by {float(off[view]):.3g}, "
            f"determinant {float(torch.linalg.det(rotation[view])):.3g}); make it orthonormal, right-handed."
        )
    last = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64, device=c2w.device)
    if not bool(((pose[:, 3] - last).abs() < 1e-6).all()):
        raise SceneError(f"Scene {name}: the last row of c2w is not 0 0 0 1; give camera-to-world matrices.")


def check_intrinsics(name: str, intrinsics: Tensor, views: int) -> None:
    """Raise SceneError unless `intrinsics` is `[views, 3, 3]` of pinhole matrices."""
    _check_shape(name, "intrinsics", intrinsics, (views, 3, 3))
    _check_finite(name, "intrinsics", intrinsics)
    k = intrinsics.double()
    pinhole = (k[:, 0, 0] > 0) & (k[:, 1, 1] > 0) & (k[:, 1, 0].abs() < 1e-6)
    last = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64, device=intrinsics.device)
    pinhole &= ((k[:, 2] - last).abs() < 1e-6).all(-1)
    if not bool(pinhole.all()):
        view = int((~pinhole).nonzero()[0])
        raise SceneError(
            f"Scene {name}: intrinsics of view {view} are not a pinhole matrix "
            "[[fx, s, cx], [0, fy, cy], [0, 0, 1]] with positive focal lengths; give one in pixels."
        )


def _check_shape(name: str, field: str, tensor: Tensor, wanted: tuple[int | None, ...]) -> None:
    fits = len(wanted) == tensor.ndim and all(
        size >= 1 and (want is None or want == size) for want, size in zip(wanted, tensor.shape, strict=False)
    )
    if not fits:
        shape = ", ".join("n" if want is None else str(want) for want in wanted)
        given = list(tensor.shape)
        raise SceneError(f"Scene {name}: {field} has shape {given}, [{shape}] with n >= 1 was wanted.")
    if not tensor.is_floating_point():
        raise SceneError(f"Scene {name}: {field} is {tensor.dtype}, a floating type was wanted.")


def _check_finite(name: str, field: str, tensor: Tensor) -> None:
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise SceneError(f"Scene {name}: {field} has {bad} values that are not finite; remove them.")
