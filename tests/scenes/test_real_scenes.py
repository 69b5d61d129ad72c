"""The reader on real scenes; skipped, with the reason, where they are not present."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hess_plugin.calibration.errors import scene_errors
from hess_plugin.calibration.neighbours import CloudIndex
from hess_plugin.evaluation.clouds import pixel_distance
from hess_plugin.evaluation.pose import absolute_trajectory_error, pose_auc
from hess_plugin.geometry import Similarity, project, quaternion_to_matrix, unproject
from hess_plugin.predictions import Prediction
from hess_plugin.scenes import Framing, read_scenes


def test_every_real_scene_is_read(real_scenes: Path) -> None:
    for scene in read_scenes(f"folder:{real_scenes}", views=2):
        assert scene.views == 2 and scene.height % 14 == 0 and scene.width % 14 == 0
        assert scene.normalised().unit_length() == pytest.approx(1, abs=1e-5)


def test_depth_of_one_view_lands_on_that_of_another(real_scenes: Path) -> None:
    """The whole convention at once: pose, intrinsics, pixel centres, depth unit. A wrong one misses far."""
    checked = 0
    for scene in read_scenes(f"folder:{real_scenes}", views=2, seed=1)[3:5]:
        known = scene.world_points()
        if known is None:
            continue
        points, valid = known
        pixels, depth = project(points[:1][valid[:1]][None], scene.intrinsics[1:], scene.c2w[1:])
        u, v = pixels[0].round().long().unbind(-1)
        inside = (u >= 0) & (u < scene.width) & (v >= 0) & (v < scene.height) & (depth[0] > 0)
        assert scene.depth is not None
        seen = scene.depth[1][v[inside], u[inside]]
        off = ((depth[0][inside] - seen).abs() / seen)[seen > 0]
        assert float(off.median()) < 0.02
        checked += 1
    if not checked:
        pytest.skip("none of the scenes has depth")


def test_depth_agrees_with_the_point_cloud(real_scenes: Path) -> None:
    scene = next((s for s in read_scenes(f"folder:{real_scenes}", views=1) if s.points is not None), None)
    if scene is None:
        pytest.skip("none of the scenes has a point cloud")
    known = scene.world_points()
    assert known is not None and scene.points is not None
    _, squared = CloudIndex(scene.points).nearest(known[0][known[1]][::50])
    assert float(squared.sqrt().median()) < 0.02  # metres; the cloud's own spacing is 12 mm


def test_fitting_a_real_scene_moves_no_point(real_scenes: Path) -> None:
    scene = read_scenes(f"folder:{real_scenes}", views=2)[-1]
    small = scene.framed(Framing(14, 224))
    point = scene.c2w[:, None, :3, 3] + 2 * scene.c2w[:, None, :3, 2]
    before, _ = project(point, scene.intrinsics, scene.c2w)
    after, _ = project(point, small.intrinsics, small.c2w)
    ratio = torch.tensor([small.width / scene.width, small.height / scene.height], dtype=torch.float64)
    torch.testing.assert_close(after + 0.5, (before + 0.5) * ratio)


def test_a_prediction_in_another_frame_is_aligned_and_measured(real_scenes: Path) -> None:
    """The true depth and cameras with one per cent of noise, turned, moved and scaled: small errors, twice the same."""
    turn = quaternion_to_matrix(torch.tensor([0.3, -0.5, 0.2, 0.7], dtype=torch.float64))
    away = Similarity(torch.tensor(0.4).double(), turn, torch.tensor([3.0, -1.0, 2.0]).double())
    for scene in read_scenes(f"folder:{real_scenes}", views=4)[2:4]:
        scene = scene.resized(scene.height // 7, scene.width // 7)
        unit = scene.unit_length()
        noise = torch.Generator().manual_seed(0)
        depth = torch.full((4, scene.height, scene.width), unit) if scene.depth is None else scene.depth
        points = unproject(depth, scene.intrinsics, scene.c2w)
        points = points + 0.01 * unit * torch.randn(points.shape, generator=noise)
        c2w = scene.c2w.clone()
        c2w[:, :3, 3] += 0.01 * unit * torch.randn(4, 3, generator=noise)
        sure = (depth > 0).float()
        prediction = Prediction(away.apply_poses(c2w), away.apply(points).requires_grad_(), sure, 0.5)
        first, second = scene_errors(prediction, scene), scene_errors(prediction, scene)
        assert first.camera is not None and first.alignment is not None and second.camera is not None
        assert first.camera.item() == second.camera.item() < 1e-3
        assert absolute_trajectory_error(prediction.c2w, scene.c2w) < 0.03 * unit
        assert 0.2 < pose_auc(prediction.c2w, scene.c2w)[30] < 1
        if scene.depth is None:
            assert first.alignment.method == "cameras" and first.points is None
            continue
        assert first.points is not None and second.points is not None
        assert first.points.item() == second.points.item() < 5e-4
        assert first.alignment.method.startswith("pixels, icp")
        assert pixel_distance(prediction, scene.normalised(), first.alignment.similarity) < 0.03
