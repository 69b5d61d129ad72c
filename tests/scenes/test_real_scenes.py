"""The reader on real scenes; skipped, with the reason, where they are not present."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hess_plugin.calibration.neighbours import CloudIndex
from hess_plugin.geometry import project
from hess_plugin.scenes import read_scenes


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
    small = scene.fitted(14, 224)
    point = scene.c2w[:, None, :3, 3] + 2 * scene.c2w[:, None, :3, 2]
    before, _ = project(point, scene.intrinsics, scene.c2w)
    after, _ = project(point, small.intrinsics, small.c2w)
    ratio = torch.tensor([small.width / scene.width, small.height / scene.height], dtype=torch.float64)
    torch.testing.assert_close(after + 0.5, (before + 0.5) * ratio)
