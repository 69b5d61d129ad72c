"""Nearest neighbours in a fixed point cloud, through Faiss."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hess_plugin.exceptions import CalibrationError, MissingDependency

CENTROIDS = 4096
PROBES = 16
POINTS_PER_CENTROID = 39  # fewer, and Faiss warns that the centroids are not trained
_GPU_SCRATCH = 128 * 2**20
_TRAINED_PER_CENTROID = 64  # more only makes training slower: in 3D the recall is already full


class CloudIndex:
    """A point cloud prepared for nearest-neighbour queries (HeSS: Faiss IVFFlat, 4096 centroids, 16 probes).

    Clouds too small to train 4096 centroids (below 159 744 points) get an exhaustive index, which is also
    faster there. Training has a fixed seed and runs on the CPU; where the points are on a GPU and Faiss is built
    for it, the trained index is then moved there.
    """

    def __init__(self, points: Tensor, *, seed: int = 0) -> None:
        """Index `points [M, 3]`, of any floating dtype and device.

        Raises:
            CalibrationError: when the cloud is empty, misshapen or not finite.
            MissingDependency: when Faiss is not installed.
        """
        if points.ndim != 2 or points.shape[1] != 3 or points.shape[0] == 0:
            raise CalibrationError(
                f"A cloud of shape {list(points.shape)} is not [M, 3] with M >= 1; give some true points."
            )
        self.points = points.detach()
        if not bool(torch.isfinite(self.points).all()):
            raise CalibrationError("The true cloud has values that are not finite; remove them.")
        # Faiss computes |a|^2 - 2ab + |b|^2 in float32: far from the origin that would lose every digit.
        self._origin = self.points.double().mean(0)
        self._index = _moved(_build(self._prepared(self.points), seed), self.points.device)

    def __len__(self) -> int:
        """Number of points."""
        return int(self.points.shape[0])

    @torch.no_grad()
    def nearest(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest cloud point of each query.

        Args:
            query: `[n, 3]`, finite, any floating dtype and device.

        Returns:
            Indices int64 `[n]` into `points` and squared distances `[n]` in the dtype of `query`, both on its
            device. The distances are recomputed from the points: Faiss's own are rounded.
        """
        query = query.detach()
        if not len(query):
            return torch.empty(0, dtype=torch.int64, device=query.device), query.new_empty(0)
        with _matrix_products():
            _, found = self._index.search(self._prepared(query), 1)
        index = torch.from_numpy(found[:, 0]).to(torch.int64)
        if bool((index < 0).any()):
            raise CalibrationError("Points that are not finite have no nearest neighbours; drop them first.")
        matched = self.points[index.to(self.points.device)].to(query.device, query.dtype)
        return index.to(query.device), (query - matched).square().sum(-1)

    def _prepared(self, points: Tensor) -> Any:
        centred = points.double() - self._origin.to(points.device)
        return centred.to("cpu", torch.float32).contiguous().numpy()


def _build(points: Any, seed: int) -> Any:
    faiss = _import_faiss()
    flat = faiss.IndexFlatL2(3)
    if len(points) < CENTROIDS * POINTS_PER_CENTROID:
        flat.add(points)
        return flat
    index = faiss.IndexIVFFlat(flat, 3, CENTROIDS, faiss.METRIC_L2)
    index.cp.seed = seed
    index.cp.max_points_per_centroid = _TRAINED_PER_CENTROID
    index.nprobe = PROBES
    with _matrix_products():
        index.train(points)
        index.add(points)
    return index


def _moved(index: Any, device: torch.device) -> Any:
    """The index on a GPU if the points are on one and this Faiss can use it, else as it is."""
    faiss = _import_faiss()
    if device.type != "cuda" or not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        return index
    number = device.index if device.index is not None else torch.cuda.current_device()
    try:
        return faiss.index_cpu_to_gpu(_gpu_resources(number), number, index)
    except RuntimeError as error:  # a wheel without code for this GPU, no memory left, ...
        reason = str(error).splitlines()[0]
        warnings.warn(f"Faiss cannot use {device} ({reason}); nearest neighbours run on the CPU.", stacklevel=3)
        return index


@functools.cache
def _gpu_resources(number: int) -> Any:
    """Faiss's scratch memory on one GPU, kept: its default, up to 1.5 GB, would be taken from the model."""
    resources = _import_faiss().StandardGpuResources()
    resources.setTempMemory(_GPU_SCRATCH)
    return resources


@contextmanager
def _matrix_products() -> Iterator[None]:
    """Have Faiss compute distances by matrix products, as it always did, for small batches too.

    Recent versions send smaller batches through a loop over pairs, many times slower with 3 numbers a point.
    """
    settings = _import_faiss().cvar
    before = settings.distance_compute_blas_threshold
    settings.distance_compute_blas_threshold = 20
    try:
        yield
    finally:
        settings.distance_compute_blas_threshold = before


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingDependency("The point error needs Faiss: pip install faiss-cpu.") from error
    return faiss
