from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from hess_plugin.calibration import neighbours
from hess_plugin.calibration.neighbours import CloudIndex
from hess_plugin.exceptions import CalibrationError, MissingDependency


def surface(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    u = 4 * torch.rand(count, 2, generator=generator)
    return torch.stack([u[:, 0], u[:, 1], torch.sin(2 * u[:, 0]) + 0.3 * torch.cos(3 * u[:, 1])], dim=-1)


@pytest.mark.parametrize("count", [1, 3, 500, 20_000])
def test_small_clouds_are_searched_exactly(count: int) -> None:
    cloud, query = surface(count, 0), surface(300, 1) + 0.01
    index, squared = CloudIndex(cloud).nearest(query)
    distance, _ = cKDTree(cloud.numpy()).query(query.numpy())
    np.testing.assert_allclose(squared.sqrt().numpy(), distance, atol=1e-5)
    torch.testing.assert_close(squared, (query - cloud[index]).square().sum(-1))


def test_large_clouds_are_searched_through_centroids_without_loss() -> None:
    cloud, query = surface(neighbours.CENTROIDS * neighbours.POINTS_PER_CENTROID, 0), surface(2000, 1) + 0.02
    index = CloudIndex(cloud)
    assert index._index.nlist == 4096 and index._index.nprobe == 16
    _, squared = index.nearest(query)
    distance, _ = cKDTree(cloud.numpy()).query(query.numpy())
    exact = np.isclose(squared.sqrt().numpy(), distance, atol=1e-5)
    assert exact.mean() > 0.999


def test_the_same_seed_gives_the_same_neighbours() -> None:
    cloud, query = surface(neighbours.CENTROIDS * neighbours.POINTS_PER_CENTROID, 2), torch.randn(500, 3)
    first, second = (CloudIndex(cloud, seed=5).nearest(query)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_survive_a_far_origin(dtype: torch.dtype) -> None:
    far = torch.tensor([1e4, -2e4, 3e4], dtype=torch.float64)
    cloud = surface(2000, 0).double() + far
    query = (cloud[:50] + 1e-2).to(dtype)
    _, squared = CloudIndex(cloud).nearest(query)
    assert squared.dtype == dtype
    distance, _ = cKDTree(cloud.numpy()).query(query.double().numpy())
    np.testing.assert_allclose(squared.double().sqrt().numpy(), distance, atol=5e-3 if dtype == torch.float32 else 1e-6)


def test_an_empty_query_has_no_neighbours() -> None:
    index, squared = CloudIndex(surface(5, 0)).nearest(torch.zeros(0, 3))
    assert index.shape == squared.shape == (0,) and index.dtype == torch.int64


def test_no_gradient_flows_and_faiss_is_left_as_it_was() -> None:
    import faiss

    before = faiss.cvar.distance_compute_blas_threshold
    _, squared = CloudIndex(surface(50, 0)).nearest(surface(9, 1).requires_grad_())
    assert not squared.requires_grad
    assert faiss.cvar.distance_compute_blas_threshold == before


@pytest.mark.parametrize(
    "cloud, sentence",
    [
        (torch.zeros(0, 3), r"shape \[0, 3\] is not \[M, 3\] with M >= 1"),
        (torch.zeros(4, 2), r"shape \[4, 2\] is not"),
        (torch.full((4, 3), float("inf")), "not finite"),
    ],
)
def test_clouds_that_cannot_be_searched_are_told(cloud: torch.Tensor, sentence: str) -> None:
    with pytest.raises(CalibrationError, match=sentence):
        CloudIndex(cloud)


def test_queries_that_are_not_finite_are_told() -> None:
    query = torch.zeros(4, 3)
    query[2] = float("nan")
    with pytest.raises(CalibrationError, match="no nearest neighbours"):
        CloudIndex(surface(50, 0)).nearest(query)


def test_missing_faiss_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependency, match="pip install faiss-cpu"):
        CloudIndex(surface(50, 0))
