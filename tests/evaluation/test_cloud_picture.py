"""Captured clouds hold what was predicted, where and how far off; pictures show them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hess_plugin import HessError, SceneError
from hess_plugin.demo.model import load_demo_model
from hess_plugin.evaluation import cloud_drawing, cloud_picture
from hess_plugin.evaluation.arms import Arm
from hess_plugin.evaluation.cloud_drawing import draw_clouds, virtual_view
from hess_plugin.evaluation.cloud_picture import Clouds, capture_clouds
from hess_plugin.evaluation.comparison import Runner
from hess_plugin.evaluation.metrics import MetricSettings, align_with_truth
from hess_plugin.scenes.scene import Scene

ARMS = [Arm("dense"), Arm("uniform", 0.6, "uniform")]


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(load_demo_model(), options={"block_q": 8, "block_k": 8})


@pytest.fixture
def prepared(runner: Runner, room: Scene) -> Scene:
    """A room whose first view has no depth in its upper half."""
    scene = runner.prepared(room)
    assert scene.depth is not None
    depth = scene.depth.clone()
    depth[0, : scene.height // 2] = 0
    return dataclasses.replace(scene, depth=depth)


def made(points: torch.Tensor | None = None, **changes: Any) -> Clouds:
    """Clouds of two arms, drawn at random before a camera at the origin that looks along z."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(300, 3, generator=generator) + torch.tensor([-0.5, -0.5, 1.5]) if points is None else points
    tensors = {"c2w": torch.eye(4)[None]}
    for index in range(2):
        tensors[f"{index}.points"] = points.clone()
        tensors[f"{index}.colours"] = torch.randint(256, (len(points), 3), generator=generator, dtype=torch.uint8)
        tensors[f"{index}.errors"] = torch.rand(len(points), generator=generator)
    tensors["1.errors"][:100] = torch.nan
    facts = {"scene": "s", "arms": ("dense", "hess"), "row": "0.7", "threshold": 0.5, "unit": "scene"}
    return Clouds(**{"tensors": tensors, **facts, "measure": "pixels", "alignment": ("pixels", "pixels"), **changes})


def test_errors_are_distances_to_the_true_point_of_the_pixel(runner: Runner, prepared: Scene) -> None:
    clouds = capture_clouds(runner, prepared, ARMS)
    assert clouds is not None and clouds.arms == ("dense", "uniform") and clouds.row == "0.6"
    assert (clouds.measure, clouds.unit, clouds.scene) == ("pixels", "scene", prepared.name)
    truth, known = prepared.world_points() or (None, None)
    assert truth is not None and known is not None
    for index, arm in enumerate(ARMS):
        prediction = runner.predict(prepared, arm)[0]
        map_ = align_with_truth(prediction, prepared, "pixels").similarity
        rows, columns = prediction.pixel_grid(prepared.height, prepared.width)
        points, errors, colours = [], [], []
        for s, i, j in prediction.confident.nonzero()[::29].tolist():
            there, v, u = map_.apply(prediction.points[s, i, j].double()), int(rows[i]), int(columns[j])
            points.append(there)
            errors.append((there - truth[s, v, u].double()).norm() if known[s, v, u] else torch.tensor(torch.nan))
            colours.append((prepared.images[s, :, v, u] * 255).round())
        assert 0 < sum(map(torch.isnan, errors)) < len(errors)
        assert len(clouds.part(index, "points")) == int(prediction.confident.sum())
        torch.testing.assert_close(clouds.part(index, "points")[::29], torch.stack(points).float())
        expected = torch.tensor([float(error) for error in errors])
        torch.testing.assert_close(clouds.part(index, "errors")[::29], expected, equal_nan=True)
        assert (clouds.part(index, "colours")[::29] == torch.stack(colours)).all()


def test_without_depth_errors_are_distances_to_the_true_cloud(runner: Runner, prepared: Scene) -> None:
    cloud = prepared.cloud()
    assert cloud is not None
    scene = dataclasses.replace(prepared, depth=None, points=cloud[::7].contiguous())
    clouds = capture_clouds(runner, scene, ARMS, MetricSettings(alignment="cameras"))
    assert clouds is not None and clouds.measure == "nearest" and set(clouds.alignment) == {"cameras"}
    for index in range(2):
        nearest = torch.cdist(clouds.part(index, "points").double(), cloud[::7].double()).amin(1)
        torch.testing.assert_close(clouds.part(index, "errors").double(), nearest, rtol=1e-4, atol=1e-5)


def test_cameras_alone_have_no_cloud(runner: Runner, room: Scene) -> None:
    scene = runner.prepared(dataclasses.replace(room, depth=None, points=None))
    assert capture_clouds(runner, scene, ARMS) is None


