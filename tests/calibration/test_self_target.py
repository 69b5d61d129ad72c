"""Calibration without ground truth: the errors are what they are said to be, no truth enters, runs repeat exactly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from hess_plugin import AdapterError, CalibrationError, Profile, Scene, SceneError, calibrate, hookimpl
from hess_plugin.agreement import spearman
from hess_plugin.calibration.self_target import (
    FAR,
    Surface,
    displace,
    image_seed,
    predicted_surface,
    self_errors,
    take_out_similarity,
)
from hess_plugin.cli import main
from hess_plugin.demo.model import TinyVGGT, load_demo_model
from hess_plugin.demo.rooms import make_scene
from hess_plugin.demo.scenes import RoomScenes
from hess_plugin.evaluation.comparison import Arm, compare
from hess_plugin.geometry import Similarity
from hess_plugin.plugins import get_plugin_manager, register, resolve_adapter
from hess_plugin.predictions import Prediction
from hess_plugin.scenes import ImageSet

STEP = 1e-5


@pytest.fixture
def tiny_model(tiny_model: TinyVGGT) -> TinyVGGT:
    """The shared model with a camera head that does not answer the same pose for every view."""
    torch.manual_seed(1)
    nn.init.normal_(tiny_model.camera_head.pose_branch.weight, std=0.1)
    return tiny_model


@pytest.fixture(scope="module")
def rooms() -> tuple[Scene, ...]:
    return tuple(make_scene(seed, views=3) for seed in (21, 22, 23))


def images_of(scene: Scene, name: str | None = None) -> ImageSet:
    return ImageSet(name or scene.name, scene.images)


def bumpy(views: int = 3, height: int = 6, width: int = 7, seed: int = 0, distance: float = 3.0) -> Prediction:
    """Each view looks at a surface of its own with bumps, from somewhere near the origin."""
    generator = torch.Generator().manual_seed(seed)
    row, column = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    flat = torch.stack([column, row, torch.full_like(row, distance)], dim=-1).expand(views, -1, -1, -1)
    points = flat + 0.1 * torch.randn(views, height, width, 3, generator=generator)
    c2w = torch.eye(4).repeat(views, 1, 1)
    c2w[:, :3, 3] = 0.3 * torch.randn(views, 3, generator=generator)
    return Prediction(c2w, points, torch.ones(views, height, width), 0.5)


def everything(prediction: Prediction) -> Surface:
    return predicted_surface(prediction, seed=0, max_points=None, far=math.inf)


def small(turn: Tensor, growth: float) -> Tensor:
    """The linear map of a small similarity `[3, 3]`, by the exponential of its generator."""
    x, y, z = turn.tolist()
    return torch.matrix_exp(torch.tensor([[growth, -z, y], [z, growth, -x], [-y, x, growth]], dtype=torch.float64))


# ---------------------------------------------------------------- the errors


def naive_residuals(prediction: Prediction, drawn: Tensor) -> tuple[list[tuple[Any, Tensor, float]], Tensor, float]:
    """Every point's index, normal and residual, the cameras' residuals, the unit: written down point by point."""
    points, centres = prediction.points.detach().double(), prediction.centres.detach().double()
    views, height, width, _ = points.shape
    index = list(itertools.product(range(views), range(height), range(width)))
    unit = sorted(float((points[v, i, j] - centres[v]).norm()) for v, i, j in index)[(len(index) - 1) // 2]
    points, centres = points / unit, centres / unit
    normals, sizes, rows = [], [], []
    for v, i, j in index:
        along = points[v, i, min(j + 1, width - 1)] - points[v, i, max(j - 1, 0)]
        down = points[v, min(i + 1, height - 1), j] - points[v, max(i - 1, 0), j]
        normal = torch.linalg.cross(along, down)
        normals.append(normal / normal.norm())
        moved = (
            centres[v]
            + STEP * drawn[v, :3]
            + small(STEP * drawn[v, 3:6], STEP * float(drawn[v, 6])) @ (points[v, i, j] - centres[v])
        )
        sizes.append(normals[-1] @ (moved - points[v, i, j]) / STEP)
        rows.append(torch.stack([normals[-1] @ field for field in seven(points[v, i, j])]))
    common = torch.linalg.lstsq(torch.stack(rows), torch.stack(sizes)[:, None]).solution[:, 0]
    left = torch.stack(sizes) - torch.stack(rows) @ common
    cameras = torch.stack([d[:3] - sum(q * f for q, f in zip(common, seven(c), strict=True))
                           for d, c in zip(drawn, centres, strict=True)])  # fmt: skip
    return list(zip(index, normals, left.tolist(), strict=True)), cameras, unit


def seven(at: Tensor) -> list[Tensor]:
    """What a point moves by under each of the seven small similarities, by differences of similarities."""
    moves = [axis for axis in torch.eye(3, dtype=torch.float64)]
    moves += [(small(STEP * axis, 0.0) @ at - at) / STEP for axis in torch.eye(3, dtype=torch.float64)]
    return [*moves, at]


def test_the_gradient_is_that_of_a_formula_written_point_by_point() -> None:
    fixed = bumpy()
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(4, generator=generator, requires_grad=True)
    by_point = torch.randn(*fixed.points.shape, 4, generator=generator)
    by_centre = torch.randn(3, 3, 4, generator=generator)
    shift = weight - weight.detach()  # a linear model: its Jacobian is known
    c2w = fixed.c2w.clone()
    c2w[:, :3, 3] = fixed.centres + by_centre @ shift
    prediction = Prediction(c2w, fixed.points + by_point @ shift, fixed.confidence, 0.5)
    errors = self_errors(prediction, name="bumps", seed=17)
    assert errors.camera is not None and errors.points is not None and errors.alignment is None
    assert errors.inliers == 3 * 6 * 7
    drawn = torch.randn(3, 7, generator=torch.Generator().manual_seed(17), dtype=torch.float64)
    of_points, of_cameras, unit = naive_residuals(fixed, drawn)
    wanted = sum(r * by_point[v, i, j].double().T @ n for (v, i, j), n, r in of_points) / (unit * len(of_points))
    (found,) = torch.autograd.grad(errors.points, weight, retain_graph=True)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-4, atol=1e-6)
    assert errors.points.item() == pytest.approx(sum(r * r for _, _, r in of_points) / (2 * len(of_points)), rel=2e-4)
    wanted = torch.einsum("sdk,sd->k", by_centre.double(), of_cameras) / (unit * 3)
    (found,) = torch.autograd.grad(errors.camera, weight)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-4, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), views=st.integers(2, 5), height=st.integers(3, 6), width=st.integers(3, 6))
def test_a_similarity_of_all_views_leaves_no_residual(seed: int, views: int, height: int, width: int) -> None:
    surface = everything(bumpy(views, height, width, seed))
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(7, generator=generator, dtype=torch.float64)
    turns, growth = common[3:6].expand(views, 3), common[6:].expand(views, 1)
    shifts = common[:3] + torch.linalg.cross(turns, surface.centres) + growth * surface.centres
    moves, moved = displace(surface, torch.cat([shifts, turns, growth], dim=1))
    along, cameras = take_out_similarity(surface, (moves * surface.normals).sum(-1), moved)
    size = float(moves.norm(dim=-1).max())
    assert float(along.abs().max()) < 1e-7 * size and float(cameras.abs().max()) < 1e-5 * size
    # And what is left of any displacement holds no similarity any more.
    moves, moved = displace(surface, torch.randn(views, 7, generator=generator, dtype=torch.float64))
    once = take_out_similarity(surface, (moves * surface.normals).sum(-1), moved)
    torch.testing.assert_close(take_out_similarity(surface, *once), once, rtol=0, atol=1e-6 * size)


def test_a_wall_that_hides_its_sideways_motion_gives_finite_residuals() -> None:
    bumps = bumpy()
    wall = replace(bumps, points=bumps.points * torch.tensor([1.0, 1.0, 0.0]) + torch.tensor([0.0, 0.0, 3.0]))
    errors = self_errors(wall, name="wall", seed=0)
    assert errors.camera is not None and errors.points is not None
    assert 0 < errors.camera < 10 and 0 < errors.points < 10


def gradients(prediction: Prediction, **options: Any) -> tuple[Tensor, Tensor]:
    """Gradients of the point error by the points and of the camera error by the poses."""
    points, c2w = (t.detach().clone().requires_grad_() for t in (prediction.points, prediction.c2w))
    leaf = Prediction(c2w, points, prediction.confidence, prediction.min_confidence)
    errors = self_errors(leaf, **{"name": "bumps", "seed": 3, **options})
    assert errors.camera is not None and errors.points is not None
    return (
        torch.autograd.grad(errors.points, points, retain_graph=True)[0],
        torch.autograd.grad(errors.camera, c2w)[0],
    )


def test_unit_and_origin_of_a_prediction_do_not_matter() -> None:
    prediction = bumpy()
    grown = Similarity(torch.tensor(7.0), torch.eye(3, dtype=torch.float64), torch.tensor([5.0, -2.0, 1.0]).double())
    moved = Prediction(grown.apply_poses(prediction.c2w), grown.apply(prediction.points), prediction.confidence, 0.5)
    for here, there in zip(gradients(prediction), gradients(moved), strict=True):
        torch.testing.assert_close(7.0 * there, here, rtol=1e-3, atol=1e-4 * float(here.abs().max()))


def test_points_without_confidence_and_those_of_the_sky_have_no_say() -> None:
    prediction = bumpy(height=10, width=10)
    confidence, points = prediction.confidence.clone(), prediction.points.clone()
    confidence[0, :5] = 0.1
    points[1, :4] *= 100.0  # the sky: farther than FAR medians
    prediction = replace(prediction, points=points, confidence=confidence)
    by_points, _ = gradients(prediction)
    used = by_points.abs().sum(-1) > 0
    assert not used[0, :5].any() and not used[1, :4].any()
    assert used[0, 5:].all() and used[1, 4:].all() and used[2].all()
    assert self_errors(prediction, name="bumps", seed=3).inliers == int(used.sum()) == 300 - 50 - 40
    assert FAR > 1  # half of the points are always near enough


def test_points_are_drawn_with_the_seed_up_to_a_limit() -> None:
    prediction = bumpy(height=10, width=10)
    one, again, other = (gradients(prediction, max_points=60, seed=seed)[0] for seed in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert int((one.abs().sum(-1) > 0).sum()) == 60


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p: Prediction(p.c2w[:1], p.points[:1], p.confidence[:1], 0.5), "bumps has one view, .* give 2 views"),
        (lambda p: replace(p, min_confidence=2.0), "bumps has 0 predicted points of confidence >= 2"),
        (lambda p: replace(p, points=torch.zeros_like(p.points)), "bumps has 0 predicted points"),
        (lambda p: replace(p, points=p.points / 0), "bumps has 378 values in points that are not finite"),
        (lambda p: replace(p, c2w=p.c2w * torch.nan), "bumps has 48 values in c2w that are not finite"),
    ],
)
def test_a_prediction_that_cannot_be_used_is_one_sentence(
    change: Callable[[Prediction], Prediction], sentence: str
) -> None:
    with pytest.raises(CalibrationError, match=sentence):
        self_errors(change(bumpy()), name="bumps", seed=0)


# ---------------------------------------------------------------- what a profile rests on


def same(one: Profile, other: Profile) -> bool:
    return set(one.traces) == set(other.traces) and all(torch.equal(one.traces[n], other.traces[n]) for n in one.traces)


def test_no_truth_enters(tiny_model: TinyVGGT, rooms: tuple[Scene, ...]) -> None:
    room = rooms[0]
    wanted = calibrate(tiny_model, [images_of(room)])
    elsewhere = replace(
        room,
        c2w=rooms[1].c2w,
        depth=rooms[1].depth,
        intrinsics=rooms[1].intrinsics * torch.tensor([[2.0], [2.0], [1.0]]),
    )
    assert same(wanted, calibrate(tiny_model, [room], target="self"))
    assert same(wanted, calibrate(tiny_model, [elsewhere], target="self"))
    assert same(wanted, calibrate(tiny_model, [replace(room, depth=None)], target="self", eps=1e-9))
    against_truth = calibrate(tiny_model, [room], eps=1e6)
    assert against_truth.metadata["target"] == "truth" and not same(wanted, against_truth)


def test_a_profile_says_that_it_used_no_truth(tiny_model: TinyVGGT, rooms: tuple[Scene, ...]) -> None:
    profile = calibrate(tiny_model, [images_of(room) for room in rooms])
    assert profile.metadata["target"] == "self"
    for facts in profile.metadata["measured"].values():
        assert facts == {"views": 3, "size": [60, 60], "target": "self", "inliers": 3 * 30 * 30}
    assert all(torch.isfinite(trace).all() for trace in profile.traces.values())
    assert torch.isfinite(profile.scores()).all() and torch.isfinite(profile.scores(rows="patch")).all()


def test_the_draw_follows_the_images_alone(tiny_model: TinyVGGT, rooms: tuple[Scene, ...]) -> None:
    first = calibrate(tiny_model, [images_of(rooms[0], "a"), images_of(rooms[1], "b")])
    torch.manual_seed(99)
    second = calibrate(tiny_model, [images_of(rooms[1], "c"), images_of(rooms[0], "d")])
    for name, trace in first.traces.items():
        assert torch.equal(trace, second.traces[name].flip(0)), name
    assert image_seed(rooms[0].images) == image_seed(rooms[0].images.clone()) != image_seed(rooms[1].images)
    assert 0 <= image_seed(rooms[0].images) < 2**63
    # Images that differ in one pixel by little give nearly the same prediction, and quite another draw.
    images = rooms[0].images.clone()
    images[0, 0, 0, 0] += 1e-4 if images[0, 0, 0, 0] < 0.5 else -1e-4
    other = calibrate(tiny_model, [ImageSet("a", images)]).traces["points.q"]
    assert bool(((other / first.traces["points.q"][:1]).log().abs() > 0.1).any())


def test_lean_memory_gives_the_same_traces(tiny_model: TinyVGGT, rooms: tuple[Scene, ...]) -> None:
    lean, plain = (calibrate(tiny_model, [images_of(rooms[0])], memory=memory) for memory in ("lean", "plain"))
    for name, trace in lean.traces.items():
        torch.testing.assert_close(trace, plain.traces[name], rtol=1e-3, atol=0)


def test_autocast_runs_the_forward_in_its_type(tiny_model: TinyVGGT, rooms: tuple[Scene, ...]) -> None:
    exact, rounded = (calibrate(tiny_model, [images_of(rooms[0])], autocast=t) for t in (None, torch.bfloat16))
    assert not same(exact, rounded)
    torch.testing.assert_close(exact.scores(), rounded.scores(), rtol=0.3, atol=0.05)


def test_an_adapters_own_errors_need_truth_and_are_not_asked(tiny_model: TinyVGGT, rooms: tuple[Scene, ...]) -> None:
    class Own:
        vggt = resolve_adapter(TinyVGGT(), "vggt")

        @hookimpl
        def hess_claim_model(self, model: nn.Module) -> bool:
            return True

        @hookimpl
        def hess_find_global_attention(self, model: nn.Module) -> Any:
            return self.vggt.sites(model)

        @hookimpl
        def hess_token_layout(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
            return self.vggt.token_layout(model, args, kwargs)

        @hookimpl
        def hess_predict(self, model: nn.Module, images: Tensor) -> Prediction:
            return self.vggt.predict(model, images)

        @hookimpl
        def hess_compute_errors(self, model: nn.Module, scene: Scene) -> Any:
            raise ZeroDivisionError

    manager = get_plugin_manager(entry_points=False)
    register(manager, Own(), "own")
    options: dict[str, Any] = {"adapter": "own", "manager": manager, "memory": "plain"}
    found = calibrate(tiny_model, [rooms[0]], target="self", **options)
    assert same(found, calibrate(tiny_model, [images_of(rooms[0])], memory="plain"))
    with pytest.raises(AdapterError, match="'own' failed in hess_compute_errors: ZeroDivisionError"):
        calibrate(tiny_model, [rooms[0]], **options)


def test_a_killed_calibration_ends_with_the_same_traces(
    tiny_model: TinyVGGT, rooms: tuple[Scene, ...], tmp_path: Path
) -> None:
    sets = [images_of(room) for room in rooms]

    def stop(done: int, total: int, scene: str) -> None:
        if done == 2 and scene:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_model, sets, output=tmp_path / "a.hess", progress=stop)
    with pytest.raises(CalibrationError, match=r"with target = 'auto', this one has 'self'; delete"):
        calibrate(tiny_model, sets, output=tmp_path / "a.hess", target="self")
    found = calibrate(tiny_model, sets, output=tmp_path / "a.hess")
    assert same(found, calibrate(tiny_model, sets)) and same(found, Profile.load(tmp_path / "a.hess"))


# ---------------------------------------------------------------- truth and none


def test_truth_is_not_mixed_with_none(tiny_model: TinyVGGT, rooms: tuple[Scene, ...], tmp_path: Path) -> None:
    wanted = "against its ground truth and .* cannot be averaged; give scenes of one kind"
    mixed = [rooms[0], images_of(rooms[1]), rooms[2]]
    for scenes in (mixed, mixed[::-1], mixed[1:]):
        with pytest.raises(CalibrationError, match=wanted):
            calibrate(tiny_model, scenes, eps=1e6)
    assert calibrate(tiny_model, mixed, target="self").scenes == tuple(room.name for room in rooms)
    truth = calibrate(tiny_model, mixed, target="truth", eps=1e6)
    assert truth.scenes == (rooms[0].name, rooms[2].name)
    assert "images without ground truth" in truth.metadata["skipped"][rooms[1].name]
    # Also where one kind was measured before a kill.
    with pytest.raises(CalibrationError, match=wanted):
        calibrate(tiny_model, mixed[:2], output=tmp_path / "a.hess", eps=1e6)
    with pytest.raises(CalibrationError, match=wanted):
        calibrate(tiny_model, mixed[:2], output=tmp_path / "a.hess", eps=1e6)
    assert not (tmp_path / "a.hess").exists()


def test_images_have_no_truth_to_measure_against(tiny_model: TinyVGGT, rooms: tuple[Scene, ...]) -> None:
    with pytest.raises(CalibrationError, match=r"images without ground truth, calibrating against .* give data that"):
        calibrate(tiny_model, [images_of(rooms[0])], target="truth")
    with pytest.raises(CalibrationError, match="target is 'none', wanted one of auto, truth, self"):
        calibrate(tiny_model, [rooms[0]], target="none")
    with pytest.raises(SceneError, match="images without ground truth, evaluating needs true cameras; give data that"):
        compare(tiny_model, [images_of(rooms[0])], [Arm("dense")])  # type: ignore[list-item]


def test_a_folder_of_photographs_is_calibrated_on(tmp_path: Path, rooms: tuple[Scene, ...]) -> None:
    for index, image in enumerate(rooms[0].images):
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    output = tmp_path / "own.hess"
    arguments = ["--model", "demo", "--data", f"images:{tmp_path}"]
    result = CliRunner().invoke(main, ["calibrate", *arguments, "-o", str(output)])
    assert result.exit_code == 0, result.output
    assert "ground-truth-free: errors were measured against the model's own predictions" in result.stdout
    profile = Profile.load(output)
    assert profile.metadata["target"] == "self" and profile.scenes == (tmp_path.name,)
    result = CliRunner().invoke(main, ["calibrate", *arguments, "-o", str(output), "--target", "truth"])
    assert result.exit_code == 1 and "images without ground truth" in result.stderr
    assert same(profile, Profile.load(output))
    result = CliRunner().invoke(main, ["evaluate", *arguments])
    assert result.exit_code == 1 and "evaluating needs true cameras" in result.stderr
    assert result.stderr.count("Error: ") == 1 and "Traceback" not in result.output


# ---------------------------------------------------------------- does it find the heads that truth finds?


@pytest.mark.slow
def test_heads_rank_as_with_ground_truth() -> None:
    """Better than all but one in a thousand shuffles, for cameras, points and both; on eight rooms."""
    model, scenes = load_demo_model(), list(RoomScenes("validation", 8, 8))
    truth = calibrate(model, scenes)
    free = calibrate(model, [images_of(scene) for scene in scenes])
    generator = torch.Generator().manual_seed(0)
    for weight in (0.0, 0.5, 1.0):
        wanted, found = truth.scores(weight), free.scores(weight)
        shuffled = [
            float(
                spearman(torch.stack([layer[torch.randperm(8, generator=generator)] for layer in found]), wanted).mean()
            )
            for _ in range(1000)
        ]
        agreement = float(spearman(found, wanted).mean())
        assert agreement > max(0.6, max(shuffled)), (weight, agreement)
