from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hess_plugin.calibration.errors import camera_error, point_error, scene_errors
from hess_plugin.calibration.neighbours import CloudIndex
from hess_plugin.exceptions import CalibrationError
from hess_plugin.geometry import Similarity
from hess_plugin.predictions import Prediction
from hess_plugin.scenes import Scene

MakeRoom = Callable[..., Scene]
Predict = Callable[..., tuple[Prediction, Similarity]]
RandomSimilarity = Callable[[int], Similarity]


def test_camera_error_is_the_formula(random_similarity: RandomSimilarity) -> None:
    similarity = random_similarity(0)
    centres, true = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    total = 0.0
    for c, t in zip(centres, true, strict=True):
        total += float((similarity.scale * similarity.rotation @ c + similarity.translation - t).square().sum())
    assert float(camera_error(centres, true, similarity)) == pytest.approx(total / (2 * 5))


def test_point_error_is_the_formula(random_similarity: RandomSimilarity) -> None:
    similarity, cloud = random_similarity(1), torch.rand(400, 3).double()
    points = similarity.inverse().apply(torch.rand(300, 3).double() * 1.3)
    distance = torch.cdist(similarity.apply(points), cloud).amin(1)
    inside = distance < 0.05
    error, inliers = point_error(points, cloud, similarity, eps=0.05)
    assert inliers == int(inside.sum()) and 0 < inliers < 300
    assert float(error) == pytest.approx(float(distance[inside].square().sum()) / (2 * inliers), rel=1e-6)


def test_both_errors_have_the_right_gradient(random_similarity: RandomSimilarity) -> None:
    """Against finite differences, which hold while the small step changes no match."""
    similarity = random_similarity(2)
    generator = torch.Generator().manual_seed(0)
    cloud = torch.rand(50, 3, generator=generator).double()
    index = CloudIndex(cloud)
    centres = torch.randn(4, 3, generator=generator).double().requires_grad_()
    points = similarity.inverse().apply(cloud[:20] + 0.01).requires_grad_()
    true = torch.randn(4, 3, generator=generator).double()
    assert torch.autograd.gradcheck(lambda c: camera_error(c, true, similarity), centres)
    assert torch.autograd.gradcheck(lambda x: point_error(x, index, similarity)[0], points, eps=1e-7, atol=1e-5)


def test_gradient_reaches_inliers_only(random_similarity: RandomSimilarity) -> None:
    similarity, cloud = random_similarity(3), torch.rand(100, 3)
    mapped = torch.cat([cloud[:10] + 0.01, cloud[:10] + 50])
    points = similarity.inverse().apply(mapped).requires_grad_()
    point_error(points, cloud, similarity)[0].backward()
    assert points.grad is not None
    assert bool((points.grad[:10].abs().sum(-1) > 0).all()) and float(points.grad[10:].abs().max()) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_errors_are_computed_in_float32_at_least(dtype: torch.dtype) -> None:
    cloud, points = torch.rand(50, 3), torch.rand(20, 3).to(dtype)
    assert point_error(points, cloud, Similarity.identity(), eps=1.0)[0].dtype == torch.float32
    assert camera_error(points, cloud[:20], Similarity.identity()).dtype == torch.float32


def test_a_perfect_prediction_has_no_error(make_room: MakeRoom, predict: Predict) -> None:
    errors = scene_errors(predict(make_room())[0], make_room())
    assert errors.camera is not None and errors.points is not None
    assert errors.camera.item() < 1e-9 and errors.points.item() < 1e-9
    assert errors.inliers == 4 * 24 * 32


def test_errors_grow_with_noise_and_do_not_depend_on_units(make_room: MakeRoom, predict: Predict) -> None:
    room = make_room()
    values = []
    for noise in (0.005, 0.02):
        prediction, _ = predict(room, noise=noise)
        one, other = scene_errors(prediction, room), scene_errors(prediction, room.normalised())
        assert one.camera is not None and one.points is not None
        assert other.camera is not None and other.points is not None
        torch.testing.assert_close(one.camera, other.camera, rtol=1e-2, atol=1e-7)
        torch.testing.assert_close(one.points, other.points, rtol=1e-2, atol=1e-7)
        values.append((one.camera.item(), one.points.item()))
    assert values[1][0] > 3 * values[0][0] and values[1][1] > 3 * values[0][1]