def test_the_same_few_pixels_are_kept_of_every_arm(
    runner: Runner, prepared: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = capture_clouds(runner, prepared, ARMS)
    monkeypatch.setattr(cloud_picture, "POINTS", 50)
    first, again, other = (capture_clouds(runner, prepared, ARMS, seed=seed) for seed in (3, 3, 4))
    assert whole is not None and first is not None and again is not None and other is not None
    assert len(whole.part(0, "points")) > 50
    for index in range(2):
        assert first.part(index, "points").shape == (50, 3)
        kept = {tuple(point) for point in whole.part(index, "points").tolist()}
        assert {tuple(point) for point in first.part(index, "points").tolist()} <= kept
    assert (first.part(0, "colours") == first.part(1, "colours")).all()  # the same pixels
    assert all((first.tensors[name] == again.tensors[name]).all() for name in first.tensors if "errors" not in name)
    assert not torch.equal(first.part(0, "points"), other.part(0, "points"))


def test_the_threshold_is_what_one_in_ten_points_of_the_first_arm_exceeds(runner: Runner, prepared: Scene) -> None:
    clouds = capture_clouds(runner, prepared, ARMS)
    assert clouds is not None
    assert float(f"{clouds.threshold:.1e}") == clouds.threshold and 0.08 < clouds.share_off(0) < 0.12


def test_shares_count_points_whose_truth_is_known() -> None:
    clouds = made()
    errors = [e for e in clouds.part(1, "errors").tolist() if e == e]
    assert len(errors) == 200
    assert clouds.share_off(1) == pytest.approx(sum(e > 0.5 for e in errors) / 200)
    assert clouds.share_off(1, 0.9) == pytest.approx(sum(e > 0.9 for e in errors) / 200)


def test_clouds_are_read_as_they_were_written(tmp_path: Path) -> None:
    clouds = made(scene="<script>$x$</script>", unit="mm")
    clouds.save(tmp_path / "c.safetensors")
    read = Clouds.load(tmp_path / "c.safetensors")
    for name in ("scene", "arms", "row", "threshold", "unit", "measure", "alignment"):
        assert getattr(read, name) == getattr(clouds, name)
    for name, tensor in clouds.tensors.items():
        torch.testing.assert_close(read.tensors[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


def test_damaged_clouds_are_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(SceneError, match="holds no clouds or is damaged"):
        Clouds.load(path)
    made().save(path)
    whole = path.read_bytes()
    for damaged in (whole[:-8], whole[:40], b"", whole.replace(b"hess_clouds", b"hess_sounds")):
        path.write_bytes(damaged)
        with pytest.raises(SceneError, match="holds no clouds or is damaged"):
            Clouds.load(path)
    path.write_bytes(whole.replace(b"1.errors", b"1.terrors"[:8]))
    with pytest.raises(SceneError, match=r"c\.safetensors: tensor 1\.errors is missing, wanted torch\.float32 \[300\]"):
        Clouds.load(path)
    with pytest.raises(SceneError, match=r"0\.points holds values that are not finite"):
        made(torch.full((5, 3), torch.inf))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures, as they are when they are written."""
    figures: list[Any] = []
    save = cloud_drawing.save_figure

    def keep(figure: Any, path: str | Path) -> None:
        save(figure, path)
        figures.append(figure)

    monkeypatch.setattr(cloud_drawing, "save_figure", keep)
    return figures


def test_points_that_are_off_are_coloured_and_near_ones_hide_far_ones(drawn: list[Any], tmp_path: Path) -> None:
    clouds = made(arms=("dense", "he_s$s$"))
    clouds.save(tmp_path / "c.safetensors")
    draw_clouds(tmp_path / "c.safetensors", tmp_path / "c.png", threshold=0.8)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    view = virtual_view(clouds.tensors["c2w"], clouds.part(0, "points"))
    marked = np.array([0xE6, 0x00, 0x9E]) / 255
    for index, axis in enumerate(drawn[0].axes):
        dots = axis.collections[0]
        pixels, depth = view.project(clouds.part(index, "points"))
        known = {tuple(pixel): i for i, pixel in enumerate(pixels.tolist())}
        order = [known[tuple(pixel)] for pixel in dots.get_offsets().data.tolist()]
        assert len(order) > 250 and (depth[order].diff() <= 0).all()
        coloured = np.abs(dots.get_facecolors()[:, :3] - marked).max(1) < 1e-6
        assert (coloured == (clouds.part(index, "errors")[order] > 0.8).numpy()).all()
        assert f"{clouds.share_off(index, 0.8):.1%} coloured" in axis.get_title()
    assert drawn[0].axes[1].get_title().startswith(r"he_s\$s\$")


def test_the_virtual_camera_stands_behind_and_above_and_sees_the_cloud() -> None:
    c2w = torch.eye(4).repeat(3, 1, 1)
    c2w[:, 0, 3] = torch.tensor([-1.0, 0.0, 5.0])  # the middle one is nearest to the others
    points = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * 0.2 + torch.tensor([0.0, 0.0, 4.0])
    view = virtual_view(c2w, points)
    position = -view.w2c[:3, :3].T @ view.w2c[:3, 3]
    assert position[2] < -0.5 and position[1] < -0.5 and abs(position[0]) < 0.1  # y points down
    assert torch.linalg.det(view.w2c[:3, :3]) == pytest.approx(1.0)
    pixels, depth = view.project(points)
    seen = (depth > view.near) & (pixels[:, 0].abs() <= 1) & (pixels[:, 1].abs() <= 0.75)
    assert seen.double().mean() > 0.95
    below = view.project(torch.tensor([[0.0, 0.5, 4.0]]))[0]
    right = view.project(torch.tensor([[0.5, 0.0, 4.0]]))[0]
    assert below[0, 1] > 0 and right[0, 0] > 0


def test_a_cloud_behind_all_cameras_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SceneError, match="no point of the cloud lies before the cameras"):
        draw_clouds(made(torch.tensor([[0.0, 0.0, -1.0]] * 120)), tmp_path / "c.png")
    with pytest.raises(HessError, match="pictures are PNG files"):
        draw_clouds(made(), tmp_path / "c.svg")
    assert list(tmp_path.iterdir()) == []
