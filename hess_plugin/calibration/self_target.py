"""Errors without ground truth: the model's own prediction is the target, the residual is drawn instead of measured.

HeSS scores a head by ``E |J^T r|^2``: ``J`` is the derivative of cameras and points by the head's query projection,
``r`` what is left between prediction and truth after alignment (the empirical Fisher information, HeSS, appendix D).
Without a truth ``r`` is drawn from a model of such residuals, which makes the trace that of a true Fisher information;
the derivative stays the model's own. The model says three things.

- A reconstruction errs by whole views. View v is displaced by a small similarity about its camera: the point ``x`` by
  ``t_v + w_v x (x - c_v) + s_v (x - c_v)``, the camera ``c_v`` by ``t_v``, with ``t_v``, ``w_v`` and ``s_v`` standard
  normal and independent. The unit of length is the median distance of points from their cameras, so all three count.
- Only the way to the surface counts, as where the error is the distance to the nearest true point: the residual of a
  point is its displacement along ``n``, the normal of the predicted surface (point-to-plane, Chen and Medioni 1992).
- What alignment would take away is no error: the similarity, common to all views, that explains most of the points'
  residuals is fitted to them and taken out of points and cameras alike.

With the residuals ``r_x`` (a number) and ``r_c`` (a vector) held constant the errors are

    e_pc  = 1 / (2 |I|) sum_I ( n . (x - stop(x)) + r_x )^2
    e_cam = 1 / (2 N)   sum_v | c_v - stop(c_v) + r_c |^2

so their gradients are ``J^T r``; their values say nothing about the model. The size of the residuals cancels in the
score. There is one draw a scene; more scenes average more draws. Assumed are that neighbouring points of a view lie on
one surface, and that truth would be known up to about `FAR` times the median distance: the sky has none.

Measured on the demo model alone (benchmarks/ground_truth_free.py): heads rank as by the ground truth of other rooms,
about as closely as ground truth itself does. Residuals in all directions rank the heads that matter for points wrongly.
Residuals against the prediction of changed images or weights do as well where they are taken along normals, and cost
another forward and a strength to choose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hess_plugin.exceptions import CalibrationError
from hess_plugin.predictions import Prediction
from hess_plugin.scenes.image_set import ImageSet

from .errors import MAX_POINTS, Errors, at_least_float32
from .sampling import subsample

FAR = 4.0
LEAST = 16
_FLAT = 1e-4  # sine between two tangents below which they span no plane


@dataclass(frozen=True, eq=False)
class Surface:
    """Predicted points that have a normal. All but `points` are constants on the CPU, so the same for any device.

    Attributes:
        points: `[n, 3]`, on the device of the prediction and with its graph.
        at: the same as float64, in units.
        normals: `[n, 3]` float64, of length 1.
        views: view of each point, `[n]`.
        centres: camera centres `[S, 3]` float64, in units.
        unit: length of the unit in the prediction's own.
    """

    points: Tensor
    at: Tensor
    normals: Tensor
    views: Tensor
    centres: Tensor
    unit: float


def image_seed(images: Tensor) -> int:
    """A seed for images `[S, 3, H, W]`: the same wherever they lie, whatever they are called and come after."""
    return int(ImageSet("seed", images).digest(), 16) >> 1  # generators take 63 bits


def self_errors(
    prediction: Prediction, *, name: str, seed: int, max_points: int | None = MAX_POINTS, far: float = FAR
) -> Errors:
    """Errors of a prediction against itself, displaced at random.

    Args:
        prediction: of two views or more; its graph is kept.
        name: of the scene, for messages.
        seed: of the displacement and of subsampling; drawn on the CPU, so the same on every device.
        max_points: at most so many predicted points enter the point error; None = all.
        far: points farther from their camera than so many medians are left out.

    Returns:
        Both errors; `inliers` is the number of points used.

    Raises:
        CalibrationError: one view, values that are not finite, or fewer than `LEAST` usable points.
    """
    with torch.autocast(prediction.points.device.type, enabled=False):
        _check(prediction, name)
        surface = predicted_surface(prediction, seed=seed, max_points=max_points, far=far)
        count = len(surface.points)
        if count < LEAST:
            raise CalibrationError(
                f"{name} has {count} predicted points of confidence >= {prediction.min_confidence:g} on a surface, too "
                "few to calibrate by; lower the adapter's threshold or give images of more than sky."
            )
        views = prediction.c2w.shape[0]
        generator = torch.Generator().manual_seed(seed)
        moves, shifts = displace(surface, torch.randn(views, 7, generator=generator, dtype=torch.float64))
        for_points, for_cameras = take_out_similarity(surface, (moves * surface.normals).sum(-1), shifts)
        moved = ((surface.points - surface.points.detach()) * surface.normals.to(surface.points)).sum(-1)
        points = (moved / surface.unit + for_points.to(moved)).square().sum() / (2 * count)
        centres = at_least_float32(prediction.centres)
        shifted = (centres - centres.detach()) / surface.unit + for_cameras.to(centres)
        return Errors(shifted.square().sum() / (2 * views), points, None, count)


def predicted_surface(prediction: Prediction, *, seed: int, max_points: int | None, far: float) -> Surface:
    """Choose confident points that are not too far, and find the normals of the surface that they lie on.

    A normal is the cross product of the central differences along rows and columns of the point map.
    """
    grid, centres = prediction.points.detach(), prediction.centres.detach().to("cpu", torch.float64)
    height, width = grid.shape[1:3]
    chosen = subsample(prediction.confident.flatten().nonzero()[:, 0], max_points, seed)
    view, row, column = torch.unravel_index(chosen, grid.shape[:3])

    def at(rows: Tensor, columns: Tensor) -> Tensor:
        return grid[view, rows.clamp(0, height - 1), columns.clamp(0, width - 1)].to("cpu", torch.float64)

    here, down, along = (
        at(row, column),
        at(row + 1, column) - at(row - 1, column),
        at(row, column + 1) - at(row, column - 1),
    )
    normal = torch.linalg.cross(along, down)
    length = normal.norm(dim=-1)
    distance = (here - centres[view.cpu()]).norm(dim=-1)
    unit = float(distance.median()) if len(distance) else 1.0
    kept = (length > _FLAT * along.norm(dim=-1) * down.norm(dim=-1)) & (distance > 0) & (distance <= far * unit)
    inside = kept.to(grid.device)
    return Surface(
        points=at_least_float32(prediction.points)[view[inside], row[inside], column[inside]],
        at=here[kept] / unit,
        normals=(normal / length[:, None])[kept],
        views=view.cpu()[kept],
        centres=centres / unit,
        unit=unit,
    )


def displace(surface: Surface, displacement: Tensor) -> tuple[Tensor, Tensor]:
    """Move every view by a similarity close to the identity, about its camera.

    Args:
        surface: the points.
        displacement: `[S, 7]` float64: shift, turn (a rotation vector) and relative growth of each view.

    Returns:
        What the points `[n, 3]` and the camera centres `[S, 3]` move by, float64, in units, to first order.
    """
    shift, turn, growth = displacement.split([3, 3, 1], dim=1)
    ray = surface.at - surface.centres[surface.views]
    moves = shift[surface.views] + torch.linalg.cross(turn[surface.views], ray) + growth[surface.views] * ray
    return moves, shift


def take_out_similarity(surface: Surface, along: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
    """Fit one similarity to what points move by along their normals, and take it out of points and cameras.

    Args:
        surface: the points.
        along: what each moves by along its normal, `[n]` float64.
        shifts: what the camera centres move by, `[S, 3]` float64.

    Returns:
        What is left of both.
    """
    origin = surface.at.mean(0)
    away = surface.at - origin
    # The normal's part of each of the seven fields that a similarity close to the identity can be.
    growing = (away * surface.normals).sum(-1, keepdim=True)
    fields = torch.cat([surface.normals, torch.linalg.cross(away, surface.normals), growing], dim=1)
    # A flat wall does not tell its own sideways motion: the pseudo-inverse leaves such motions out.
    common = torch.linalg.pinv(fields.mT @ fields, rtol=1e-9, hermitian=True) @ (fields.mT @ along)
    away = surface.centres - origin
    explained = common[:3] + torch.linalg.cross(common[3:6].expand_as(away), away) + common[6] * away
    return along - fields @ common, shifts - explained


def _check(prediction: Prediction, name: str) -> None:
    views = prediction.c2w.shape[0]
    if views < 2:
        raise CalibrationError(
            f"{name} has one view, whose displacement no other view contradicts; give 2 views or more, or ground truth."
        )
    for field in ("points", "c2w", "confidence"):
        bad = int((~torch.isfinite(getattr(prediction, field))).sum())
        if bad:
            raise CalibrationError(
                f"The prediction for {name} has {bad} values in {field} that are not finite; run the model in float32 "
                "and check its weights."
            )
