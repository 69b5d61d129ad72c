from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hess_plugin.calibration import alignment as module
from hess_plugin.calibration.alignment import align, corresponding_points, trimmed_umeyama, umeyama
from hess_plugin.calibration.registration import refine
from hess_plugin.calibration.umeyama import are_collinear
from hess_plugin.exceptions import CalibrationError, MissingDependency
from hess_plugin.geometry import Similarity, quaternion_to_matrix
from hess_plugin.predictions import Prediction
from hess_plugin.scenes import Scene

MakeRoom = Callable[..., Scene]
Predict = Callable[..., tuple[Prediction, Similarity]]


def cloud(seed: int, count: int = 40) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def similarity(seed: int) -> Similarity:
    generator = torch.Generator().manual_seed(seed)
    quaternion = torch.randn(4, generator=generator, dtype=torch.float64)
    scale = 10 ** (2 * torch.rand((), generator=generator, dtype=torch.float64) - 1)
    return Similarity(
        scale, quaternion_to_matrix(quaternion), 5 * torch.randn(3, generator=generator, dtype=torch.float64)
    )


def assert_same(found: Similarity, wanted: Similarity, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found.matrix(), wanted.matrix(), atol=tolerance, rtol=tolerance)


# Umeyama


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), flat=st.booleans(), count=st.integers(3, 30))
def test_umeyama_recovers_a_similarity(seed: int, flat: bool, count: int) -> None:
    source = cloud(seed, count)
    if flat:
        source[:, 2] = 0  # rank two: the sign of the third axis is decided by the reflection rule alone
    assume(not are_collinear(source))
    wanted = similarity(seed + 1)
    assert_same(umeyama(source, wanted.apply(source)), wanted, 1e-6)


def test_umeyama_returns_no_reflection_for_a_mirrored_cloud() -> None:
    source = cloud(0)
    found = umeyama(source, source * torch.tensor([-1.0, 1, 1], dtype=torch.float64))
    assert float(torch.linalg.det(found.rotation)) == pytest.approx(1)
    assert float(found.scale) > 0


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_umeyama_is_the_best_similarity(seed: int) -> None:
    source, target = cloud(seed), cloud(seed) + 0.3 * cloud(seed + 1)

    def cost(candidate: Similarity) -> float:
        return float((candidate.apply(source) - target).square().sum())

    best = umeyama(source, target)
    for trial in range(5):
        nudge = torch.randn(4, generator=torch.Generator().manual_seed(trial), dtype=torch.float64) * 0.01
        nudge[3] = 1
        step = Similarity(torch.tensor(1 + 0.01 * (trial - 2)).double(), quaternion_to_matrix(nudge), nudge[:3])
        assert cost(best) <= cost(step.compose(best)) + 1e-12


def test_weights_are_repetitions() -> None:
    source, target = cloud(1, 6), cloud(2, 6)
    repeats = torch.tensor([1, 3, 0, 2, 1, 1])
    weighted = umeyama(source, target, repeats.float())
    assert_same(weighted, umeyama(source.repeat_interleave(repeats, 0), target.repeat_interleave(repeats, 0)))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_one_trimmed_refit_resists_fifteen_per_cent_of_outliers(seed: int) -> None:
    source, wanted = cloud(seed, 400), similarity(seed + 1)
    target = wanted.apply(source)
    target[:60] += float(wanted.scale) * 3 * cloud(seed + 2, 60)
    found, kept = trimmed_umeyama(source, target)
    clean = (found.apply(source) - wanted.apply(source))[60:].norm(dim=-1).mean() / wanted.scale
    plain = (umeyama(source, target).apply(source) - wanted.apply(source))[60:].norm(dim=-1).mean() / wanted.scale
    assert int(kept.sum()) == 320
    assert float(clean) < 0.08 and float(clean) < 0.7 * float(plain)


@pytest.mark.parametrize(
    "source, target, sentence",
    [
        (cloud(0, 2), cloud(1, 2), "2 source points to align lie on a line"),
        (cloud(0, 5), cloud(1, 4), "are not both"),
        (cloud(0, 5), cloud(1, 5) / 0, "not finite"),
        (torch.arange(5.0)[:, None] * torch.ones(3), cloud(1, 5), "5 source points to align lie on a line"),
        (cloud(0, 5), torch.full((5, 3), 1e3), "5 target points to align lie on a line or in one place"),
    ],
)
def test_points_that_fix_nothing_are_refused(source: Tensor, target: Tensor, sentence: str) -> None:
    with pytest.raises(CalibrationError, match=sentence):
        umeyama(source, target)


