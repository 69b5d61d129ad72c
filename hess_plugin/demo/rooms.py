"""Synthetic rooms: deterministic textured scenes with exact cameras and depth, ray cast in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hess_plugin.demo.raycast import Box, Room, Sphere, cast
from hess_plugin.demo.textures import FloatArray, random_texture

if TYPE_CHECKING:
    from hess_plugin.scenes.scene import Scene

IMAGE_SIZE = 60
FIELD_OF_VIEW = np.deg2rad(62.0)
SECTOR_RANGE = (20.0, 80.0)
SPLITS = {
    "train": range(0, 10_000_000),
    "validation": range(10_000_000, 11_000_000),
    "calibration": range(20_000_000, 21_000_000),
    "test": range(30_000_000, 31_000_000),
    "hall-calibration": range(40_000_000, 41_000_000),
    "hall-test": range(50_000_000, 51_000_000),
}
"""Disjoint seed ranges: a scene's seed says which split it belongs to. Splits ``hall-...`` are of `HALLS`."""

Extent = tuple[float, float, float]


@dataclass(frozen=True)
class RoomKind:
    """What rooms of one kind are drawn from; ranges are inclusive low to high, lengths in metres.

    Attributes:
        half: half sizes of the room.
        wall_scale: factor on the wavelengths of the walls' textures.
        boxes: number of boxes.
        box_half: half sizes of a box.
        spheres: number of spheres.
        radius: of a sphere.
    """

    half: tuple[Extent, Extent] = ((2.0, 2.0, 1.2), (2.6, 2.6, 1.6))
    wall_scale: float = 1.0
    boxes: tuple[int, int] = (2, 4)
    box_half: tuple[Extent, Extent] = ((0.2, 0.2, 0.2), (0.45, 0.45, 0.6))
    spheres: tuple[int, int] = (1, 3)
    radius: tuple[float, float] = (0.2, 0.42)


ROOMS = RoomKind()
"""What the demo model was trained on."""
HALLS = RoomKind(
    half=((3.0, 3.0, 1.8), (4.0, 4.0, 2.4)),
    wall_scale=2.5,
    boxes=(5, 8),
    box_half=((0.1, 0.1, 0.1), (0.3, 0.3, 0.3)),
    spheres=(4, 7),
    radius=(0.1, 0.25),
)
"""Another family of scenes: larger and plainer rooms with many small solids, which the model never saw in training."""

_CLEARANCE = 0.25
_ATTEMPTS = 30


@dataclass(frozen=True)
class RenderedRoom:
    """Views of one room as plain arrays.

    Attributes:
        images: `[S, H, W, 3]` uint8.
        depth: z-depth `[S, H, W]` float32, metres, valid everywhere.
        c2w: camera-to-world `[S, 4, 4]` float32, OpenCV axes; the world has z up.
        intrinsics: `[S, 3, 3]` float32, pixels, integer coordinates at pixel centres.
        sector: width of the arc the cameras stand on, degrees.
    """

    images: np.ndarray
    depth: FloatArray
    c2w: FloatArray
    intrinsics: FloatArray
    sector: float


def seeds(split: str, count: int) -> range:
    """The first `count` seeds of a split, a name of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if not 0 <= count <= len(SPLITS[split]):
        raise ValueError(f"{count} seeds asked of split {split!r}, which has {len(SPLITS[split])}: ask for fewer")
    return SPLITS[split][:count]


def render_room(
    seed: int, views: int = 16, *, image_size: int = IMAGE_SIZE, sector: float | None = None, kind: RoomKind = ROOMS
) -> RenderedRoom:
    """Render one room; the same arguments always give the same arrays.

    Args:
        seed: any integer >= 0; see `SPLITS` for the ranges set aside.
        views: number of cameras, >= 1.
        image_size: height and width in pixels.
        sector: arc the cameras stand on, degrees; drawn from `SECTOR_RANGE` when not given.
        kind: what the room is drawn from.
    """
    rng = np.random.default_rng(seed)
    room = _sample_room(rng, kind)
    drawn = rng.uniform(*SECTOR_RANGE)
    sector = drawn if sector is None else sector
    c2w = _sample_cameras(rng, room, views, sector)
    intrinsics = _intrinsics(image_size)
    rays = _camera_rays(intrinsics, image_size)
    directions = np.einsum("sij,jp->isp", c2w[:, :3, :3], rays).reshape(3, -1)
    origins = np.repeat(c2w[:, :3, 3].T, rays.shape[1], axis=1)
    colours, depth = cast(room, origins, directions)
    shape = (views, image_size, image_size)
    return RenderedRoom(
        images=(colours.T * np.float32(255) + np.float32(0.5)).astype(np.uint8).reshape(*shape, 3),
        depth=depth.reshape(shape),
        c2w=c2w,
        intrinsics=np.repeat(intrinsics[None], views, axis=0),
        sector=float(sector),
    )


def kind_of(seed: int) -> RoomKind:
    """The kind of room that a seed's split holds."""
    return HALLS if any(seed in range_ for split, range_ in SPLITS.items() if split.startswith("hall")) else ROOMS


