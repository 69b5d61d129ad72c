"""Closed-form similarity between corresponding points (Umeyama, 1991)."""

from __future__ import annotations

import torch
from torch import Tensor

from hess_plugin.exceptions import CalibrationError
from hess_plugin.geometry import Similarity

# Second over first singular value of centred points; below it they are a line, the turn about it unknown.
COLLINEAR = 1e-3


def are_collinear(points: Tensor) -> bool:
    """Whether points `[n, 3]` fix no rotation: fewer than three, all in one place, or all on one line."""
    if points.shape[0] < 3:
        return True
    points = points.detach().to("cpu", torch.float64)
    centred = points - points.mean(0)
    first, second, _ = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0).sqrt().flip(0)
    # Compared with the coordinates too: equal centres far from the origin differ by rounding only.
    return bool(first <= 1e-9 * points.abs().max()) or bool(second <= COLLINEAR * first)


@torch.no_grad()
def umeyama(source: Tensor, target: Tensor, weights: Tensor | None = None, *, unique: bool = True) -> Similarity:
    """The similarity that maps `source` onto `target` with the least (weighted) squared distance.

    Args:
        source: `[n, 3]`, any floating dtype and device; no gradient flows.
        target: `[n, 3]`.
        weights: `[n]`, not negative; None = all equal.
        unique: refuse points that leave the rotation open. The least distance is the same for every rotation that
            attains it, so a caller who wants only that may pass False.

    Returns:
        The similarity in float64 on the CPU. Its rotation is proper: a mirrored target gets the best turn.

    Raises:
        CalibrationError: fewer than three points, values that are not finite, or points on a line.
    """
    if source.ndim != 2 or source.shape[1] != 3 or source.shape != target.shape:
        raise CalibrationError(f"Points of shapes {list(source.shape)} and {list(target.shape)} are not both [n, 3].")
    x, y = (points.detach().to("cpu", torch.float64) for points in (source, target))
    if weights is not None:
        weights = weights.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(x).all() & torch.isfinite(y).all()):
        raise CalibrationError("Points to align have values that are not finite; drop them before aligning.")
    kept = slice(None) if weights is None else weights > 0
    for name, points in (("source", x[kept]), ("target", y[kept])):
        if unique and are_collinear(points):
            raise CalibrationError(
                f"The {len(points)} {name} points to align lie on a line or in one place; give 3 that do not."
            )
    return _fit(x, y, weights)


def _fit(x: Tensor, y: Tensor, weights: Tensor | None) -> Similarity:
    share = torch.full((len(x), 1), 1.0 / len(x), dtype=torch.float64)
    if weights is not None:
        share = (weights / weights.sum())[:, None]
    mean_x, mean_y = (share * x).sum(0), (share * y).sum(0)
    centred_x, centred_y = x - mean_x, y - mean_y
    u, spread, vt = torch.linalg.svd((share * centred_y).T @ centred_x)
    # Without this sign a mirrored or noisy flat cloud would come back as a reflection.
    sign = torch.ones(3, dtype=torch.float64)
    sign[2] = torch.sign(torch.linalg.det(u) * torch.linalg.det(vt))
    rotation = (u * sign) @ vt
    variance = (share * centred_x * centred_x).sum()
    scale = (spread * sign).sum() / variance.clamp(min=torch.finfo(torch.float64).tiny)
    return Similarity(scale, rotation, mean_y - scale * (rotation @ mean_x))


@torch.no_grad()
def trimmed_umeyama(source: Tensor, target: Tensor, *, keep: float = 0.8) -> tuple[Similarity, Tensor]:
    """Umeyama fitted, the worst residuals dropped once, fitted again.

    Args:
        source: `[n, 3]`.
        target: `[n, 3]`.
        keep: share of the correspondences that the second fit uses, in (0, 1].

    Returns:
        The similarity, and which correspondences it rests on, bool `[n]` on the CPU.

    Raises:
        CalibrationError: as `umeyama`, or when `keep` is not a share.
    """
    if not 0 < keep <= 1:
        raise CalibrationError(f"keep={keep} is not a share of the correspondences; give one in (0, 1].")
    first = umeyama(source, target)
    x, y = (points.detach().to("cpu", torch.float64) for points in (source, target))
    residual = (first.apply(x) - y).norm(dim=-1)
    count = max(3, int(keep * len(x)))
    kept = torch.zeros(len(x), dtype=torch.bool)
    # A stable sort keeps ties (exact data: all residuals zero) the same on every run.
    kept[torch.argsort(residual, stable=True)[:count]] = True
    if are_collinear(x[kept]) or are_collinear(y[kept]):
        return first, torch.ones_like(kept)
    return umeyama(x[kept], y[kept]), kept
