from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hess_plugin.exceptions import SceneError
from hess_plugin.geometry import project
from hess_plugin.scenes import Scene

MakeScene = Callable[..., Scene]


def test_normalised_has_unit_length_and_the_first_camera_as_frame(make_scene: MakeScene) -> None:
    scene = make_scene(points=True)
    unit = scene.normalised()
    known = unit.world_points()
    assert known is not None
    torch.testing.assert_close(unit.c2w[0], torch.eye(4, dtype=torch.float64))
    assert float(known[0][known[1]].double().norm(dim=-1).mean()) == pytest.approx(1, abs=1e-6)
    assert unit.scale == pytest.approx(scene.unit_length())
    # Distances between anything are divided by the recorded scale: points and cameras moved together.
    assert unit.points is not None and scene.points is not None
    before = torch.cdist(scene.points.double(), scene.centres)
    torch.testing.assert_close(
        torch.cdist(unit.points.double(), unit.centres) * unit.scale, before, rtol=1e-5, atol=1e-5
    )


def test_normalising_twice_changes_nothing(make_scene: MakeScene) -> None:
    once = make_scene().normalised()
    twice = once.normalised()
    torch.testing.assert_close(twice.c2w, once.c2w)
    assert twice.scale == pytest.approx(once.scale, rel=1e-6)


def test_a_normalised_scene_leads_back_to_what_was_read(make_scene: MakeScene) -> None:
    scene = make_scene(points=True)
    assert scene.to_recorded is None and scene.points is not None
    c2w = scene.c2w.clone()
    c2w[0, 0, :3] *= 1 + 2e-5  # poses from text are not quite rigid
    scene = replace(scene, c2w=c2w, points=scene.points.double())
    once = scene.normalised()
    for unit in (once, once.subset([0, 2, 1]), once.subset([2, 0]).normalised()):
        assert unit.to_recorded is not None and unit.points is not None and scene.points is not None
        linear, shift = unit.to_recorded[:3, :3], unit.to_recorded[:3, 3]
        torch.testing.assert_close(unit.points @ linear.T + shift, scene.points, rtol=0, atol=1e-12)
        assert float(torch.linalg.det(linear)) ** (1 / 3) == pytest.approx(unit.scale, rel=1e-3)
    torch.testing.assert_close(once.centres @ once.to_recorded[:3, :3].T + once.to_recorded[:3, 3], scene.centres)


def test_a_pose_only_scene_is_scaled_by_its_cameras(make_scene: MakeScene) -> None:
    unit = make_scene(depth=False).normalised()
    assert float(unit.centres[1:].norm(dim=-1).mean()) == pytest.approx(1)
    assert unit.cloud() is None and unit.world_points() is None


@pytest.mark.parametrize("views", [1, 3])
def test_a_scene_without_size_says_so(make_scene: MakeScene, views: int) -> None:
    scene = make_scene(views=views, depth=False)
    still = scene.c2w.clone()
    still[:, :3, 3] = 1.0
    with pytest.raises(SceneError, match="made-0 has no size"):
        replace(scene, c2w=still).normalised()


def test_the_cloud_is_points_else_known_depth(make_scene: MakeScene) -> None:
    with_points = make_scene(points=True)
    assert with_points.cloud() is with_points.points
    scene = make_scene()
    cloud = scene.cloud()
    assert cloud is not None and scene.depth is not None
    assert len(cloud) == int((scene.depth > 0).sum())
    assert replace(scene, depth=torch.zeros_like(scene.depth)).cloud() is None


def test_subset_takes_views_in_the_given_order(make_scene: MakeScene) -> None:
    scene = make_scene(points=True)
    part = scene.subset([2, 0])
    assert part.views == 2 and part.points is scene.points
    torch.testing.assert_close(part.images, scene.images[[2, 0]])
    torch.testing.assert_close(part.c2w, scene.c2w[[2, 0]])
    with pytest.raises(SceneError, match="has 3 views, view 3 was asked for"):
        scene.subset([0, 3])
    with pytest.raises(SceneError, match="no view was asked for"):
        scene.subset([])


