"""A small synthetic scene, and the real ones where they are present."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pycolmap
import pytest
import torch

from hess_plugin.demo.raycast import cast
from hess_plugin.demo.rooms import _sample_room, render_room
from hess_plugin.geometry import invert_rigid, quaternion_to_matrix
from hess_plugin.scenes import Scene
from hess_plugin.scenes.formats.distortion import Lens

MakeScene = Callable[..., Scene]


def random_poses(views: int, seed: int) -> torch.Tensor:
    """`[views, 4, 4]` float64 poses with any rotation."""
    generator = torch.Generator().manual_seed(seed)
    c2w = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1)
    c2w[:, :3, :3] = quaternion_to_matrix(torch.randn(views, 4, generator=generator, dtype=torch.float64))
    c2w[:, :3, 3] = torch.randn(views, 3, generator=generator, dtype=torch.float64)
    return c2w


@pytest.fixture(scope="session")
def samples() -> Path:
    """The folder of small real samples of scene formats: HESS_TEST_SAMPLES, or shared/samples beside the repository."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "samples"
    folder = Path(os.environ.get("HESS_TEST_SAMPLES") or beside)
    if not folder.is_dir():
        pytest.skip(f"no samples of scene formats in {folder}: set HESS_TEST_SAMPLES to a folder that has some")
    return folder


@pytest.fixture
def make_scene() -> MakeScene:
    """Build a scene of random images, poses and depth; a tenth of the depth is not known."""

    def make(
        views: int = 3,
        height: int = 12,
        width: int = 16,
        depth: bool = True,
        points: bool = False,
        seed: int = 0,
    ) -> Scene:
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(views, 3, height, width, generator=generator)
        known = torch.rand(views, height, width, generator=generator)
        distance = torch.where(known < 0.1, 0.0, 1 + 2 * known)
        focal = 0.9 * width
        intrinsics = torch.tensor(
            [[focal, 0.0, width / 2 - 0.5], [0.0, 1.1 * focal, height / 2 - 0.7], [0.0, 0.0, 1.0]],
            dtype=torch.float64,
        ).repeat(views, 1, 1)
        cloud = 2 * torch.randn(50, 3, generator=generator) if points else None
        return Scene(f"made-{seed}", images, random_poses(views, seed), intrinsics, distance if depth else None, cloud)

    return make


def lens_rays(lens: Lens) -> np.ndarray:
    """Rays `[H, W, 3]` with z = 1 through the pixels of a camera with a lens."""
    camera = pycolmap.Camera(model=lens.model, width=lens.width, height=lens.height, params=lens.params)
    v, u = np.mgrid[: lens.height, : lens.width] + 0.5
    flat = camera.cam_from_img(np.stack([u.ravel(), v.ravel()], -1))
    return np.concatenate([flat, np.ones((len(flat), 1))], -1).reshape(lens.height, lens.width, 3)


class Studio:
    """A synthetic room that any camera can be put into, with a lens of any kind."""

    def __init__(self, seed: int, views: int) -> None:
        self._room = _sample_room(np.random.default_rng(seed))  # the room that render_room(seed) stands its cameras in
        c2w = torch.from_numpy(render_room(seed, views, image_size=8).c2w).double()
        u, _, vh = torch.linalg.svd(c2w[:, :3, :3])  # from float32 to exact rotations
        c2w[:, :3, :3] = u @ vh
        self.c2w = c2w

    def shoot(self, c2w: torch.Tensor, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Image `[H, W, 3]` uint8 and z-depth `[H, W]` float32 along rays `[H, W, 3]` of a camera, z = 1."""
        directions = c2w[:3, :3].numpy() @ rays.reshape(-1, 3).T
        origins = np.repeat(c2w[:3, 3:].numpy(), directions.shape[1], axis=1)
        colours, depth = cast(self._room, origins.astype(np.float32), directions.astype(np.float32))
        image = (colours.T * np.float32(255) + np.float32(0.5)).astype(np.uint8)
        return image.reshape(rays.shape), depth.reshape(rays.shape[:2])

    def through(self, c2w: torch.Tensor, lens: Lens) -> tuple[np.ndarray, np.ndarray]:
        """What a camera with a lens sees."""
        return self.shoot(c2w, lens_rays(lens))

    def world(self, c2w: torch.Tensor, lens: Lens, depth: np.ndarray) -> np.ndarray:
        """World points `[H * W, 3]` of the depth that a camera with a lens sees."""
        return (lens_rays(lens) * depth[..., None]).reshape(-1, 3) @ c2w[:3, :3].numpy().T + c2w[:3, 3].numpy()

    def write_model(self, folder: Path, lens: Lens, names: list[str], points: np.ndarray) -> None:
        """COLMAP's text files: all points are seen in the first two images, the first half of them also in the third.

        Images and camera are numbered against the order of the names.
        """
        folder.mkdir(parents=True)
        numbers = " ".join(map(repr, lens.params))
        (folder / "cameras.txt").write_text(
            f"# Number of cameras: 1\n7 {lens.model} {lens.width} {lens.height} {numbers}\n"
        )
        images = [f"# Number of images: {len(names)}, mean observations per image: 1"]
        for i, (name, w2c) in enumerate(zip(names, invert_rigid(self.c2w).numpy(), strict=True)):
            x, y, z, w = pycolmap.Rotation3d(w2c[:3, :3]).quat
            place = " ".join(repr(float(number)) for number in (w, x, y, z, *w2c[:3, 3]))
            images.append(f"{10 - i} {place} 7 {name}")
            seen = range(len(points) if i < 2 else len(points) // 2)
            images.append(" ".join(f"1.5 2.5 {number + 100}" for number in seen))
        (folder / "images.txt").write_text("\n".join(images) + "\n")
        entries = [f"# Number of points: {len(points)}, mean track length: 2.5"]
        for number, (x, y, z) in enumerate(points):
            track = " ".join(f"{10 - i} {number}" for i in range(3 if number < len(points) // 2 else 2))
            entries.append(f"{number + 100} {float(x)!r} {float(y)!r} {float(z)!r} 1 2 3 0.5 {track}")
        (folder / "points3D.txt").write_text("\n".join(entries) + "\n")

    def pinhole(self, c2w: torch.Tensor, k: torch.Tensor, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """What a camera with intrinsics `k` and no lens distortion sees."""
        v, u = np.mgrid[:height, :width]
        return self.shoot(c2w, np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(k.numpy()).T)

    def misfit(self, scene: Scene, shift: float = 0.0) -> tuple[float, float]:
        """How far a scene is from what its own cameras see.

        The mean over pixels of the colours' difference (grey values), the median of the depth's (per cent), of the
        worst view. With `shift`, the cameras' principal points are moved so many pixels: what a wrong convention costs.
        """
        colours, depths = [], []
        for i in range(scene.views):
            k = scene.intrinsics[i].clone()
            k[:2, 2] += shift
            image, depth = self.pinhole(scene.c2w[i], k, scene.height, scene.width)
            off = scene.images[i].permute(1, 2, 0).numpy() * 255 - image
            colours.append(float(np.mean(np.abs(off))))
            if scene.depth is not None:
                known = scene.depth[i].numpy() > 0
                assert known.mean() > 0.5
                off = np.abs(scene.depth[i].numpy() - depth)[known] / depth[known]
                depths.append(float(100 * np.median(off)))
        return max(colours), max(depths, default=0.0)


@pytest.fixture(scope="session")
def studio() -> Studio:
    """A room with three poses in it."""
    return Studio(seed=11, views=3)
