from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

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


class FakeFaiss(types.ModuleType):
    """Faiss as built for GPUs, as far as moving an index goes; searches still run on the CPU's index."""

    def __init__(self, fails: bool = False) -> None:
        import faiss

        super().__init__("faiss")
        self.__dict__.update({name: getattr(faiss, name) for name in ("IndexFlatL2", "IndexIVFFlat", "METRIC_L2")})
        self.cvar, self.fails = faiss.cvar, fails
        self.moved: list[tuple[int, int, bool]] = []
        self.scratch: list[int] = []
        self.StandardGpuResources = lambda: types.SimpleNamespace(setTempMemory=self.scratch.append)

    def get_num_gpus(self) -> int:
        return 1

    def index_cpu_to_gpu(self, resources: object, number: int, index: Any) -> Any:
        if self.fails:
            raise RuntimeError("no kernel image is available for execution on the device\nsecond line")
        self.moved.append((number, index.ntotal, index.is_trained))
        return index


@pytest.fixture
def gpu_faiss(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeFaiss]]:
    def install(fails: bool = False) -> FakeFaiss:
        fake = FakeFaiss(fails)
        monkeypatch.setitem(sys.modules, "faiss", fake)
        return fake

    neighbours._gpu_resources.cache_clear()
    yield install
    neighbours._gpu_resources.cache_clear()


def test_a_trained_index_is_moved_to_the_gpu_of_the_points(gpu_faiss: Callable[..., FakeFaiss]) -> None:
    fake = gpu_faiss()
    index = neighbours._build(surface(500, 0).numpy(), 0)
    for number in (1, 1, 0):
        assert neighbours._moved(index, torch.device("cuda", number)) is index
    assert fake.moved == [(1, 500, True), (1, 500, True), (0, 500, True)]
    assert fake.scratch == [neighbours._GPU_SCRATCH] * 2  # one scratch memory for each GPU, small
    assert neighbours._moved(index, torch.device("cpu")) is index and len(fake.moved) == 3


def test_a_gpu_that_faiss_cannot_use_costs_one_line(gpu_faiss: Callable[..., FakeFaiss]) -> None:
    gpu_faiss(fails=True)
    index = neighbours._build(surface(500, 0).numpy(), 0)
    with pytest.warns(UserWarning, match=r"Faiss cannot use cuda:0 \(no kernel image .* on the device\); nearest"):
        assert neighbours._moved(index, torch.device("cuda", 0)) is index


def test_a_faiss_without_gpu_support_stays_on_the_cpu() -> None:
    index = neighbours._build(surface(50, 0).numpy(), 0)
    assert neighbours._moved(index, torch.device("cuda", 0)) is index


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("count", [1000, 170_000])
def test_neighbours_on_a_gpu_are_those_on_the_cpu(count: int) -> None:
    cloud, query = surface(count, 0), surface(5000, 1)
    found, squared = CloudIndex(cloud.cuda()).nearest(query.cuda())
    wanted, distances = CloudIndex(cloud).nearest(query)
    assert (found.cpu() == wanted).double().mean() > 0.999  # ties
    torch.testing.assert_close(squared.cpu(), distances, rtol=1e-4, atol=1e-7)
