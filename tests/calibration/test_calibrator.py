"""Calibration: the traces are the paper's, nothing of the model changes, and a kill costs one scene."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from hess_plugin import (
    AdapterError,
    CalibrationError,
    PatchError,
    Profile,
    ProfileError,
    Scene,
    SceneError,
    hookimpl,
    patch,
)
from hess_plugin.calibration import calibrator, rounds
from hess_plugin.calibration.alignment import align
from hess_plugin.calibration.calibrator import calibrate
from hess_plugin.calibration.fisher import head_traces, only_sites_require_grad
from hess_plugin.calibration.record import Findings
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.demo.rooms import make_scene
from hess_plugin.plugins import get_plugin_manager, register, resolve_adapter

ANY_DISTANCE = 1e6  # random weights predict points far from the truth


class Rooms(Sequence[Scene]):
    """Rooms that note which of them were measured, not only read (see `note_measured`)."""

    in_use: Rooms | None = None

    def __init__(self, *scenes: Scene) -> None:
        self.scenes = scenes
        self.names = [scene.name for scene in scenes]
        self.measured: list[str] = []

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: Any) -> Any:
        Rooms.in_use = self
        return self.scenes[index]


@pytest.fixture(autouse=True)
def note_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    original = rounds._measure

    def measure(measurer: Any, scene: Scene, digest: str) -> Findings:
        if Rooms.in_use is not None:
            Rooms.in_use.measured.append(scene.name)
        return original(measurer, scene, digest)

    monkeypatch.setattr(Rooms, "in_use", None)
    monkeypatch.setattr(rounds, "_measure", measure)


@pytest.fixture
def tiny_model(tiny_model: TinyVGGT) -> TinyVGGT:
    """The shared model with a camera head that does not answer the same pose for every view."""
    torch.manual_seed(1)
    nn.init.normal_(tiny_model.camera_head.pose_branch.weight, std=0.1)
    return tiny_model


@pytest.fixture(scope="module")
def rooms() -> tuple[Scene, ...]:
    return tuple(make_scene(seed, views=3) for seed in (21, 22, 23))


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves on by a minute with every look."""
    count = itertools.count()

    def now(zone: object) -> object:
        minute = next(count)
        return types.SimpleNamespace(isoformat=lambda timespec: f"2026-01-01T00:{minute:02d}:00+00:00")

    frozen = types.SimpleNamespace(datetime=types.SimpleNamespace(now=now), timezone=types.SimpleNamespace(utc=None))
    monkeypatch.setattr(calibrator, "datetime", frozen)


def run(model: nn.Module, scenes: Any, **options: Any) -> Profile:
    return calibrate(model, scenes, **{"eps": ANY_DISTANCE, **options})


def stop_at(count: int) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, scene: str) -> None:
        if done == count and scene:
            raise KeyboardInterrupt

    return progress


# ---------------------------------------------------------------- what is measured


def naive_errors(model: TinyVGGT, scene: Scene) -> tuple[Tensor, Tensor]:
    """Eq. 3 and 4 of HeSS, written down again."""
    scene = scene.normalised()
    prediction = resolve_adapter(model).predict(model, scene.images)
    similarity = align(prediction, scene).similarity
    scale, rotation, shift = (part.float() for part in (similarity.scale, similarity.rotation, similarity.translation))

    def mapped(points: Tensor) -> Tensor:
        return scale * points @ rotation.T + shift

    camera = sum(
        (mapped(centre) - true).square().sum() for centre, true in zip(prediction.centres, scene.centres, strict=True)
    ) / (2 * scene.views)
    truth, valid = scene.world_points() or (torch.empty(0), torch.empty(0))
    cloud = truth[valid]
    points = mapped(prediction.points[prediction.confidence >= prediction.min_confidence])
    exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}
    nearest = torch.cat([torch.cdist(part.detach(), cloud, **exact).argmin(1) for part in points.split(256)])
    return camera, (points - cloud[nearest]).square().sum() / (2 * len(points))


