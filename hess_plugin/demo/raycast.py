"""Analytic ray casting against the inside of a box and against spheres and upright boxes, in NumPy.

Arrays are component-major (`[3, n]`): NumPy reduces a short first axis far faster than a short last one.
Ray directions have unit camera depth, so the ray parameter of a hit is its z-depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hess_plugin.demo.textures import FloatArray, Texture

_NEAREST = np.float32(0.05)
# A direction component of exactly 0 would divide to inf and, with a zero numerator, to NaN depth.
_SMALLEST_SLOPE = np.float32(1e-6)


@dataclass(frozen=True)
class Sphere:
    """A textured ball: centre `[3]` and radius, metres."""

    centre: FloatArray
    radius: float
    texture: Texture

    @property
    def extent(self) -> float:
        """Radius of the bounding sphere."""
        return self.radius


@dataclass(frozen=True)
class Box:
    """A textured box turned about the vertical: centre `[3]`, half sizes `[3]` in metres, yaw in radians."""

    centre: FloatArray
    half: FloatArray
    yaw: float
    texture: Texture

    @property
    def extent(self) -> float:
        """Radius of the bounding sphere."""
        return float(np.linalg.norm(self.half))


@dataclass(frozen=True)
class Room:
    """Six textured walls (half sizes `[3]`, floor at z = 0), some solids, and the direction of the light."""

    half: FloatArray
    walls: tuple[Texture, ...]
    solids: tuple[Sphere | Box, ...]
    light: FloatArray


class _Hits:
    """Nearest hit so far of every ray: depth, normal and which surface."""

    def __init__(self, room: Room, origins: FloatArray, directions: FloatArray) -> None:
        steady = _away_from_zero(directions)
        centre = np.array([0.0, 0.0, room.half[2]], np.float32)[:, None]
        exits = (np.sign(steady) * room.half[:, None] - (origins - centre)) / steady
        axis = exits.argmin(axis=0)
        rays = np.arange(axis.size)
        side = np.sign(steady[axis, rays])
        self.origins, self.directions = origins, directions
        self.depth = exits[axis, rays]
        self.surface = (axis * 2 + (side > 0)).astype(np.int16)
        self.normal = np.zeros_like(directions)
        self.normal[axis, rays] = -side

    def add_sphere(self, sphere: Sphere, surface: int) -> None:
        offset = self.origins - sphere.centre[:, None]
        half_b = (offset * self.directions).sum(axis=0)
        a = (self.directions * self.directions).sum(axis=0)
        discriminant = half_b * half_b - a * ((offset * offset).sum(axis=0) - np.float32(sphere.radius**2))
        depth = (-half_b - np.sqrt(np.maximum(discriminant, 0))) / a
        hit = np.flatnonzero((discriminant > 0) & (depth > _NEAREST) & (depth < self.depth))
        self.depth[hit], self.surface[hit] = depth[hit], surface
        self.normal[:, hit] = (offset[:, hit] + depth[hit] * self.directions[:, hit]) / np.float32(sphere.radius)

    def add_box(self, box: Box, surface: int) -> None:
        cos, sin = np.cos(box.yaw), np.sin(box.yaw)
        to_local = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], np.float32)
        origins = to_local @ (self.origins - box.centre[:, None])
        directions = _away_from_zero(to_local @ self.directions)
        reach = np.sign(directions) * box.half[:, None]
        entry, leave = (-reach - origins) / directions, (reach - origins) / directions
        depth = entry.max(axis=0)
        hit = np.flatnonzero((depth < leave.min(axis=0)) & (depth > _NEAREST) & (depth < self.depth))
        self.depth[hit], self.surface[hit] = depth[hit], surface
        axis, rays = entry[:, hit].argmax(axis=0), np.arange(hit.size)
        normal = np.zeros((3, hit.size), np.float32)
        normal[axis, rays] = -np.sign(directions[axis, hit])
        self.normal[:, hit] = to_local.T @ normal


def cast(room: Room, origins: FloatArray, directions: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Colour and depth of the first surface along each ray.

    Args:
        room: the room; every origin must be inside it.
        origins: ray origins `[3, n]`, metres, world frame (z up).
        directions: ray directions `[3, n]` in the world frame, of unit camera depth.

    Returns:
        Colours `[3, n]` in 0 to 1 and z-depths `[n]` in metres, all finite and positive.
    """
    hits = _Hits(room, origins, directions)
    for index, solid in enumerate(room.solids):
        if isinstance(solid, Sphere):
            hits.add_sphere(solid, 6 + index)
        else:
            hits.add_box(solid, 6 + index)
    points = origins + directions * hits.depth
    colours = np.empty_like(points)
    for surface, texture in enumerate((*room.walls, *(solid.texture for solid in room.solids))):
        seen = np.flatnonzero(hits.surface == surface)
        if seen.size:
            colours[:, seen] = texture.colours(points[:, seen])
    colours *= np.float32(0.75) + np.float32(0.25) * (room.light @ hits.normal)
    return np.clip(colours, 0, 1, out=colours), hits.depth


def _away_from_zero(directions: FloatArray) -> FloatArray:
    tiny = np.abs(directions) < _SMALLEST_SLOPE
    return np.where(tiny, np.copysign(_SMALLEST_SLOPE, directions), directions) if tiny.any() else directions