def make_scene(seed: int, views: int = 16, *, image_size: int = IMAGE_SIZE, sector: float | None = None) -> Scene:
    """Render one room as a `Scene` with depth ground truth, of the kind that its split holds.

    Arguments as for `render_room`.
    """
    import torch

    from hess_plugin.scenes.scene import Scene

    room = render_room(seed, views, image_size=image_size, sector=sector, kind=kind_of(seed))
    return Scene(
        name=f"room-{seed}",
        images=torch.from_numpy(room.images).permute(0, 3, 1, 2).float() / 255,
        c2w=torch.from_numpy(room.c2w),
        intrinsics=torch.from_numpy(room.intrinsics),
        depth=torch.from_numpy(room.depth),
        points=None,
        scale=1.0,
    )


def _sample_room(rng: np.random.Generator, kind: RoomKind = ROOMS) -> Room:
    half = rng.uniform(*kind.half).astype(np.float32)
    solids: list[Sphere | Box] = []
    for _ in range(rng.integers(kind.boxes[0], kind.boxes[1] + 1)):
        size = rng.uniform(*kind.box_half).astype(np.float32)
        centre = np.array([*rng.uniform(-0.9, 0.9, 2), size[2]], np.float32)
        solids.append(Box(centre, size, float(rng.uniform(0, np.pi)), random_texture(rng, 0.7)))
    for _ in range(rng.integers(kind.spheres[0], kind.spheres[1] + 1)):
        radius = float(rng.uniform(*kind.radius))
        centre = np.array([*rng.uniform(-0.9, 0.9, 2), radius + rng.uniform(0, 0.8)], np.float32)
        solids.append(Sphere(centre, radius, random_texture(rng, 0.7)))
    light = rng.normal(size=3)
    light[2] = abs(light[2]) + 0.5
    light = (light / np.linalg.norm(light)).astype(np.float32)
    return Room(half, tuple(random_texture(rng, kind.wall_scale) for _ in range(6)), tuple(solids), light)


def _sample_cameras(rng: np.random.Generator, room: Room, views: int, sector: float) -> FloatArray:
    start = rng.uniform(0, 360)
    poses = []
    for _ in range(views):
        best, best_clearance = np.zeros(3), -np.inf
        for _ in range(_ATTEMPTS):
            azimuth, radius = np.deg2rad(start + rng.uniform(-0.5, 0.5) * sector), rng.uniform(1.25, 1.85)
            centre = np.array([radius * np.cos(azimuth), radius * np.sin(azimuth), rng.uniform(0.5, 1.9)])
            clearance = min(float(np.linalg.norm(centre - s.centre)) - s.extent for s in room.solids)
            if clearance > best_clearance:
                best, best_clearance = centre, clearance
            if clearance > _CLEARANCE:
                break
        target = np.array([0, 0, 0.6]) + rng.uniform(-0.35, 0.35, 3)
        poses.append(_look_at(best, target, np.deg2rad(5 * rng.normal())))
    return np.stack(poses).astype(np.float32)


def _look_at(centre: np.ndarray, target: np.ndarray, roll: float) -> np.ndarray:
    forward = (target - centre) / np.linalg.norm(target - centre)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    cos, sin = np.cos(roll), np.sin(roll)
    c2w = np.eye(4)
    c2w[:3, :3] = np.stack([right, down, forward], axis=1) @ [[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]
    c2w[:3, 3] = centre
    return c2w


def _intrinsics(image_size: int) -> FloatArray:
    focal = image_size / 2 / np.tan(FIELD_OF_VIEW / 2)
    middle = (image_size - 1) / 2
    return np.array([[focal, 0, middle], [0, focal, middle], [0, 0, 1]], np.float32)


def _camera_rays(intrinsics: FloatArray, image_size: int) -> FloatArray:
    pixels = np.arange(image_size, dtype=np.float32)
    x = (pixels - intrinsics[0, 2]) / intrinsics[0, 0]
    y = (pixels - intrinsics[1, 2]) / intrinsics[1, 1]
    return np.stack([np.tile(x, image_size), np.repeat(y, image_size), np.ones(image_size**2, np.float32)])