@pytest.mark.parametrize("size", [(6, 8), (24, 32), (9, 20), (12, 16)])
def test_resizing_keeps_where_points_project(make_scene: MakeScene, size: tuple[int, int]) -> None:
    scene = make_scene()
    resized = scene.resized(*size)
    points = scene.c2w[:, None, :3, 3] + scene.c2w[:, None, :3, 2] * 3 + 0.3 * torch.randn(3, 9, 3).double()
    before, _ = project(points, scene.intrinsics, scene.c2w)
    after, _ = project(points, resized.intrinsics, resized.c2w)
    ratio = torch.tensor([size[1] / 16, size[0] / 12], dtype=torch.float64)
    torch.testing.assert_close(after + 0.5, (before + 0.5) * ratio)
    assert resized.images.shape == (3, 3, *size) and resized.images.dtype == torch.float32
    assert resized.depth is not None and scene.depth is not None
    assert set(resized.depth.unique().tolist()) <= set(scene.depth.unique().tolist())


def test_resizing_an_image_of_its_own_columns_lands_on_the_half_pixel_rule() -> None:
    ramp = (torch.arange(16.0) + 0.5) / 16  # value = position, so a wrong offset shows as a wrong value
    eye = torch.eye(4)[None]
    k = torch.tensor([[[10.0, 0, 7.5], [0, 10, 7.5], [0, 0, 1]]])
    scene = Scene("ramp", ramp.expand(1, 3, 16, 16).clone(), eye, k)
    half = scene.resized(8, 8)
    torch.testing.assert_close(half.images[0, 0, 3, 2:-2], ((torch.arange(8.0) + 0.5) / 8)[2:-2])
    assert half.intrinsics[0, 0, 2] == 3.5


def test_impossible_sizes_are_refused(make_scene: MakeScene) -> None:
    with pytest.raises(SceneError, match="cannot be resized to 0x5"):
        make_scene().resized(0, 5)


def test_to_moves_every_tensor(make_scene: MakeScene) -> None:
    moved = make_scene(points=True).to("cpu")
    assert moved.points is not None and moved.points.device.type == "cpu"


def _nan(tensor: torch.Tensor) -> torch.Tensor:
    broken = tensor.clone()
    broken.flatten()[0] = float("nan")
    return broken


def _mirrored(c2w: torch.Tensor) -> torch.Tensor:
    return c2w * torch.tensor([-1.0, 1, 1, 1])[None, None].double()


BROKEN: dict[str, tuple[Callable[[Scene], dict[str, Any]], str]] = {
    "NaN images": (lambda s: {"images": _nan(s.images)}, "images has 1 values that are not finite"),
    "byte images": (lambda s: {"images": s.images.double()}, "images are torch.float64"),
    "images to 255": (lambda s: {"images": s.images * 255}, "images span"),
    "images of 4 channels": (lambda s: {"images": torch.rand(3, 4, 12, 16)}, "images has shape"),
    "no view": (lambda s: {"images": s.images[:0]}, "images has shape"),
    "too few poses": (lambda s: {"c2w": s.c2w[:2]}, r"c2w has shape \[2, 4, 4\]"),
    "NaN pose": (lambda s: {"c2w": _nan(s.c2w)}, "c2w has 1 values that are not finite"),
    "scaled pose": (lambda s: {"c2w": s.c2w * 1.1}, "c2w of view 0 has no rotation matrix"),
    "mirrored pose": (lambda s: {"c2w": _mirrored(s.c2w)}, "determinant -1"),
    "row-vector pose": (lambda s: {"c2w": s.c2w.transpose(1, 2)}, "last row of c2w is not 0 0 0 1"),
    "negative focal": (lambda s: {"intrinsics": -s.intrinsics}, "intrinsics of view 0 are not a pinhole"),
    "integer intrinsics": (lambda s: {"intrinsics": s.intrinsics.long()}, "intrinsics is torch.int64"),
    "small depth": (lambda s: {"depth": s.depth[:, 1:]}, "depth has shape"),  # type: ignore[index]
    "infinite depth": (lambda s: {"depth": s.depth / 0}, "depth has .* not finite"),  # type: ignore[operator]
    "negative depth": (lambda s: {"depth": s.depth - 2}, "negative values"),  # type: ignore[operator]
    "no points": (lambda s: {"points": torch.zeros(0, 3)}, "points has shape"),
    "NaN points": (lambda s: {"points": torch.full((4, 3), float("nan"))}, "points has 12 values"),
    "no scale": (lambda s: {"scale": 0.0}, "scale is 0.0"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_field_is_named_with_its_scene(make_scene: MakeScene, case: str) -> None:
    scene = make_scene()
    change, sentence = BROKEN[case]
    with pytest.raises(SceneError, match=f"Scene made-0: .*{sentence}"):
        replace(scene, **change(scene))