def test_gradient_of_both_errors_reaches_the_prediction_apart(make_room: MakeRoom, predict: Predict) -> None:
    room = make_room()
    prediction, _ = predict(room, noise=0.01)
    errors = scene_errors(prediction, room)
    assert errors.camera is not None and errors.points is not None

    def gradient(error: Tensor, of: Tensor) -> Tensor | None:
        return torch.autograd.grad(error, of, retain_graph=True, allow_unused=True)[0]

    assert gradient(errors.camera, prediction.points) is None and gradient(errors.points, prediction.c2w) is None
    by_camera, by_points = gradient(errors.camera, prediction.c2w), gradient(errors.points, prediction.points)
    assert by_camera is not None and float(by_camera[:, :3, 3].abs().min()) > 0
    assert by_points is not None and int((by_points.abs().sum(-1) > 0).sum()) == errors.inliers


def test_unsure_points_are_discarded(make_room: MakeRoom, predict: Predict) -> None:
    room = make_room()
    prediction, _ = predict(room)
    confidence = prediction.confidence.clone()
    confidence[:, :12] = 0.5
    assert scene_errors(replace(prediction, confidence=confidence), room).inliers == 4 * 12 * 32


def test_the_cap_on_points_is_seeded(make_room: MakeRoom, predict: Predict) -> None:
    room = make_room()
    prediction, _ = predict(room, noise=0.01)
    all_points, few, again, other = (
        scene_errors(prediction, room, max_points=limit, seed=seed).points
        for limit, seed in ((None, 0), (500, 0), (500, 0), (500, 1))
    )
    assert all_points is not None and few is not None and again is not None and other is not None
    assert few.item() == again.item() != other.item()
    assert few.item() == pytest.approx(all_points.item(), rel=0.3)


def test_scene_errors_are_repeatable_to_the_bit(make_room: MakeRoom, predict: Predict) -> None:
    room = make_room(height=48, width=64)
    prediction, _ = predict(room, noise=0.01, stride=2)
    runs = [scene_errors(prediction, room) for _ in range(4)]
    assert len({(e.camera.item(), e.points.item()) for e in runs if e.camera is not None and e.points is not None}) == 1


def test_a_scene_without_points_has_a_camera_error_only(make_room: MakeRoom, predict: Predict) -> None:
    room = replace(make_room(), depth=None)
    errors = scene_errors(predict(room, noise=0.01)[0], room)
    assert errors.points is None and errors.camera is not None and errors.camera.item() > 0
    assert errors.alignment is not None and errors.alignment.method == "cameras"


def test_no_inlier_is_told_with_the_median_distance() -> None:
    cloud = torch.zeros(10, 3)
    points = torch.full((7, 3), 3.0)
    with pytest.raises(CalibrationError, match=r"None of 7 predicted points lies within eps=0.05 .* distance is 5.2"):
        point_error(points, cloud, Similarity.identity())


def test_no_inlier_names_the_scene(make_room: MakeRoom, predict: Predict) -> None:
    room = make_room()
    with pytest.raises(CalibrationError, match=r"Scene room .pixels.*None of 3072 predicted points"):
        scene_errors(predict(room, noise=0.01)[0], room, eps=1e-9)


def test_no_confident_point_is_told(make_room: MakeRoom, predict: Predict) -> None:
    room = make_room()
    prediction = replace(predict(room)[0], min_confidence=9.0)
    with pytest.raises(CalibrationError, match=r"No predicted point of scene room has confidence >= 9 .largest 2"):
        scene_errors(prediction, room)


def test_no_camera_is_told() -> None:
    with pytest.raises(CalibrationError, match="give two"):
        camera_error(torch.zeros(0, 3), torch.zeros(0, 3), Similarity.identity())


def test_errors_are_the_same_inside_autocast(make_room: MakeRoom, predict: Predict) -> None:
    """Autocast rounds every matrix product to half precision; coordinates must not be among them."""
    scene = make_room()
    prediction, _ = predict(scene, noise=0.01)
    outside = scene_errors(prediction, scene)
    with torch.autocast("cpu", torch.bfloat16):
        inside = scene_errors(prediction, scene)
    for name in ("camera", "points"):
        assert torch.equal(getattr(inside, name), getattr(outside, name))
    assert torch.equal(inside.alignment.similarity.matrix(), outside.alignment.similarity.matrix())
