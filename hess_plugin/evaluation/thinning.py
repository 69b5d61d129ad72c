"""Thinning a cloud until no two points are closer than a distance, as DTU's evaluation does before it measures."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hess_plugin.exceptions import CalibrationError, MissingDependency

FIRST = 1024
LARGEST = 1_000_000
_SLACK = 1 + 1e-9  # the tree proposes pairs, a comparison of our own decides: the same for every pair in every chunk
_Points = np.ndarray[Any, np.dtype[np.float64]]
_Flags = np.ndarray[Any, np.dtype[np.bool_]]
_Rows = np.ndarray[Any, np.dtype[np.int64]]


def thin(points: Tensor, distance: float, *, seed: int = 0) -> Tensor:
    """Points visited in random order; each that is still there removes all others within `distance` of it.

    Exactly what that loop keeps, found for many points at once: in a stretch of the order a point is kept as soon
    as none of its undecided neighbours comes before it. Stretches begin short and double, so that crowds are gone
    before they make pairs: ten million points take a few hundred bytes each, however densely they lie.

    Args:
        points: `[n, 3]` finite, any floating dtype and device, n may be 0.
        distance: points this far apart or closer are not both kept.
        seed: of the order.

    Returns:
        Which points are kept, bool `[n]` on the CPU.

    Raises:
        CalibrationError: when the cloud is misshapen or not finite, or the distance is not positive.
        MissingDependency: when SciPy is not installed.
    """
    if points.ndim != 2 or points.shape[1] != 3 or not bool(torch.isfinite(points).all()):
        raise CalibrationError(f"A cloud to thin is {list(points.shape)} or not finite; give finite points [n, 3].")
    if not distance > 0:
        raise CalibrationError(f"A cloud cannot be thinned to a distance of {distance}; give one above 0.")
    order = visiting_order(len(points), seed)
    visited = points.detach().to("cpu", torch.float64).numpy()[order]
    kept = np.zeros(len(points), dtype=np.bool_)
    start, count = 0, FIRST
    while start < len(visited):
        stop = min(start + count, len(visited))
        free = _free_of(visited[start:stop], visited[:start][kept[:start]], distance)
        rows = start + np.flatnonzero(free)
        kept[rows[_first_come(visited[rows], distance)]] = True
        start, count = stop, min(stop, LARGEST)
    chosen = torch.zeros(len(points), dtype=torch.bool)
    chosen[torch.from_numpy(order[kept])] = True
    return chosen


def visiting_order(count: int, seed: int) -> _Rows:
    """The random order in which `thin` visits so many points."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()


def _free_of(points: _Points, kept: _Points, distance: float) -> _Flags:
    """Which points have no kept one within the distance."""
    free = np.ones(len(points), dtype=np.bool_)
    if len(kept):
        # A ball holds at most a dozen kept points, so the pairs are few.
        pairs = _tree(points).sparse_distance_matrix(_tree(kept), distance * _SLACK, output_type="ndarray")
        rows, others = pairs["i"], pairs["j"]
        free[rows[_close(points[rows], kept[others], distance)]] = False
    return free


def _first_come(points: _Points, distance: float) -> _Flags:
    """Which of some points, visited in their own order, the loop keeps."""
    pairs = _tree(points).query_pairs(distance * _SLACK, output_type="ndarray")  # i < j in each
    pairs = pairs[_close(points[pairs[:, 0]], points[pairs[:, 1]], distance)]
    kept, undecided = np.zeros(len(points), dtype=np.bool_), np.ones(len(points), dtype=np.bool_)
    while len(pairs):
        blocked = np.zeros(len(points), dtype=np.bool_)
        blocked[pairs[:, 1]] = True
        kept |= undecided & ~blocked
        undecided &= blocked
        undecided[pairs[kept[pairs[:, 0]], 1]] = False
        pairs = pairs[undecided[pairs].all(axis=1)]
    return kept | undecided


def _close(first: _Points, second: _Points, distance: float) -> _Flags:
    step = first - second
    return np.asarray(step[:, 0] ** 2 + step[:, 1] ** 2 + step[:, 2] ** 2 <= distance * distance)


def _tree(points: _Points) -> Any:
    try:
        from scipy.spatial import cKDTree
    except ImportError as error:
        raise MissingDependency("Thinning a cloud needs SciPy: pip install scipy.") from error
    return cKDTree(points, balanced_tree=False, compact_nodes=False)