def test_keep_is_a_share() -> None:
    with pytest.raises(CalibrationError, match=r"keep=1\.5 is not a share"):
        trimmed_umeyama(cloud(0), cloud(0), keep=1.5)


# align


def test_pixels_are_used_where_there_is_depth(make_room: MakeRoom, predict: Predict) -> None:
    room = make_room()
    prediction, wanted = predict(room)
    found = align(prediction, room)
    assert found.method == "pixels, icp rejected, it fitted worse"  # nothing can be closer than exact
    assert_same(found.similarity, wanted, 1e-5)
    assert_same(align(prediction, room, icp=False).similarity, wanted, 1e-5)
    assert found.inliers == int(0.8 * 4 * 24 * 32)


def test_a_coarser_prediction_is_matched_to_its_pixels(make_room: MakeRoom, predict: Predict) -> None:
    room = make_room()
    prediction, wanted = predict(room, stride=2)
    assert prediction.points.shape[1:3] == (12, 16)
    assert_same(align(prediction, room, icp=False).similarity, wanted, 1e-5)


def test_the_unit_of_the_scene_does_not_matter(make_room: MakeRoom, predict: Predict) -> None:
    room = make_room()
    prediction, _ = predict(room, noise=0.02)
    metres, units = align(prediction, room), align(prediction, room.normalised())
    assert metres.method == units.method
    points = prediction.points.detach().double()
    to_units = units.similarity.apply(points) * room.unit_length()
    in_first = room.c2w[0].inverse()
    to_metres = metres.similarity.apply(points) @ in_first[:3, :3].T + in_first[:3, 3]
    torch.testing.assert_close(to_units, to_metres, atol=3e-3, rtol=0)


def test_unsure_points_do_not_pull(make_room: MakeRoom, predict: Predict) -> None:
    room = make_room()
    prediction, wanted = predict(room)
    points, confidence = prediction.points.detach().clone(), prediction.confidence.clone()
    points[:, :12] += 100
    confidence[:, :12] = 0.5
    found = align(replace(prediction, points=points, confidence=confidence), room, icp=False)
    assert_same(found.similarity, wanted, 1e-5)


def test_cameras_are_used_without_depth(make_room: MakeRoom, predict: Predict) -> None:
    room = replace(make_room(views=6), depth=None)
    prediction, wanted = predict(room)
    found = align(prediction, room)
    assert (found.method, found.inliers) == ("cameras", 6)
    assert_same(found.similarity, wanted, 1e-4)


def test_icp_improves_a_camera_alignment(make_room: MakeRoom, predict: Predict) -> None:
    room = make_room(views=6)
    prediction, wanted = predict(room)
    c2w = prediction.c2w.detach().clone()
    c2w[:, :3, 3] += 0.02 / float(wanted.scale) * torch.randn(6, 3, generator=torch.Generator().manual_seed(4))
    prediction = replace(prediction, c2w=c2w)
    with_cloud = replace(room, depth=None, points=room.cloud())

    def off(found: Similarity) -> float:
        points = prediction.points.detach().double()
        return float((found.apply(points) - wanted.apply(points)).norm(dim=-1).mean())

    rough, fine = align(prediction, with_cloud, icp=False), align(prediction, with_cloud)
    assert rough.method == "cameras" and fine.method == "cameras, icp"
    assert off(fine.similarity) < 0.8 * off(rough.similarity)


@pytest.mark.parametrize("views", [2, 4])
def test_features_are_used_where_nothing_corresponds(make_room: MakeRoom, predict: Predict, views: int) -> None:
    room = make_room(views=views, height=72, width=96)
    if views > 2:  # the centres on a line, the poses otherwise as they were
        c2w = room.c2w.clone()
        c2w[:, :3, 3] = torch.linspace(-1, 1, views, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0, 0])
        room = replace(room, c2w=c2w)
    prediction, wanted = predict(room)
    cloudy = replace(room, depth=None, points=room.cloud())
    found = align(prediction, cloudy, seed=1)
    assert found.method.startswith("features")
    points = prediction.points.detach().double()
    off = (found.similarity.apply(points) - wanted.apply(points)).norm(dim=-1)
    assert float(off.median()) < 0.1 * cloudy.unit_length()


