"""Cameras and similarity transforms: the one place where coordinate conventions live.

Camera poses are camera-to-world matrices `c2w [..., 4, 4]` with OpenCV axes (x right, y down, z forward)
acting on column vectors. Pixel coordinates are integers at pixel centres, depth is z-depth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _outside_autocast(function: _Function) -> _Function:
    """Coordinates need every digit: under autocast each matrix product here would be rounded to half precision."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        device = next(a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return cast(_Function, guarded)


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precisions carry too few digits for coordinates: compute in float32 and cast back."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@dataclass(frozen=True, eq=False)
class Similarity:
    """The map `x -> scale * rotation @ x + translation`.

    Attributes:
        scale: float64, 0-d, positive.
        rotation: float64 `[3, 3]`, a proper rotation.
        translation: float64 `[3]`, in the units of the target.
    """

    scale: Tensor
    rotation: Tensor
    translation: Tensor

    @classmethod
    def identity(cls) -> Similarity:
        """The map that changes nothing."""
        one = torch.ones((), dtype=torch.float64)
        return cls(one, torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))

    @classmethod
    def from_matrix(cls, matrix: Tensor) -> Similarity:
        """Read a `[4, 4]` matrix whose upper left block is a positive multiple of a rotation."""
        matrix = matrix.to(torch.float64)
        scale = torch.linalg.det(matrix[:3, :3]) ** (1.0 / 3.0)
        return cls(scale, matrix[:3, :3] / scale, matrix[:3, 3].clone())

    @_outside_autocast
    def apply(self, points: Tensor) -> Tensor:
        """Map points.

        Args:
            points: `[..., 3]`, any floating dtype and device; gradient flows through them, not the map.

        Returns:
            `[..., 3]` in the dtype and on the device of `points`.
        """
        dtype = _working_dtype(points.dtype)
        linear = (self.scale * self.rotation).to(points.device, dtype)
        shift = self.translation.to(points.device, dtype)
        return (points.to(dtype) @ linear.T + shift).to(points.dtype)

    @_outside_autocast
    def apply_poses(self, c2w: Tensor) -> Tensor:
        """Map camera poses `[..., 4, 4]`: centres move with the map, axes only turn and stay rotations."""
        rotation = self.rotation.to(c2w.device, c2w.dtype) @ c2w[..., :3, :3]
        top = torch.cat([rotation, self.apply(c2w[..., :3, 3])[..., None]], dim=-1)
        return torch.cat([top, c2w[..., 3:, :]], dim=-2)

    def compose(self, other: Similarity) -> Similarity:
        """The map that applies `other` first and this one after it."""
        return Similarity(
            self.scale * other.scale,
            self.rotation @ other.rotation,
            self.scale * (self.rotation @ other.translation) + self.translation,
        )

    def inverse(self) -> Similarity:
        """The map that undoes this one."""
        rotation = self.rotation.T
        return Similarity(1.0 / self.scale, rotation, -(rotation @ self.translation) / self.scale)

    def matrix(self) -> Tensor:
        """The same map as a float64 `[4, 4]` matrix on homogeneous column vectors."""
        matrix = torch.eye(4, dtype=torch.float64)
        matrix[:3, :3] = self.scale * self.rotation
        matrix[:3, 3] = self.translation
        return matrix


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Rotation matrices of quaternions.

    Args:
        quaternion: `[..., 4]` as (x, y, z, w), scalar last, of any non-zero length: the length is divided
            out, as model heads predict quaternions that are not normalised.

    Returns:
        `[..., 3, 3]`, differentiable.
    """
    x, y, z, w = quaternion.unbind(-1)
    two = 2.0 / (quaternion * quaternion).sum(-1)
    rows = (
        (1 - two * (y * y + z * z), two * (x * y - z * w), two * (x * z + y * w)),
        (two * (x * y + z * w), 1 - two * (x * x + z * z), two * (y * z - x * w)),
        (two * (x * z - y * w), two * (y * z + x * w), 1 - two * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


@_outside_autocast
def invert_rigid(pose: Tensor) -> Tensor:
    """Inverse of rigid transforms `[..., 4, 4]` by transposing the rotation: exact and differentiable."""
    rotation = pose[..., :3, :3].transpose(-1, -2)
    translation = -(rotation @ pose[..., :3, 3:])
    return torch.cat([torch.cat([rotation, translation], dim=-1), pose[..., 3:, :]], dim=-2)


@_outside_autocast
def to_world(points: Tensor, c2w: Tensor) -> Tensor:
    """World coordinates of points given in the frame of their camera.

    Args:
        points: `[S, ..., 3]`, one set for each camera.
        c2w: camera-to-world `[S, 4, 4]`.

    Returns:
        `[S, ..., 3]`, differentiable in both.
    """
    flat = points.flatten(1, -2)
    return (flat @ c2w[:, :3, :3].mT + c2w[:, None, :3, 3]).view_as(points)


@_outside_autocast
def unproject(depth: Tensor, intrinsics: Tensor, c2w: Tensor) -> Tensor:
    """World points of depth maps.

    Args:
        depth: z-depth `[S, H, W]`; pixel `[s, v, u]` is seen along the ray through `(u, v)` exactly.
        intrinsics: `[S, 3, 3]` in pixels.
        c2w: camera-to-world `[S, 4, 4]`.

    Returns:
        `[S, H, W, 3]` in the dtype of `depth`, differentiable in all three.
    """
    height, width = depth.shape[-2:]
    dtype, device = depth.dtype, depth.device
    rows = torch.arange(height, dtype=dtype, device=device)
    columns = torch.arange(width, dtype=dtype, device=device)
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], dim=-1)
    to_ray = c2w[:, :3, :3] @ torch.linalg.inv(intrinsics.to(c2w))
    rays = torch.einsum("sij,hwj->shwi", to_ray.to(device, dtype), pixels)
    return depth[..., None] * rays + c2w[:, None, None, :3, 3].to(device, dtype)


@_outside_autocast
def project(points: Tensor, intrinsics: Tensor, c2w: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels and depth at which cameras see world points.

    Args:
        points: world points `[S, ..., 3]`, one set for each camera.
        intrinsics: `[S, 3, 3]` in pixels.
        c2w: camera-to-world `[S, 4, 4]`.

    Returns:
        Pixels `[S, ..., 2]` as (u, v) and z-depth `[S, ...]`. Points behind a camera have negative depth.
    """
    flat = points.reshape(points.shape[0], -1, 3)
    w2c = invert_rigid(c2w).to(points.device, points.dtype)
    camera = flat @ w2c[:, :3, :3].transpose(1, 2) + w2c[:, None, :3, 3]
    image = camera @ intrinsics.to(points.device, points.dtype).transpose(1, 2)
    pixels = image[..., :2] / image[..., 2:]
    return pixels.reshape(*points.shape[:-1], 2), camera[..., 2].reshape(points.shape[:-1])
