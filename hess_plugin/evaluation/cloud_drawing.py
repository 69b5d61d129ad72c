"""Drawing clouds: a virtual camera a little behind and above a true one, nearer points over farther ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hess_plugin.exceptions import SceneError

from .canvas import new_figure, plain, save_figure
from .cloud_picture import Clouds

COLOUR = "#E6009E"  # seldom in photographs, and told from grey with any colour vision
_BACK, _UP = 0.45, 0.25  # of the distance to what is looked at
_NEAR = 0.6  # of the way back: what lies between the virtual camera and the true one would hide the scene
_KEPT = 0.96  # share of points that has to be in the picture
_ASPECT = 3 / 4
_FILLED = 0.5  # area of all dots, of that of the picture


@dataclass(frozen=True, eq=False)
class View:
    """A pinhole camera: `w2c [4, 4]`, nearest depth that is drawn, and half the picture's width at depth 1."""

    w2c: Tensor
    near: float
    half_width: float

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Picture coordinates ``[n, 2]`` (x right, y down, -1 to 1 across the width) and depth ``[n]``."""
        camera = points.double() @ self.w2c[:3, :3].T + self.w2c[:3, 3]
        depth = camera[:, 2]
        return camera[:, :2] / (depth.clamp(min=1e-9)[:, None] * self.half_width), depth


def virtual_view(c2w: Tensor, points: Tensor) -> View:
    """Choose a camera that sees what most true cameras see.

    It stands behind and above the true camera that is nearest to all others, looks at the median of the points that
    lie before that camera, and opens until it sees nearly all of them.

    Args:
        c2w: true cameras ``[S, 4, 4]``.
        points: ``[n, 3]`` in the same frame.

    Raises:
        SceneError: there is no point before that camera.
    """
    c2w = c2w.double()
    centres, points = c2w[:, :3, 3], points.double()
    chosen = c2w[int(torch.cdist(centres, centres).sum(1).argmin())]
    local = (points - chosen[:3, 3]) @ chosen[:3, :3]
    before = (local[:, 2] > 0) & (local[:, :2].abs().amax(1) < local[:, 2])
    if not bool(before.any()):
        raise SceneError("no point of the cloud lies before the cameras; there is nothing to draw.")
    target = points[before].median(0).values
    distance = float(local[before, 2].median())
    up = -c2w[:, :3, 1].mean(0)
    up = up / up.norm().clamp(min=1e-9)
    position = chosen[:3, 3] + distance * (_UP * up - _BACK * chosen[:3, 2])
    view = View(_looking(position, target, up), _NEAR * _BACK * distance, 1.0)
    pixels, depth = view.project(points[before])
    pixels = pixels[depth > view.near]
    reach = torch.maximum(pixels[:, 0].abs(), pixels[:, 1].abs() / _ASPECT)
    return View(view.w2c, view.near, float(reach.quantile(_KEPT)) if len(reach) else 1.0)


def _muted(colours: Tensor) -> Tensor:
    """Image colours ``[n, 3]`` with a third of their saturation, so that no image has the colour of what is off."""
    return 0.3 * colours + 0.7 * (0.1 + 0.8 * colours.mean(1, keepdim=True))


def _looking(position: Tensor, target: Tensor, up: Tensor) -> Tensor:
    """World-to-camera matrix, OpenCV axes."""
    forward = torch.nn.functional.normalize(target - position, dim=0)
    right = torch.linalg.cross(forward, up)
    if float(right.norm()) < 1e-6:  # looking straight along `up`: any side will do
        right = torch.linalg.cross(forward, torch.eye(3, dtype=up.dtype)[int(forward.abs().argmin())])
    right = torch.nn.functional.normalize(right, dim=0)
    w2c = torch.eye(4, dtype=torch.float64)
    w2c[:3, :3] = torch.stack([right, torch.linalg.cross(forward, right), forward])
    w2c[:3, 3] = -w2c[:3, :3] @ position
    return w2c


def draw_clouds(clouds: Clouds | str | Path, path: str | Path, threshold: float | None = None) -> None:
    """Draw the clouds side by side from one virtual camera.

    Points that are off by more than the threshold are coloured, the others have the colour of the image, muted; the
    share of coloured points is in each title. All arms are seen by the camera that was chosen for the first.

    Args:
        clouds: the clouds, or the file that holds them.
        path: PNG file to write.
        threshold: in the clouds' unit; their own by default.

    Raises:
        SceneError: the file is damaged, or there is nothing to draw.
    """
    from matplotlib.colors import to_rgb

    clouds = clouds if isinstance(clouds, Clouds) else Clouds.load(clouds)
    threshold = clouds.threshold if threshold is None else threshold
    view = virtual_view(clouds.tensors["c2w"], clouds.part(0, "points"))
    figure = new_figure(4.2 * len(clouds.arms), 4.2 * _ASPECT + 0.45)
    axes = figure.subplots(1, len(clouds.arms), squeeze=False)[0]
    for index, (axis, arm) in enumerate(zip(axes, clouds.arms, strict=True)):
        pixels, depth = view.project(clouds.part(index, "points"))
        seen = (depth > view.near) & (pixels[:, 0].abs() <= 1) & (pixels[:, 1].abs() <= _ASPECT)
        order = seen.nonzero()[:, 0][depth[seen].argsort(descending=True, stable=True)]
        colours = _muted(clouds.part(index, "colours").double() / 255)
        colours[clouds.part(index, "errors") > threshold] = torch.tensor(to_rgb(COLOUR), dtype=torch.float64)
        size = min(max(_FILLED * (4.2 * 72) ** 2 * _ASPECT / max(len(order), 1), 1.5), 20.0)
        axis.scatter(*pixels[order].T.numpy(), c=colours[order].numpy(), s=size, linewidths=0)
        axis.set(xlim=(-1, 1), ylim=(_ASPECT, -_ASPECT), xticks=[], yticks=[], facecolor="0.94")
        axis.set_aspect("equal")
        axis.set_title(f"{plain(arm)}: {clouds.share_off(index, threshold):.1%} coloured", fontsize=12)
    save_figure(figure, path)