def test_traces_are_squared_gradients_of_each_head(tiny_model: TinyVGGT, rooms: tuple[Scene, ...]) -> None:
    pairs = [room.subset([0, 1]) for room in rooms[:2]]
    profile = run(tiny_model, pairs)
    assert profile.scenes == tuple(room.name for room in pairs) and profile.num_heads == 4
    for scene_index, room in enumerate(pairs):
        for name, error in zip(("camera", "points"), naive_errors(tiny_model, room), strict=True):
            for layer, block in enumerate(tiny_model.aggregator.global_blocks):
                (gradient,) = torch.autograd.grad(error, [block.attn.qkv.weight], retain_graph=True)
                for index, letter in enumerate("qkv"):
                    for head in range(4):
                        first = 32 * index + 8 * head
                        wanted = gradient[first : first + 8].double().square().sum().item()
                        found = profile.traces[f"{name}.{letter}"][scene_index, layer, head].item()
                        assert found == pytest.approx(wanted, rel=2e-3), (name, letter, layer, head)
                        assert found > 0


def test_the_same_calibration_gives_the_same_traces(tiny_model: TinyVGGT, rooms: tuple[Scene, ...]) -> None:
    one, two = run(tiny_model, rooms[:1]), run(tiny_model, iter(rooms[:1]))
    assert all(torch.equal(one.traces[name], two.traces[name]) for name in one.traces)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_the_same_traces(
    tiny_model: TinyVGGT, rooms: tuple[Scene, ...], context: Any, tmp_path: Path
) -> None:
    wanted = run(tiny_model, rooms[:1])
    with context():
        found = run(tiny_model, rooms[:1], output=tmp_path / "a.hess")
    assert all(torch.equal(wanted.traces[name], found.traces[name]) for name in wanted.traces)
    assert not any(trace.is_inference() for trace in Profile.load(tmp_path / "a.hess").traces.values())


def test_the_unit_of_a_scene_does_not_matter(tiny_model: TinyVGGT, rooms: tuple[Scene, ...]) -> None:
    room = rooms[0].subset([0, 1])
    c2w = room.c2w.clone()
    c2w[:, :3, 3] *= 1000.0
    millimetres = replace(room, c2w=c2w, depth=room.depth * 1000.0)
    one, two = run(tiny_model, [room]), run(tiny_model, [millimetres])
    torch.testing.assert_close(one.scores(), two.scores(), rtol=1e-2, atol=1e-4)


def test_autocast_runs_the_forward_in_its_type(tiny_model: TinyVGGT, rooms: tuple[Scene, ...]) -> None:
    exact, rounded = run(tiny_model, rooms[:1]), run(tiny_model, rooms[:1], autocast=torch.bfloat16)
    assert rounded.metadata["autocast"] == "bfloat16" and exact.metadata["autocast"] is None
    assert not torch.equal(exact.traces["camera.q"], rounded.traces["camera.q"])
    torch.testing.assert_close(exact.scores(), rounded.scores(), rtol=0.3, atol=0.05)


def test_where_a_profile_comes_from_is_recorded(tiny_model: TinyVGGT, rooms: tuple[Scene, ...], tmp_path: Path) -> None:
    profile = run(tiny_model, rooms[:1], output=tmp_path / "a.hess", metadata={"weights": "random"}, camera_weight=0.2)
    found = Profile.load(tmp_path / "a.hess")
    assert found.adapter == "vggt" and found.camera_weight == 0.2 and found.fingerprint == profile.fingerprint
    metadata = found.metadata
    assert metadata["weights"] == "random" and metadata["model_class"].endswith("TinyVGGT")
    assert metadata["created"].startswith("2026-01-01T00:0") and metadata["device"] == "cpu"
    assert metadata["dtype"] == "float32" and metadata["skipped"] == {} and metadata["eps"] == ANY_DISTANCE
    assert set(metadata["versions"]) >= {"torch", "hess_plugin"}
    assert run(tiny_model, rooms[:1]).camera_weight == 0.5  # the family's
    with patch(tiny_model, profile=found, sparsity=0.5, block_q=8, block_k=8):
        tiny_model(rooms[0].images)


# ---------------------------------------------------------------- the model is left alone


def state_of(model: nn.Module) -> list[object]:
    flags = [(n, p.requires_grad, p._version, id(p), None if p.grad is None else p.grad.sum().item())
             for n, p in model.named_parameters()]  # fmt: skip
    return [flags, [(n, m.training, len(m._forward_hooks), list(m.__dict__)) for n, m in model.named_modules()]]


