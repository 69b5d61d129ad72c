"""The profile: written and read bit for bit, refused when damaged, scored as the paper says."""

from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from hess_plugin import Profile, ProfileError, ProfileMismatch, Site
from hess_plugin.demo.model import TinyVGGT, TinyVGGTConfig
from hess_plugin.plugins import resolve_adapter
from hess_plugin.profiles import ERROR_NAMES, FORMAT_VERSION, weights_fingerprint
from hess_plugin.sites import PROJECTIONS

SITES = ("aggregator.global_blocks.0.attn", "aggregator.global_blocks.1.attn", "aggregator.global_blocks.2.attn")
SCENES = ("kitchen", "Büro", "a/b c")


def traces_of(scenes: int = 3, layers: int = 3, heads: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (scenes, layers, heads)
    # Over sixty orders of magnitude: nothing may be rounded on the way to the file.
    return {
        f"{error}.{projection}": torch.rand(shape, dtype=torch.float64, generator=generator)
        * 10.0 ** torch.randint(-30, 30, shape, generator=generator)
        for error in ERROR_NAMES
        for projection in PROJECTIONS
    }


def make(**changes: Any) -> Profile:
    fields: dict[str, Any] = {
        "adapter": "vggt",
        "sites": SITES,
        "num_heads": 4,
        "scenes": SCENES,
        "traces": traces_of(),
        "camera_weight": 0.3,
        "fingerprint": "0123456789abcdef",
        "metadata": {"weights": "x", "resolution": 518, "nested": {"list": [1, None, 2.5]}, "é": "ü"},
    }
    return Profile(**{**fields, **changes})


def with_traces(**named: Tensor) -> Profile:
    """A profile whose other traces are all one."""
    first = next(iter(named.values()))
    traces = {f"{e}.{p}": torch.ones_like(first) for e in ERROR_NAMES for p in PROJECTIONS}
    traces |= {name.replace("_", "."): trace for name, trace in named.items()}
    return make(
        traces=traces, scenes=tuple("abc"[: len(first)]), sites=SITES[: first.shape[1]], num_heads=first.shape[2]
    )


# ---------------------------------------------------------------- the file


def test_a_round_trip_is_bit_exact(tmp_path: Path) -> None:
    profile = make()
    profile.traces["points.q"][1] = torch.nan
    profile.traces["camera.v"][0, 0, 0] = 5e-324
    profile.save(tmp_path / "a.hess")
    loaded = Profile.load(str(tmp_path / "a.hess"))
    for name in ("adapter", "sites", "num_heads", "scenes", "camera_weight", "fingerprint", "metadata"):
        assert getattr(loaded, name) == getattr(profile, name), name
    assert set(loaded.traces) == set(profile.traces)
    for name, trace in profile.traces.items():
        assert loaded.traces[name].dtype == torch.float64
        assert torch.equal(loaded.traces[name].view(torch.int64), trace.view(torch.int64)), name
    loaded.save(tmp_path / "b.hess")
    assert (tmp_path / "a.hess").read_bytes() == (tmp_path / "b.hess").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.hess", "b.hess"]


def test_traces_of_any_layout_and_type_are_written(tmp_path: Path) -> None:
    traces = {name: trace.float().mT.contiguous().mT for name, trace in traces_of().items()}
    make(traces=traces).save(tmp_path / "a.hess")
    loaded = Profile.load(tmp_path / "a.hess")
    assert all(torch.equal(loaded.traces[name], trace.double()) for name, trace in traces.items())


def test_metadata_that_is_not_json_leaves_the_old_file(tmp_path: Path) -> None:
    make().save(tmp_path / "a.hess")
    before = (tmp_path / "a.hess").read_bytes()
    with pytest.raises(TypeError):
        make(metadata={"path": tmp_path}).save(tmp_path / "a.hess")
    assert (tmp_path / "a.hess").read_bytes() == before and os.listdir(tmp_path) == ["a.hess"]


def test_every_truncation_is_told(tmp_path: Path) -> None:
    make().save(tmp_path / "a.hess")
    data = (tmp_path / "a.hess").read_bytes()
    cut = tmp_path / "cut.hess"
    lengths = {*range(0, len(data), 37), *range(12), *range(len(data) - 12, len(data))}
    for length in sorted(lengths):
        cut.write_bytes(data[:length])
        with pytest.raises(ProfileError, match=r"cut\.hess is truncated or not a profile"):
            Profile.load(cut)
    cut.write_bytes(data + b"x")
    with pytest.raises(ProfileError):
        Profile.load(cut)


def test_flipped_bytes_never_give_anything_but_a_profile_or_a_profile_error(tmp_path: Path) -> None:
    make().save(tmp_path / "a.hess")
    data = bytearray((tmp_path / "a.hess").read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    for position in range(0, header, 13):
        for value in (0, data[position] ^ 1, 0x7B, 0xFF):
            broken = bytearray(data)
            broken[position] = value
            (tmp_path / "b.hess").write_bytes(broken)
            try:
                Profile.load(tmp_path / "b.hess").check([])
            except ProfileError as error:
                assert "b.hess" in str(error) or isinstance(error, ProfileMismatch)


def test_files_that_are_no_profile_are_refused(tmp_path: Path) -> None:
    executed = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(executed),))

    (tmp_path / "pickle.hess").write_bytes(pickle.dumps(Payload()))
    torch.save({"traces": torch.zeros(1)}, tmp_path / "torch.hess")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "plain.hess")
    (tmp_path / "folder.hess").mkdir()
    wanted = {
        "none": "is not a file; give a profile written by `hess-patch calibrate`",
        "folder": "is not a file",
        "pickle": "is truncated or not a profile",
        "torch": "is truncated or not a profile",
        "plain": "is a safetensors file but not a profile",
    }
    for name, sentence in wanted.items():
        with pytest.raises(ProfileError, match=rf"{name}\.hess {sentence}"):
            Profile.load(tmp_path / f"{name}.hess")
    assert not executed.exists()


