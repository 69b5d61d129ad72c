"""Registration of point clouds through Open3D: coarse by features, fine by point-to-plane ICP.

Both work in units of the scene (mean distance of its true points to its first camera), so that their
distances mean the same in every scene, and both are bit-for-bit repeatable.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hess_plugin.calibration.sampling import subsample
from hess_plugin.exceptions import CalibrationError
from hess_plugin.geometry import Similarity
from hess_plugin.scenes.clouds import import_open3d

ICP_DISTANCE = 0.1  # farther neighbours do not pull
ICP_VOXEL = 0.02
ICP_ITERATIONS = 30
COARSE_VOXEL = 0.05
COARSE_ITERATIONS = 100_000
COARSE_FITNESS = 0.5  # a registration that explains less of the source than this is a guess
COARSE_SCALE = 2.5  # and so is one that shrinks the source into a dense spot of the target, where anything fits
MAX_POINTS = 300_000
FARTHEST = 1e6  # in units, along each axis
_lock = threading.Lock()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run Open3D on one thread.

    Its ICP adds up normal equations in the order in which threads finish, so the last bits change between
    runs. It asks OMP_NUM_THREADS at every call, and then the OpenMP runtime, which it shares with torch.
    """
    with _lock:
        variable, threads = os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads()
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            if variable is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = variable


def refine(source: Tensor, target: Tensor, unit: float, *, seed: int = 0) -> tuple[Similarity | None, str]:
    """Point-to-plane ICP of an already aligned cloud onto the true one.

    Args:
        source: `[n, 3]`, in the frame of `target`.
        target: `[m, 3]`, normals are estimated on it.
        unit: length of the scene's unit.
        seed: of the subsampling of clouds that are larger than needed.

    Returns:
        The rigid correction and how it ended; None instead of a correction that finds nothing to fit, moves
        the cloud farther than neighbours were searched, or leaves it no closer.
    """
    open3d = import_open3d("ICP")
    origin = target.detach().to("cpu", torch.float64).mean(0)
    with _one_thread(), _quiet(open3d):
        moving, fixed = (_cloud(open3d, points, origin, unit, ICP_VOXEL, seed) for points in (source, target))
        if len(fixed.points) < 20:
            return None, "icp skipped, the cloud is too small"
        fixed.estimate_normals(open3d.geometry.KDTreeSearchParamKNN(20))
        tools = open3d.pipelines.registration
        before = tools.evaluate_registration(moving, fixed, ICP_DISTANCE, np.eye(4))
        if before.fitness == 0:
            return None, "icp skipped, no neighbours"
        after = tools.registration_icp(
            moving,
            fixed,
            ICP_DISTANCE,
            np.eye(4),
            tools.TransformationEstimationPointToPlane(),
            tools.ICPConvergenceCriteria(max_iteration=ICP_ITERATIONS),
        )
        points = np.asarray(moving.points)
    step = np.asarray(after.transformation)
    moved = np.linalg.norm(points @ step[:3, :3].T + step[:3, 3] - points, axis=1).mean()
    if not np.isfinite(step).all() or not moved <= ICP_DISTANCE:
        return None, "icp rejected, it moved too far"
    if _cost(after) > _cost(before):
        return None, "icp rejected, it fitted worse"
    return _in_scene(step, origin, unit), "icp"