class Failing:
    """An adapter whose errors fail in the way it is told."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.vggt = error, resolve_adapter(TinyVGGT(), "vggt")

    @hookimpl
    def hess_find_global_attention(self, model: nn.Module) -> Any:
        return self.vggt.sites(model)

    @hookimpl
    def hess_compute_errors(self, model: nn.Module) -> Any:
        assert not model.training
        raise self.error


@pytest.mark.parametrize("error", [None, ZeroDivisionError(), KeyboardInterrupt(), CalibrationError("no error.")])
def test_flags_and_modes_are_restored_whatever_happens(
    tiny_model: TinyVGGT, rooms: tuple[Scene, ...], error: BaseException | None
) -> None:
    tiny_model.train()
    tiny_model.camera_head.eval()
    parameters = list(tiny_model.parameters())
    parameters[0].requires_grad_(False)
    tiny_model.aggregator.global_blocks[0].attn.qkv.weight.requires_grad_(False)
    parameters[3].grad = torch.ones_like(parameters[3])
    before = state_of(tiny_model)
    if error is None:
        run(tiny_model, rooms[:1])
    else:
        manager = get_plugin_manager(entry_points=False)
        register(manager, Failing(error), "failing")
        # A mistake in the adapter's own lines is told as the adapter's.
        with pytest.raises(AdapterError if isinstance(error, ZeroDivisionError) else type(error)):
            run(tiny_model, rooms[:1], adapter="failing", manager=manager)
    assert state_of(tiny_model) == before


def test_gradient_reaches_projections_only(tiny_model: TinyVGGT) -> None:
    sites = resolve_adapter(tiny_model).sites(tiny_model)
    with only_sites_require_grad(tiny_model, sites) as weights:
        assert [id(w) for w in weights] == [id(b.attn.qkv.weight) for b in tiny_model.aggregator.global_blocks]
        assert {id(p) for p in tiny_model.parameters() if p.requires_grad} == {id(w) for w in weights}


def test_errors_that_cannot_be_differentiated_are_told(tiny_model: TinyVGGT) -> None:
    sites = resolve_adapter(tiny_model).sites(tiny_model)
    with only_sites_require_grad(tiny_model, sites) as weights:
        with pytest.raises(CalibrationError, match="the error is nan, wanted a finite number"):
            head_traces(torch.tensor(float("nan")), sites, weights, retain_graph=False)
        with pytest.raises(CalibrationError, match=r"no gradient .*must not run under no_grad"):
            head_traces(torch.tensor(1.0), sites, weights, retain_graph=False)
        kink = (weights[0] - weights[0].detach()).square().sum().sqrt()  # 0, with a gradient of 0 / 0
        with pytest.raises(CalibrationError, match="the gradient of W_Q is not finite"):
            head_traces(kink, sites, weights, retain_graph=False)
        only_first = head_traces(weights[0].sum(), sites, weights, retain_graph=False)
        assert only_first["q"].tolist() == [[256.0] * 4, [0.0] * 4]


def test_a_patched_model_is_refused(tiny_model: TinyVGGT, rooms: tuple[Scene, ...]) -> None:
    with patch(tiny_model, sparsity=0.5), pytest.raises(PatchError, match="patched; remove the patch before"):
        run(tiny_model, rooms)


def test_sites_with_different_heads_are_refused(tiny_model: TinyVGGT, rooms: tuple[Scene, ...]) -> None:
    tiny_model.aggregator.global_blocks[1].attn.num_heads = 2
    with pytest.raises(CalibrationError, match=r"different numbers of heads \(\[2, 4\]\)"):
        run(tiny_model, rooms)


# ---------------------------------------------------------------- killed and resumed


@pytest.mark.parametrize("kill_at", [0, 1, 2])
def test_a_killed_calibration_ends_with_the_same_file(
    tiny_model: TinyVGGT, rooms: tuple[Scene, ...], tmp_path: Path, kill_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    collinear = replace(rooms[1], depth=None, name="flat").subset([0, 1])
    scenes = (rooms[0], collinear, rooms[2])
    run(tiny_model, Rooms(*scenes), output=tmp_path / "whole.hess")
    stamp = Profile.load(tmp_path / "whole.hess").metadata["created"]
    first, second, output = Rooms(*scenes), Rooms(*scenes), tmp_path / "killed.hess"
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, first, output=output, progress=stop_at(kill_at))
    assert first.measured == first.names[:kill_at] and not output.exists()
    assert Path(f"{output}.partial").exists() == (kill_at > 0)
    again = run(tiny_model, second, output=output)
    assert second.measured == second.names[kill_at:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.hess", "whole.hess"]
    # The date of the first scene is kept over restarts; it is the only difference between two calibrations.
    dates = [stamp.encode(), again.metadata["created"].encode()]
    assert dates[0] != dates[1]
    assert output.read_bytes() == (tmp_path / "whole.hess").read_bytes().replace(*dates)
    assert again.scenes == (rooms[0].name, rooms[2].name) and set(again.metadata["skipped"]) == {"flat"}


def test_killed_again_and_again(tiny_model: TinyVGGT, rooms: tuple[Scene, ...], tmp_path: Path) -> None:
    output, created = tmp_path / "a.hess", set()
    for kill_at in (1, 1, 2):
        scenes = Rooms(*rooms)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_model, scenes, output=output, progress=stop_at(kill_at))
        with safetensors.safe_open(f"{output}.partial", framework="pt") as file:
            created.add(file.metadata()["hess_calibration"].split('"started"')[1][:30])
    assert len(created) == 1
    scenes = Rooms(*rooms)
    run(tiny_model, scenes, output=output)
    assert scenes.measured == scenes.names[2:]


def test_more_scenes_than_before_go_on_in_any_order(
    tiny_model: TinyVGGT, rooms: tuple[Scene, ...], tmp_path: Path
) -> None:
    wanted = run(tiny_model, rooms)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, rooms[1:], output=tmp_path / "a.hess", progress=stop_at(1))
    scenes = Rooms(*rooms)
    found = run(tiny_model, scenes, output=tmp_path / "a.hess")
    assert scenes.measured == [rooms[0].name, rooms[2].name] and found.scenes == wanted.scenes
    assert all(torch.equal(found.traces[name], wanted.traces[name]) for name in wanted.traces)


def test_a_scene_that_changed_is_measured_again(tiny_model: TinyVGGT, rooms: tuple[Scene, ...], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, rooms, output=tmp_path / "a.hess", progress=stop_at(2))
    changed = replace(rooms[1], name=rooms[0].name)
    scenes = Rooms(changed, rooms[2])
    found = run(tiny_model, scenes, output=tmp_path / "a.hess")
    assert scenes.measured == scenes.names
    assert torch.equal(found.traces["points.q"], run(tiny_model, [changed, rooms[2]]).traces["points.q"])


@pytest.fixture
def partial(tiny_model: TinyVGGT, rooms: tuple[Scene, ...], tmp_path: Path) -> Path:
    """The partial file of a calibration of `a.hess` killed after one scene."""
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, rooms, output=tmp_path / "a.hess", progress=stop_at(1), metadata={"views": 3, "size": (1, 2)})
    return tmp_path / "a.hess.partial"


OWN = {"metadata": {"views": 3, "size": (1, 2)}}


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"metadata": {"views": 4, "size": (1, 2)}}, "with views = 3, this one has 4; delete .*a.hess.partial"),
        ({"metadata": {"views": 3}}, r"with size = \[1, 2\], this one has None"),
        ({**OWN, "eps": 0.5}, r"with eps = 1000000\.0, this one has 0\.5"),
        ({**OWN, "autocast": torch.bfloat16}, "with autocast = None, this one has 'bfloat16'"),
    ],
)
def test_a_partial_file_of_another_calibration_is_refused_and_kept(
    tiny_model: TinyVGGT, rooms: tuple[Scene, ...], partial: Path, options: dict[str, Any], sentence: str
) -> None:
    before = partial.read_bytes()
    with pytest.raises(CalibrationError, match=sentence):
        run(tiny_model, rooms, output=partial.with_suffix(""), **options)
    assert partial.read_bytes() == before and not partial.with_suffix("").exists()
    scenes = Rooms(*rooms)
    run(tiny_model, scenes, output=partial.with_suffix(""), **OWN, camera_weight=0.9)  # changes no trace
    assert scenes.measured == scenes.names[1:]


def test_a_partial_file_of_other_weights_is_refused(
    tiny_model: TinyVGGT, rooms: tuple[Scene, ...], partial: Path
) -> None:
    with torch.no_grad():
        tiny_model.aggregator.global_blocks[0].attn.qkv.weight += 1
    with pytest.raises(CalibrationError, match="is of a calibration with model_digest = "):
        run(tiny_model, rooms, output=partial.with_suffix(""), **OWN)


def damage(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    yield from (b"", data[:4], data[:100], data[: len(data) // 2], data[:-1], b"x" * 500)
    yield safetensors.torch.save({"a": torch.zeros(1)})
    for header in ("{", "[1]", "{}", '{"settings": 1, "started": "", "facts": {}, "skipped": {}, "scenes": 5}'):
        yield safetensors.torch.save({"a": torch.zeros(1)}, metadata={"hess_calibration": header})


def test_damaged_partial_files_are_told_and_kept(tiny_model: TinyVGGT, rooms: tuple[Scene, ...], partial: Path) -> None:
    for content in list(damage(partial)):
        partial.write_bytes(content)
        with pytest.raises(CalibrationError, match=r"a\.hess\.partial is damaged \(.*\); delete .* to start again\."):
            run(tiny_model, rooms, output=partial.with_suffix(""), **OWN)
        assert partial.read_bytes() == content


def test_metadata_that_cannot_be_written_is_told_before_any_scene(
    tiny_model: TinyVGGT, rooms: tuple[Scene, ...], tmp_path: Path
) -> None:
    scenes = Rooms(*rooms)
    with pytest.raises(TypeError):
        run(tiny_model, scenes, output=tmp_path / "a.hess", metadata={"path": tmp_path})
    assert scenes.measured == [] and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- scenes that do not fit


def test_progress_is_told_before_each_scene_and_at_the_end(tiny_model: TinyVGGT, rooms: tuple[Scene, ...]) -> None:
    for scenes, total in ((rooms[:2], 2), ((room for room in rooms[:2]), 0)):
        told: list[tuple[int, int, str]] = []
        run(tiny_model, scenes, progress=lambda *args, told=told: told.append(args))
        assert told == [(0, total, rooms[0].name), (1, total, rooms[1].name), (2, 2, "")]


def test_two_scenes_of_one_name_are_refused(tiny_model: TinyVGGT, rooms: tuple[Scene, ...], tmp_path: Path) -> None:
    twin = replace(rooms[1], name=rooms[0].name)
    with pytest.raises(CalibrationError, match=f"two scenes are called '{rooms[0].name}'"):
        run(tiny_model, [rooms[0], twin], output=tmp_path / "a.hess")
    assert not (tmp_path / "a.hess").exists()


def test_a_scene_that_cannot_be_aligned_is_left_out_with_its_reason(
    tiny_model: TinyVGGT, rooms: tuple[Scene, ...], tmp_path: Path
) -> None:
    flat = replace(rooms[1], depth=None, name="flat").subset([0, 1])
    empty = replace(rooms[1], depth=None, name="empty").subset([0])
    profile = run(tiny_model, [flat, rooms[0], empty], output=tmp_path / "a.hess")
    assert profile.scenes == (rooms[0].name,)
    skipped = Profile.load(tmp_path / "a.hess").metadata["skipped"]
    assert list(skipped) == ["empty", "flat"]
    assert "flat has 2 views and no depth or points" in skipped["flat"] and "empty has no size" in skipped["empty"]


@pytest.mark.parametrize("scenes", [0, 2])
def test_without_any_usable_scene_nothing_is_written(
    tiny_model: TinyVGGT, rooms: tuple[Scene, ...], tmp_path: Path, scenes: int
) -> None:
    flat = [replace(room, depth=None).subset([0, 1]) for room in rooms[:scenes]]
    wanted = f"none of {scenes} scenes gave a usable error: " + ("Scene room-21 has 2 views" if scenes else "there was")
    with pytest.raises(CalibrationError, match=wanted):
        run(tiny_model, flat, output=tmp_path / "a.hess")
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_without_a_usable_scene_keeps_what_others_measured(
    tiny_model: TinyVGGT, rooms: tuple[Scene, ...], partial: Path
) -> None:
    flat = replace(rooms[1], depth=None, name="flat").subset([0, 1])
    with pytest.raises(CalibrationError, match="none of 1 scenes gave a usable error: Scene flat"):
        run(tiny_model, [flat], output=partial.with_suffix(""), **OWN)
    scenes = Rooms(*rooms)
    profile = run(tiny_model, scenes, output=partial.with_suffix(""), **OWN)
    assert scenes.measured == scenes.names[1:] and profile.metadata["skipped"] == {}


def test_a_model_that_predicts_nan_is_told(tiny_model: TinyVGGT, rooms: tuple[Scene, ...], tmp_path: Path) -> None:
    with torch.no_grad():
        tiny_model.point_head.mlp.fc2.bias.fill_(torch.nan)
    with pytest.raises(CalibrationError, match="values in points that are not finite; run the model in float32"):
        run(tiny_model, rooms[:1], output=tmp_path / "a.hess")
    assert not list(tmp_path.iterdir())


def test_images_that_are_not_finite_are_no_scene(rooms: tuple[Scene, ...]) -> None:
    with pytest.raises(SceneError, match="images has 1 values that are not finite"):
        images = rooms[0].images.clone()
        images[0, 0, 0, 0] = torch.nan
        replace(rooms[0], images=images)


def test_a_malformed_scene_stops_the_run_and_keeps_what_was_measured(
    tiny_model: TinyVGGT, rooms: tuple[Scene, ...], tmp_path: Path
) -> None:
    class Broken(Rooms):
        def __getitem__(self, index: Any) -> Any:
            if index == 1:
                raise SceneError("Scene file cameras.json is not JSON.")
            return super().__getitem__(index)

    with pytest.raises(SceneError, match="not JSON"):
        run(tiny_model, Broken(*rooms), output=tmp_path / "a.hess")
    scenes = Rooms(*rooms)
    run(tiny_model, scenes, output=tmp_path / "a.hess")
    assert scenes.measured == scenes.names[1:]


def test_images_of_a_size_the_model_does_not_take_stop_the_run(tiny_model: TinyVGGT, rooms: tuple[Scene, ...]) -> None:
    from hess_plugin import AdapterError

    with pytest.raises(AdapterError, match=r"multiples of 10; bring .* Scene\.framed\(Framing\(10\)\)"):
        run(tiny_model, [rooms[0].resized(64, 60)])


def test_one_view_with_depth_is_enough(tiny_model: TinyVGGT, rooms: tuple[Scene, ...]) -> None:
    profile = run(tiny_model, [rooms[0].subset([0])])
    assert torch.isfinite(profile.scores()).all()


def test_scenes_without_points_have_a_camera_error_only(tiny_model: TinyVGGT, room: Scene, tmp_path: Path) -> None:
    bare = Rooms(replace(room, depth=None))
    output = tmp_path / "a.hess"
    for weight in (0.5, 1.0):  # where no scene has points, the score is the camera's share alone
        profile = run(tiny_model, bare, camera_weight=weight)
        assert profile.mean_traces("points") is None
        shares = profile.mean_traces("camera")
        assert shares is not None
        torch.testing.assert_close(profile.scores(), shares / shares.sum(1, keepdim=True))
    with pytest.raises(ProfileError, match=r"with camera_weight 0\.0 the profile has no gradient"):
        run(tiny_model, bare, camera_weight=0.0, output=output)
    assert [path.name for path in tmp_path.iterdir()] == ["a.hess.partial"]  # the traces are worth keeping
    bare.measured.clear()
    run(tiny_model, bare, camera_weight=1.0, output=output)
    assert bare.measured == [] and output.exists()


def test_mixed_scenes_average_each_error_over_those_that_have_it(
    tiny_model: TinyVGGT, room: Scene, rooms: tuple[Scene, ...]
) -> None:
    profile = run(tiny_model, [replace(room, depth=None), rooms[0]])
    assert bool(profile.traces["points.q"][0].isnan().all()) and bool(profile.traces["points.q"][1].isfinite().all())
    alone = run(tiny_model, [rooms[0]])
    assert torch.equal(profile.mean_traces("points"), alone.mean_traces("points"))
    assert torch.isfinite(profile.scores(0.0)).all() and torch.isfinite(profile.scores(0.5)).all()
