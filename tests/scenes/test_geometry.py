from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from torch import Tensor

from hess_plugin.geometry import Similarity, invert_rigid, project, quaternion_to_matrix, unproject


def random_similarity(seed: int) -> Similarity:
    generator = torch.Generator().manual_seed(seed)
    quaternion = torch.randn(4, generator=generator, dtype=torch.float64)
    scale = 0.2 + 3 * torch.rand((), generator=generator, dtype=torch.float64)
    return Similarity(scale, quaternion_to_matrix(quaternion), torch.randn(3, generator=generator, dtype=torch.float64))


def cameras(views: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    c2w = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1)
    c2w[:, :3, :3] = quaternion_to_matrix(torch.randn(views, 4, generator=generator, dtype=torch.float64))
    c2w[:, :3, 3] = torch.randn(views, 3, generator=generator, dtype=torch.float64)
    intrinsics = torch.tensor([[30.0, 0.4, 15.2], [0.0, 28.0, 11.7], [0.0, 0.0, 1.0]], dtype=torch.float64)
    return intrinsics.repeat(views, 1, 1), c2w


@settings(max_examples=25, deadline=None, derandomize=True)
@given(first=st.integers(0, 10**6), second=st.integers(0, 10**6))
def test_a_similarity_behaves_like_its_matrix(first: int, second: int) -> None:
    a, b = random_similarity(first), random_similarity(second + 1)
    points = torch.randn(7, 3, dtype=torch.float64)
    homogeneous = torch.cat([points, torch.ones(7, 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(a.apply(points), (homogeneous @ a.matrix().T)[:, :3])
    torch.testing.assert_close(a.compose(b).apply(points), a.apply(b.apply(points)))
    torch.testing.assert_close(a.inverse().apply(a.apply(points)), points)
    torch.testing.assert_close(Similarity.from_matrix(a.matrix()).apply(points), a.apply(points))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_apply_keeps_dtype_and_lets_gradient_through(dtype: torch.dtype) -> None:
    similarity = random_similarity(3)
    points = torch.randn(2, 5, 3).to(dtype).requires_grad_()
    mapped = similarity.apply(points)
    assert mapped.dtype == dtype and mapped.shape == points.shape
    mapped.float().sum().backward()
    wanted = (similarity.scale * similarity.rotation).sum(0).to(dtype)
    assert points.grad is not None
    torch.testing.assert_close(points.grad, wanted.expand(2, 5, 3), rtol=1e-2, atol=1e-2)


def test_poses_keep_their_rotation_and_move_their_centre() -> None:
    similarity, (_, c2w) = random_similarity(5), cameras(4, 1)
    moved = similarity.apply_poses(c2w)
    torch.testing.assert_close(moved[:, :3, 3], similarity.apply(c2w[:, :3, 3]))
    torch.testing.assert_close(torch.linalg.det(moved[:, :3, :3]), torch.ones(4, dtype=torch.float64))
    # A point seen from the moved camera lies where the moved point is, but for the scale.
    point = torch.randn(3, dtype=torch.float64)
    before = (invert_rigid(c2w)[:, :3] @ torch.cat([point, torch.ones(1, dtype=torch.float64)])[:, None])[..., 0]
    after_point = torch.cat([similarity.apply(point), torch.ones(1, dtype=torch.float64)])[:, None]
    after = (invert_rigid(moved)[:, :3] @ after_point)[..., 0]
    torch.testing.assert_close(after, similarity.scale * before)


def test_quaternions_agree_with_scipy_whatever_their_length() -> None:
    quaternion = torch.randn(20, 4, dtype=torch.float64) * 3
    wanted = torch.from_numpy(Rotation.from_quat(quaternion.numpy()).as_matrix())
    torch.testing.assert_close(quaternion_to_matrix(quaternion), wanted)


def test_invert_rigid_is_the_inverse() -> None:
    _, c2w = cameras(5, 2)
    torch.testing.assert_close(invert_rigid(c2w), torch.linalg.inv(c2w))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_unprojected_pixels_project_onto_themselves(seed: int) -> None:
    intrinsics, c2w = cameras(2, seed)
    depth = 1 + torch.rand(2, 6, 8, dtype=torch.float64)
    pixels, distance = project(unproject(depth, intrinsics, c2w), intrinsics, c2w)
    v, u = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
    torch.testing.assert_close(pixels, torch.stack([u, v], -1).double().expand(2, 6, 8, 2), atol=1e-9, rtol=0)
    torch.testing.assert_close(distance, depth)


def test_unproject_is_right_on_a_pixel_worked_out_by_hand() -> None:
    intrinsics = torch.tensor([[[10.0, 0.0, 2.0], [0.0, 20.0, 1.0], [0.0, 0.0, 1.0]]])
    c2w = torch.eye(4)[None].clone()
    c2w[0, :3, 3] = torch.tensor([1.0, 2.0, 3.0])
    depth = torch.zeros(1, 4, 6)
    depth[0, 3, 5] = 4.0  # row 3, column 5: x = 4 * (5 - 2) / 10, y = 4 * (3 - 1) / 20
    torch.testing.assert_close(unproject(depth, intrinsics, c2w)[0, 3, 5], torch.tensor([2.2, 2.4, 7.0]))


def test_unproject_is_differentiable_in_depth_and_cameras() -> None:
    intrinsics, c2w = cameras(1, 4)
    depth = (1 + torch.rand(1, 2, 3, dtype=torch.float64)).requires_grad_()
    inputs = (depth, intrinsics.requires_grad_(), c2w.requires_grad_())
    assert torch.autograd.gradcheck(unproject, inputs)


def test_coordinates_keep_their_digits_under_autocast() -> None:
    from hess_plugin.geometry import invert_rigid, project, quaternion_to_matrix, to_world, unproject

    torch.manual_seed(0)
    c2w = torch.eye(4).repeat(2, 1, 1)
    c2w[:, :3, :3], c2w[:, :3, 3] = quaternion_to_matrix(torch.randn(2, 4)), torch.randn(2, 3)
    intrinsics = torch.tensor([[50.0, 0, 9.5], [0, 50, 7.5], [0, 0, 1]]).repeat(2, 1, 1)
    depth = torch.rand(2, 16, 20) + 1

    def everything() -> list[torch.Tensor]:
        points = unproject(depth, intrinsics, c2w)
        local = to_world(points, invert_rigid(c2w))
        return [points, local, *project(points, intrinsics, c2w)]

    plain = everything()
    with torch.autocast("cpu", torch.bfloat16):
        cast = everything()
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
    torch.testing.assert_close(plain[1][..., 2], depth)