def coarse(source: Tensor, source_unit: float, target: Tensor, unit: float, *, seed: int = 0) -> tuple[Similarity, int]:
    """Similarity between clouds without correspondences: FPFH features matched by RANSAC with scale.

    Args:
        source: `[n, 3]` in any frame.
        source_unit: its unit, measured as the scene's is; a first guess of the scale that features depend on.
        target: `[m, 3]`.
        unit: length of the scene's unit.
        seed: of RANSAC and of subsampling.

    Returns:
        The similarity and the number of matched points it rests on.

    Raises:
        CalibrationError: when the clouds do not match.
    """
    open3d = import_open3d("Registration without correspondences")
    with _one_thread(), _quiet(open3d):
        open3d.utility.random.seed(seed)
        moving = _described(open3d, source, source_unit, seed)
        found = _match(open3d, moving, _described(open3d, target, unit, seed))
    in_units = Similarity.from_matrix(torch.from_numpy(np.array(found.transformation)))
    if found.fitness < COARSE_FITNESS or not 1 / COARSE_SCALE < float(in_units.scale) < COARSE_SCALE:
        raise CalibrationError(
            f"The predicted and the true cloud do not match: registration explains {found.fitness:.0%} of the "
            f"predicted points at {float(in_units.scale):.2g} times the expected size; give the scene depth, or "
            "3 views that are not on a line."
        )
    scale = in_units.scale * unit / source_unit
    similarity = Similarity(scale, in_units.rotation, in_units.translation * unit)
    return similarity, len(found.correspondence_set)


def _described(open3d: Any, points: Tensor, unit: float, seed: int) -> tuple[Any, Any]:
    """A cloud in units and the FPFH feature of each of its points."""
    geometry = open3d.geometry
    cloud = _cloud(open3d, points, torch.zeros(3, dtype=torch.float64), unit, COARSE_VOXEL, seed)
    cloud.estimate_normals(geometry.KDTreeSearchParamHybrid(2 * COARSE_VOXEL, 30))
    # Normals have no side by themselves and FPFH depends on it: turn them all towards the middle.
    cloud.orient_normals_towards_camera_location(cloud.get_center())
    search = geometry.KDTreeSearchParamHybrid(5 * COARSE_VOXEL, 100)
    return cloud, open3d.pipelines.registration.compute_fpfh_feature(cloud, search)


def _match(open3d: Any, moving: tuple[Any, Any], fixed: tuple[Any, Any]) -> Any:
    tools = open3d.pipelines.registration
    distance = 1.5 * COARSE_VOXEL
    return tools.registration_ransac_based_on_feature_matching(
        moving[0],
        fixed[0],
        moving[1],
        fixed[1],
        True,  # only pairs that are each other's nearest feature
        distance,
        tools.TransformationEstimationPointToPoint(True),  # with scale
        3,
        [
            tools.CorrespondenceCheckerBasedOnEdgeLength(0.8),
            tools.CorrespondenceCheckerBasedOnDistance(distance),
        ],
        tools.RANSACConvergenceCriteria(COARSE_ITERATIONS, 0.999),
    )


def _cloud(open3d: Any, points: Tensor, origin: Tensor, unit: float, voxel: float, seed: int) -> Any:
    kept = subsample(points.detach(), MAX_POINTS, seed).to("cpu", torch.float64)
    # A grid of voxels counts them in 32 bits: one stray point far enough away would end in a RuntimeError.
    vector = open3d.utility.Vector3dVector(((kept - origin) / unit).clamp(-FARTHEST, FARTHEST).numpy())
    return open3d.geometry.PointCloud(vector).voxel_down_sample(voxel)


@contextmanager
def _quiet(open3d: Any) -> Iterator[None]:
    with open3d.utility.VerbosityContextManager(open3d.utility.VerbosityLevel.Error):
        yield


def _cost(result: Any) -> float:
    """Mean squared distance with every unmatched point counted at the search distance."""
    return float(result.fitness * result.inlier_rmse**2 + (1 - result.fitness) * ICP_DISTANCE**2)


def _in_scene(step: np.ndarray[Any, Any], origin: Tensor, unit: float) -> Similarity:
    """A rigid step in units about `origin`, as a map of scene coordinates."""
    matrix = torch.from_numpy(np.array(step, dtype=np.float64))
    u, _, vt = torch.linalg.svd(matrix[:3, :3])  # thirty multiplied steps drift from a rotation by rounding
    rotation = u @ vt
    one = torch.ones((), dtype=torch.float64)
    return Similarity(one, rotation, unit * matrix[:3, 3] + origin - rotation @ origin)