@pytest.mark.parametrize("kind", ["pixels", "cameras", "features"])
def test_alignment_is_repeatable_to_the_bit(make_room: MakeRoom, predict: Predict, kind: str) -> None:
    room = make_room(views=2 if kind == "features" else 4, height=48, width=64)
    prediction, _ = predict(room, noise=0.01)
    if kind != "pixels":
        room = replace(room, depth=None, points=room.cloud())
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # one thread hides what this test is for
    try:
        runs = [align(prediction, room, seed=3) for _ in range(4)]
    finally:
        torch.set_num_threads(threads)
    assert runs[0].method.startswith(kind) and "icp" in runs[0].method
    assert len({run.similarity.matrix().numpy().tobytes() for run in runs}) == 1


def test_open3d_leaves_the_thread_settings_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    for value in ("2", None):
        if value is None:
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        else:
            monkeypatch.setenv("OMP_NUM_THREADS", value)
        refine(cloud(0, 500), cloud(1, 500), 1.0)
        assert torch.get_num_threads() == threads
        assert module.refine is refine and __import__("os").environ.get("OMP_NUM_THREADS") == value


@pytest.mark.parametrize("threads", [2, 4])
def test_icp_itself_is_repeatable_to_the_bit_on_many_threads(
    make_room: MakeRoom, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """Enough points and runs that Open3D's own threads do change the last bits: without the guard this fails."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    target = make_room(views=8, height=96, width=128).cloud()
    assert target is not None
    source = target.double() + 0.02 * torch.randn(target.shape, generator=torch.Generator().manual_seed(0)) + 0.03
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        steps = [refine(source, target, 3.0)[0] for _ in range(8)]
    finally:
        torch.set_num_threads(before)
    assert len({step.matrix().numpy().tobytes() for step in steps if step is not None}) == 1
    assert all(step is not None for step in steps)


def test_no_gradient_flows_into_the_similarity(make_room: MakeRoom, predict: Predict) -> None:
    prediction, _ = predict(make_room())
    matrix = align(prediction, make_room()).similarity.matrix()
    assert prediction.points.requires_grad and not matrix.requires_grad


# ICP that does not help


@pytest.mark.parametrize("unit", [1.0, 40.0])
def test_icp_finds_a_small_turn_far_from_the_origin(make_room: MakeRoom, unit: float) -> None:
    room = make_room(views=6, height=48, width=64)
    cloud_of_room = room.cloud()
    assert cloud_of_room is not None
    far = torch.tensor([30.0, -20.0, 10.0], dtype=torch.float64)
    target = (cloud_of_room.double() / room.unit_length() + far) * unit
    turn = quaternion_to_matrix(torch.tensor([0.01, -0.015, 0.01, 1.0], dtype=torch.float64))
    source = (target - target.mean(0)) @ turn.T + target.mean(0) + 0.01 * unit
    step, what = refine(source, target, unit)
    assert what == "icp" and step is not None
    before, after = ((points - target).norm(dim=-1).mean() for points in (source, step.apply(source)))
    assert float(after) < 0.2 * float(before)


def test_icp_without_neighbours_is_skipped() -> None:
    step, what = refine(cloud(0, 500), cloud(1, 500) + 100, 1.0)
    assert step is None and what == "icp skipped, no neighbours"


def test_icp_on_a_tiny_cloud_is_skipped() -> None:
    step, what = refine(cloud(0, 500), cloud(1, 5), 1.0)
    assert step is None and what == "icp skipped, the cloud is too small"


@pytest.mark.parametrize(
    "shift, what", [(0.0, "icp rejected, it fitted worse"), (0.5, "icp rejected, it moved too far")]
)
def test_a_step_that_fits_worse_or_leaps_is_rejected(monkeypatch: pytest.MonkeyPatch, shift: float, what: str) -> None:
    import open3d

    class Worse:
        fitness, inlier_rmse = 0.5, 0.09
        transformation = torch.eye(4, dtype=torch.float64).numpy().copy()

    Worse.transformation[0, 3] = shift
    monkeypatch.setattr(open3d.pipelines.registration, "registration_icp", lambda *_: Worse)
    flat = torch.rand(4000, 3, dtype=torch.float64) * torch.tensor([1.0, 1.0, 0.1])
    assert refine(flat, flat.clone(), 1.0) == (None, what)


def test_a_plane_does_not_send_icp_away() -> None:
    plane = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plane[:, 2] = 0
    step, _ = refine(plane + torch.tensor([0.0, 0.0, 0.02]), plane, 1.0)
    moved = plane if step is None else step.apply(plane)
    assert bool(torch.isfinite(moved).all()) and float((moved - plane).norm(dim=-1).mean()) < 0.1


# sentences


def test_one_view_without_depth_is_told(make_room: MakeRoom, predict: Predict) -> None:
    room = replace(make_room(views=1), depth=None)
    with pytest.raises(CalibrationError, match="Scene room has one view and no depth or points"):
        align(predict(room)[0], room)


def test_two_views_without_depth_are_told(make_room: MakeRoom, predict: Predict) -> None:
    room = replace(make_room(views=2), depth=None)
    with pytest.raises(CalibrationError, match="Scene room has 2 views and no depth or points"):
        align(predict(room)[0], room)


@pytest.mark.parametrize("whose", ["true", "predicted"])
def test_cameras_on_a_line_are_told(make_room: MakeRoom, predict: Predict, whose: str) -> None:
    room = replace(make_room(), depth=None)
    prediction, _ = predict(room)
    line = torch.arange(4.0)[:, None] * torch.tensor([1.0, 2.0, 3.0])
    c2w = (room if whose == "true" else prediction).c2w.detach().clone()
    c2w[:, :3, 3] = line
    if whose == "true":
        room = replace(room, c2w=c2w)
    else:
        prediction = replace(prediction, c2w=c2w)
    with pytest.raises(CalibrationError, match=f"The {whose} camera centres of scene room lie on a line"):
        align(prediction, room)


@pytest.mark.parametrize("field", ["points", "c2w", "confidence"])
def test_a_prediction_that_is_not_finite_is_told(make_room: MakeRoom, predict: Predict, field: str) -> None:
    room = make_room()
    prediction, _ = predict(room)
    broken = getattr(prediction, field).detach().clone()
    broken.flatten()[7] = float("nan")
    with pytest.raises(CalibrationError, match=f"scene room has 1 values in {field} that are not finite"):
        align(replace(prediction, **{field: broken}), room)


def test_views_must_agree(make_room: MakeRoom, predict: Predict) -> None:
    with pytest.raises(CalibrationError, match="prediction has 4 views, scene room has 3"):
        align(predict(make_room(views=4))[0], make_room(views=3))


def test_clouds_that_do_not_match_are_told(make_room: MakeRoom, predict: Predict) -> None:
    room = make_room(views=2)
    prediction, _ = predict(room)
    noise = torch.randn(3000, 3, generator=torch.Generator().manual_seed(0)) ** 5
    with pytest.raises(CalibrationError, match="predicted and the true cloud do not match"):
        align(prediction, replace(room, depth=None, points=noise))


def test_no_confident_point_is_told(make_room: MakeRoom, predict: Predict) -> None:
    room = make_room(views=2)
    prediction = replace(predict(room)[0], min_confidence=9.0)
    with pytest.raises(CalibrationError, match="has 0 points of confidence at least 9"):
        align(prediction, room)


def test_missing_open3d_is_told(make_room: MakeRoom, predict: Predict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open3d", None)
    prediction, wanted = predict(make_room())
    with pytest.raises(MissingDependency, match="ICP needs Open3D"):
        align(prediction, make_room())
    assert_same(align(prediction, make_room(), icp=False).similarity, wanted, 1e-5)


def test_corresponding_points_keep_gradient_and_skip_unknown_depth(make_room: MakeRoom, predict: Predict) -> None:
    room = make_room(views=2)
    assert room.depth is not None
    prediction, wanted = predict(room)
    room.depth[0, :5] = 0
    pairs = corresponding_points(prediction, room)
    assert pairs is not None
    assert pairs[0].requires_grad and len(pairs[0]) == 2 * 24 * 32 - 5 * 32
    torch.testing.assert_close(wanted.apply(pairs[0].detach()), pairs[1], atol=1e-4, rtol=1e-4)
    assert corresponding_points(prediction, replace(room, depth=None)) is None
