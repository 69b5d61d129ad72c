"""A scene: images with true cameras, and true depth or a true point cloud where they are known."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hess_plugin.exceptions import SceneError
from hess_plugin.framing import Framing, Placement
from hess_plugin.geometry import invert_rigid, unproject
from hess_plugin.scenes._checks import check_scene
from hess_plugin.scenes.pictures import Pictures
from hess_plugin.scenes.placing import place


@dataclass(frozen=True, eq=False)
class Scene(Pictures):
    """Images of one scene with their ground truth, checked on construction.

    Attributes:
        name: shown in messages and recorded in profiles.
        images: `[S, 3, H, W]` float32 RGB in [0, 1].
        c2w: camera-to-world poses `[S, 4, 4]`, OpenCV axes.
        intrinsics: `[S, 3, 3]` in pixels, integer coordinate = pixel centre, no distortion.
        depth: z-depth `[S, H, W]` in the units of the poses, 0 = not known; or None.
        points: true point cloud `[M, 3]` in the world frame; or None.
        scale: length of one unit of this scene in the unit it was read in (1 until `normalised`).
        to_recorded: `[4, 4]` float64 on the CPU, maps world coordinates of this scene to those it was read in, unit
            included; None where they are the same (until `normalised`).

    Raises:
        SceneError: naming the scene and the field that is wrong.
    """

    name: str
    images: Tensor
    c2w: Tensor
    intrinsics: Tensor
    depth: Tensor | None = None
    points: Tensor | None = None
    scale: float = 1.0
    to_recorded: Tensor | None = None

    def __post_init__(self) -> None:
        check_scene(self)

    @property
    def centres(self) -> Tensor:
        """True camera centres `[S, 3]`."""
        return self.c2w[:, :3, 3]

    def world_points(self) -> tuple[Tensor, Tensor] | None:
        """World point of every pixel `[S, H, W, 3]` and where it is known, bool `[S, H, W]`, or None."""
        if self.depth is None:
            return None
        return unproject(self.depth, self.intrinsics, self.c2w), self.depth > 0

    def cloud(self) -> Tensor | None:
        """The true cloud `[M, 3]`: `points` if there are any, else the unprojected depth, else None."""
        if self.points is not None:
            return self.points
        return self._depth_cloud()

    def _depth_cloud(self) -> Tensor | None:
        known = self.world_points()
        if known is None or not bool(known[1].any()):
            return None
        return known[0][known[1]]

    def unit_length(self) -> float:
        """Mean distance of true points to the first camera, or of the other cameras where no point is known.

        Unprojected depth is used before `points`, as in VGGT's training convention.

        Raises:
            SceneError: when there is nothing to measure: no depth, no points, and all cameras in one place.
        """
        cloud = self._depth_cloud()
        if cloud is None:
            cloud = self.points
        if cloud is None:
            cloud = self.centres[1:]
        length = 0.0
        if len(cloud):
            length = float((cloud.double() - self.centres[0].to(cloud.device).double()).norm(dim=-1).mean())
        if not length > 0:
            raise SceneError(
                f"Scene {self.name} has no size: it has no depth, no points and no two distinct "
                "camera centres; give it depth, points or more views."
            )
        return length

    def normalised(self) -> Scene:
        """The scene in its first camera's frame with `unit_length` 1; `scale` and `to_recorded` lead back."""
        length = self.unit_length()
        to_first = invert_rigid(self.c2w[0].double())
        # The inverse of what is applied: the recorded pose itself is not quite rigid where it comes from text.
        back = torch.linalg.inv(to_first.cpu())
        back[:3, :3] *= length
        c2w = to_first @ self.c2w.double()
        c2w[:, :3, 3] /= length
        points = None
        if self.points is not None:
            frame = to_first.to(self.points.device)
            moved = (self.points.double() @ frame[:3, :3].T + frame[:3, 3]) / length
            points = moved.to(self.points.dtype)
        return replace(
            self,
            c2w=c2w.to(self.c2w.dtype),
            depth=None if self.depth is None else self.depth / length,
            points=points,
            scale=self.scale * length,
            to_recorded=back if self.to_recorded is None else self.to_recorded @ back,
        )

    def subset(self, indices: Sequence[int] | Tensor) -> Scene:
        """The scene seen from some of its views, in the given order; `points` stay whole.

        Raises:
            SceneError: when no view is asked for or an index does not exist.
        """
        chosen = [int(i) for i in indices]
        wrong = [i for i in chosen if not -self.views <= i < self.views]
        if wrong or not chosen:
            what = f"view {wrong[0]}" if wrong else "no view"
            raise SceneError(f"Scene {self.name} has {self.views} views, {what} was asked for.")
        index = torch.tensor(chosen)
        return replace(
            self,
            images=self.images[index],
            c2w=self.c2w[index],
            intrinsics=self.intrinsics[index],
            depth=None if self.depth is None else self.depth[index],
        )

    def resized(self, height: int, width: int) -> Scene:
        """The scene at another resolution; see `place` for what happens to each field."""
        if height < 1 or width < 1:
            raise SceneError(f"Scene {self.name} cannot be resized to {height}x{width}: give sides >= 1.")
        return self._placed(Placement(height, width, 0, 0, height, width))

    def framed(self, framing: Framing) -> Scene:
        """The scene at a size that a model takes; see `place` for what happens to each field."""
        return self._placed(framing.place(self.height, self.width))

    def _placed(self, placement: Placement) -> Scene:
        images, intrinsics, depth = place(placement, self.images, self.intrinsics, self.depth)
        return replace(self, images=images, intrinsics=intrinsics, depth=depth)

    def digest(self) -> str:
        """A digest of everything in the scene but its name: 16 hexadecimal digits, the same wherever it lies."""
        digest = hashlib.blake2b(digest_size=8)
        for tensor in (self.images, self.c2w, self.intrinsics, self.depth, self.points):
            if tensor is None:
                digest.update(b"none")
            else:
                digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Scene:
        """The scene with every tensor on `device`."""
        moved = {name: getattr(self, name).to(device) for name in ("images", "c2w", "intrinsics")}
        for name in ("depth", "points"):
            tensor = getattr(self, name)
            moved[name] = None if tensor is None else tensor.to(device)
        return replace(self, **moved)
