"""Scenes as they are recorded: what a reader of one format finds, before any image is opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hess_plugin.exceptions import SceneError
from hess_plugin.framing import Framing, Placement, padded
from hess_plugin.scenes.choice import choose
from hess_plugin.scenes.image_set import ImageSet
from hess_plugin.scenes.placing import place
from hess_plugin.scenes.scene import Scene


@dataclass(frozen=True, eq=False)
class View:
    """One image of a recorded scene; its files are opened when they are asked for.

    Attributes:
        name: shown in messages; the image file.
        image: reads `[3, H, W]` float32 RGB in [0, 1], without lens distortion.
        c2w: camera-to-world `[4, 4]` float64, OpenCV axes; None where nothing is known.
        intrinsics: `[3, 3]` float64 in pixels of what `image` reads, integer coordinate = pixel centre; or None.
        depth: reads z-depth `[H, W]` float32 on the image's grid, 0 = not known; or None.
    """

    name: str
    image: Callable[[], Tensor]
    c2w: Tensor | None = None
    intrinsics: Tensor | None = None
    depth: Callable[[], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class SceneSource:
    """One recorded scene.

    Attributes:
        name: of the scene, unique within what one reader finds.
        where: the file or folder it is recorded in, for messages.
        views: lists its views, in recorded order.
        points: reads the true cloud `[M, 3]` in the world frame; or None.
    """

    name: str
    where: Path
    views: Callable[[], Sequence[View]]
    points: Callable[[], Tensor] | None = None

    def read(self, *, max_views: int | None = None, seed: int = 0, framing: Framing | None = None) -> Scene | ImageSet:
        """Read the scene, one image at full size at a time.

        Args:
            max_views: at most so many views, drawn at random with `seed` and kept in recorded order; None = all.
            seed: chooses the views; the same seed chooses the same views.
            framing: size wanted by the model; None keeps the images' own, which must then be one size.

        Returns:
            A `Scene`; an `ImageSet` where no view has a camera.

        Raises:
            SceneError: naming the file and the field that is wrong.
        """
        views = list(self.views())
        if not views:
            raise SceneError(f"Scene {self.name} has no view; give a scene with images.")
        views = [views[i] for i in choose(len(views), max_views, seed)]
        frames = [_framed(view, framing) for view in views]
        if framing is not None:
            frames = _one_size(frames)
        images = [frame.image for frame in frames]
        for view, image in zip(views, images, strict=True):
            if image.shape != images[0].shape:
                raise SceneError(
                    f"Image file {view.name} is {image.shape[1]}x{image.shape[2]}, the first image is "
                    f"{images[0].shape[1]}x{images[0].shape[2]}; all images of a scene need one size."
                )
        if all(view.c2w is None for view in views):
            return ImageSet(self.name, torch.stack(images))
        points = None if self.points is None else self.points()
        c2w = torch.stack([_known(view, "c2w", view.c2w) for view in views])
        intrinsics = torch.stack([_known(v, "intrinsics", f.intrinsics) for v, f in zip(views, frames, strict=True)])
        depth = _stacked([frame.depth for frame in frames], images[0].shape[1:])
        try:
            return Scene(self.name, torch.stack(images), c2w, intrinsics, depth, points)
        except SceneError as error:
            raise SceneError(f"{self.where}: {error}") from error


@dataclass(frozen=True, eq=False)
class _Frame:
    """One view at the size the model wants."""

    image: Tensor
    intrinsics: Tensor | None
    depth: Tensor | None
    placement: Placement


def _framed(view: View, framing: Framing | None) -> _Frame:
    image = view.image()
    depth = None if view.depth is None else view.depth()
    height, width = int(image.shape[1]), int(image.shape[2])
    if depth is not None and depth.shape != image.shape[1:]:
        raise SceneError(
            f"The depth of {view.name} is {depth.shape[0]}x{depth.shape[1]}, its image is {height}x{width}; the two "
            "must have one size."
        )
    whole = Placement(height, width, 0, 0, height, width)
    return _moved(
        _Frame(image, view.intrinsics, depth, whole), whole if framing is None else framing.place(height, width)
    )


def _moved(frame: _Frame, placement: Placement) -> _Frame:
    intrinsics = torch.eye(3, dtype=torch.float64) if frame.intrinsics is None else frame.intrinsics
    depth = None if frame.depth is None else frame.depth[None]
    image, moved, depth = place(placement, frame.image[None], intrinsics[None], depth)
    known = None if frame.intrinsics is None else moved[0]
    return _Frame(image[0], known, None if depth is None else depth[0], placement)


def _one_size(frames: list[_Frame]) -> list[_Frame]:
    """White bars around the smaller images of a sequence in which, say, some were taken upright."""
    rows = max(int(frame.image.shape[1]) for frame in frames)
    columns = max(int(frame.image.shape[2]) for frame in frames)
    result = []
    for frame in frames:
        height, width = int(frame.image.shape[1]), int(frame.image.shape[2])
        placement = padded(Placement(height, width, 0, 0, height, width), rows, columns)
        result.append(frame if (height, width) == (rows, columns) else _moved(frame, placement))
    return result


def _known(view: View, field: str, value: Tensor | None) -> Tensor:
    if value is None:
        raise SceneError(f"View {view.name} has no {field}, other views of its scene have; leave it out.")
    return value


def _stacked(depths: list[Tensor | None], size: torch.Size) -> Tensor | None:
    if all(depth is None for depth in depths):
        return None
    return torch.stack([torch.zeros(size) if depth is None else depth for depth in depths])