def rewrite(path: Path, change: Any) -> None:
    """Write a profile file whose header was changed."""
    make().save(path)
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["hess_profile"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text = change(header, tensors)
    text = text if isinstance(text, str) else json.dumps(header)
    safetensors.torch.save_file(tensors, path, metadata={"hess_profile": text})


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda h, t: h.update(format_version=FORMAT_VERSION + 1), "has profile format 2, .* reads 1; upgrade"),
        (lambda h, t: h.pop("format_version"), "has profile format None"),
        (lambda h, t: h.pop("sites"), "is not a complete profile: KeyError"),
        (lambda h, t: h.update(num_heads="four"), "is not a complete profile"),
        (lambda h, t: h.update(num_heads=5), r"wanted \[scenes, L, H\] = \[3, 3, 5\]"),
        (lambda h, t: h.update(sites=None), "is not a complete profile"),
        (lambda h, t: h.update(metadata=3), "is not a complete profile"),
        (lambda h, t: h.update(camera_weight=1.5), "camera_weight is 1.5, wanted a number from 0 to 1"),
        (lambda h, t: h.update(camera_weight=float("nan")), "camera_weight is nan"),
        (lambda h, t: t.pop("camera.q"), "a profile holds the traces"),
        (lambda h, t: t.update(extra=torch.zeros(1)), "a profile holds the traces"),
        (lambda h, t: t.update({"camera.q": -t["camera.q"]}), "a negative or infinite value"),
        (lambda h, t: t.update({"camera.q": t["camera.q"] / 0}), "a negative or infinite value"),
        (lambda h, t: h.update(scenes=[]), "needs scenes, sites and heads"),
        (lambda h, t: "{", "has a broken header"),
        (lambda h, t: "[1]", "has a broken header"),
    ],
)
def test_headers_that_are_wrong_are_told_with_the_file(tmp_path: Path, change: Any, sentence: str) -> None:
    path = tmp_path / "a.hess"
    rewrite(path, change)
    with pytest.raises(ProfileError, match=sentence) as caught:
        Profile.load(path)
    assert "a.hess" in str(caught.value)


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("weight", [None, 0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_scores_are_the_mixed_shares_of_the_mean_traces(weight: float | None, projection: str) -> None:
    profile = make()
    camera, points = (profile.traces[f"{error}.{projection}"].mean(0) for error in ERROR_NAMES)
    lam = 0.3 if weight is None else weight
    wanted = lam * camera / camera.sum(1, keepdim=True) + (1 - lam) * points / points.sum(1, keepdim=True)
    scores = profile.scores(weight, projection)
    torch.testing.assert_close(scores, wanted)
    torch.testing.assert_close(scores.sum(1), torch.ones(3, dtype=torch.float64))


def test_a_layer_without_camera_gradient_is_scored_by_its_points() -> None:
    camera = torch.rand(2, 3, 4, dtype=torch.float64)
    camera[:, 1] = 0  # what the last layer of a model may do
    points = torch.rand(2, 3, 4, dtype=torch.float64)
    profile = with_traces(camera_q=camera, points_q=points)
    shares = points.mean(0) / points.mean(0).sum(1, keepdim=True)
    for weight in (0.3, 0.5, 0.999):
        scores = profile.scores(weight)
        torch.testing.assert_close(scores[1], shares[1])
        torch.testing.assert_close(scores.sum(1), torch.ones(3, dtype=torch.float64))
    assert torch.equal(profile.scores(0.0), shares)
    with pytest.raises(ProfileError, match=r"no gradient at aggregator\.global_blocks\.1\.attn \(1 of 3 sites\)"):
        profile.scores(1.0)


def test_scenes_without_an_error_do_not_enter_its_mean() -> None:
    points = torch.rand(3, 2, 4, dtype=torch.float64)
    points[1] = torch.nan
    camera = torch.rand(3, 2, 4, dtype=torch.float64)
    profile = with_traces(points_q=points, camera_q=camera)
    torch.testing.assert_close(profile.mean_traces("points"), points[[0, 2]].mean(0))
    assert torch.isfinite(profile.scores(0.5)).all()


def test_an_error_that_no_scene_has() -> None:
    points = torch.full((2, 2, 4), torch.nan, dtype=torch.float64)
    camera = torch.rand(2, 2, 4, dtype=torch.float64)
    profile = with_traces(points_q=points, camera_q=camera)
    assert profile.mean_traces("points") is None
    shares = camera.mean(0) / camera.mean(0).sum(1, keepdim=True)
    for weight in (0.5, 1.0):
        torch.testing.assert_close(profile.scores(weight), shares)
    with pytest.raises(ProfileError, match=r"camera_weight 0\.0 the profile has no gradient .*change camera_weight"):
        profile.scores(0.0)


def test_scores_do_not_depend_on_the_size_of_an_error() -> None:
    profile = make()
    scaled = {n: t * (1e-12 if n.startswith("camera") else 1e9) for n, t in profile.traces.items()}
    torch.testing.assert_close(make(traces=scaled).scores(), profile.scores())


@pytest.mark.parametrize("weight, projection", [(-0.1, "q"), (1.1, "q"), (float("nan"), "q"), (0.5, "o"), (0.5, "")])
def test_scores_refuse_what_they_cannot_mix(weight: float, projection: str) -> None:
    with pytest.raises(ProfileError, match="wanted q, k or v and 0 to 1"):
        make().scores(weight, projection)


# ---------------------------------------------------------------- whose it is


def sites_of(model: nn.Module) -> list[Site]:
    return resolve_adapter(model).sites(model)


def build(**sizes: int) -> TinyVGGT:
    torch.manual_seed(0)
    return TinyVGGT(TinyVGGTConfig(**{"dim": 32, "num_heads": 4, "depth": 3, "stem": 16, "camera_depth": 1, **sizes}))


def test_check_tells_the_first_difference() -> None:
    sites = sites_of(build())
    profile = make(fingerprint=weights_fingerprint(sites))
    profile.check(sites)
    profile.check(sites, weights_fingerprint(sites))
    with pytest.raises(ProfileMismatch, match="the profile has 3 sites, the model 2; calibrate this model"):
        profile.check(sites[:2])
    with pytest.raises(ProfileMismatch, match=r"site 1 is '.*\.1\.attn' in the profile and '.*\.2\.attn' in the model"):
        profile.check([sites[0], sites[2], sites[1]])
    with pytest.raises(ProfileMismatch, match=r"the profile has 4 heads, .*0\.attn has 2"):
        profile.check(sites_of(build(num_heads=2)))
    with pytest.raises(ProfileMismatch, match=r"other weights \([0-9a-f]{16}, this model has ffff\); .*strict=False"):
        profile.check(sites, "ffff")


def test_the_fingerprint_is_of_the_checkpoint_not_of_its_type() -> None:
    model = build()
    wanted = weights_fingerprint(sites_of(model))
    assert len(wanted) == 16 and int(wanted, 16) >= 0
    assert weights_fingerprint(sites_of(copy.deepcopy(model).bfloat16())) == wanted
    assert weights_fingerprint(sites_of(copy.deepcopy(model).double())) == wanted
    assert weights_fingerprint(sites_of(copy.deepcopy(model).requires_grad_(False).train())) == wanted
    assert weights_fingerprint(sites_of(build())) == wanted


@pytest.mark.parametrize("row", [0, 31, 40, 95])
def test_the_fingerprint_sees_any_projection_change(row: int) -> None:
    model = build()
    before = weights_fingerprint(sites_of(model))
    with torch.no_grad():
        model.aggregator.global_blocks[2].attn.qkv.weight[row, 3] *= 1.1
    assert weights_fingerprint(sites_of(model)) != before


def test_the_fingerprint_ignores_weights_that_no_head_owns() -> None:
    model = build()
    before = weights_fingerprint(sites_of(model))
    with torch.no_grad():
        model.camera_head.pose_branch.weight += 1
    assert weights_fingerprint(sites_of(model)) == before
