"""What a model predicted for the views of a scene, in one form for every model family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hess_plugin.exceptions import AdapterError


@dataclass(frozen=True, eq=False)
class Prediction:
    """Predicted cameras and world points of one scene; the tensors may carry an autograd graph.

    The frame and the unit of length are the model's own: alignment maps them to the scene's. `H, W` may be
    smaller than the image (models that predict at a stride): see `pixel_grid`.

    Attributes:
        c2w: camera-to-world poses `[S, 4, 4]`, OpenCV axes.
        points: world points `[S, H, W, 3]`, one for each pixel (or each cell of a coarser grid).
        confidence: `[S, H, W]`, larger is better, in the model's own range.
        min_confidence: points whose confidence is below it are discarded.

    Raises:
        AdapterError: when the shapes do not fit each other.
    """

    c2w: Tensor
    points: Tensor
    confidence: Tensor
    min_confidence: float

    def __post_init__(self) -> None:
        views = self.c2w.shape[0] if self.c2w.ndim else 0
        if self.c2w.ndim != 3 or views < 1 or tuple(self.c2w.shape[1:]) != (4, 4):
            raise AdapterError(_shape_sentence("c2w", self.c2w, "[S, 4, 4] with S >= 1"))
        if self.points.ndim != 4 or self.points.shape[0] != views or self.points.shape[-1] != 3:
            raise AdapterError(_shape_sentence("points", self.points, f"[{views}, H, W, 3]"))
        wanted = tuple(self.points.shape[:3])
        if tuple(self.confidence.shape) != wanted:
            raise AdapterError(_shape_sentence("confidence", self.confidence, str(list(wanted))))

    @property
    def centres(self) -> Tensor:
        """Camera centres `[S, 3]`."""
        return self.c2w[:, :3, 3]

    @property
    def confident(self) -> Tensor:
        """Which points count, bool `[S, H, W]`: confidence at or above `min_confidence`."""
        return self.confidence.detach() >= self.min_confidence

    def pixel_grid(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Image rows `[H]` and columns `[W]` nearest to the points, in images of `height x width` pixels.

        `points[s, i, j]` lies at row `(i + .5) * height / H - .5`, and the like for columns: both grids cover
        the same image. Ties between two pixels go to the larger index.

        Returns:
            Two int64 tensors on the device of `points`: `truth[:, rows][:, :, columns]` belongs to `points`.
        """
        return (
            _nearest(height, self.points.shape[1], self.points.device),
            _nearest(width, self.points.shape[2], self.points.device),
        )


def _nearest(fine: int, coarse: int, device: torch.device) -> Tensor:
    # Integer form of floor((i + .5) * fine / coarse): no rounding trap at exact ties.
    return (2 * torch.arange(coarse, device=device) + 1) * fine // (2 * coarse)


def _shape_sentence(name: str, tensor: Tensor, wanted: str) -> str:
    given = list(tensor.shape)
    return f"A prediction's {name} has shape {given}, {wanted} was wanted: check what the adapter returns."
