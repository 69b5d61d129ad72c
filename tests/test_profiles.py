"""The profile: written and read bit for bit, refused when damaged, held to its model."""

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
        (lambda h, t: h.update(format_version=FORMAT_VERSION + 1), "has profile format 4, .* reads 1 to 3; upgrade"),
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


# ---------------------------------------------------------------- traces through patch rows, another camera weight


def with_patch_rows(**changes: Any) -> Profile:
    traces = traces_of()
    return make(traces=traces | {f"{name}.patch": trace / 2 for name, trace in traces.items()}, **changes)


def format_of(path: Path) -> int:
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["hess_profile"])["format_version"]


def test_patch_rows_are_written_read_and_looked_up(tmp_path: Path) -> None:
    profile = with_patch_rows()
    profile.traces["points.q.patch"][1] = torch.nan
    profile.save(tmp_path / "a.hess")
    loaded = Profile.load(tmp_path / "a.hess")
    assert len(loaded.traces) == 12 and loaded.has_patch_rows and format_of(tmp_path / "a.hess") == 2
    for name, trace in profile.traces.items():
        assert torch.equal(loaded.traces[name].view(torch.int64), trace.view(torch.int64)), name
    assert torch.equal(loaded.scene_traces("camera", "k", "patch"), profile.traces["camera.k.patch"])
    assert torch.equal(loaded.scene_traces("camera", "k"), profile.traces["camera.k"])
    mean = loaded.mean_traces("points", "q", "patch")
    assert mean is not None and torch.equal(mean, profile.traces["points.q.patch"][[0, 2]].mean(0))


def test_what_an_older_version_can_read_is_written_for_it(tmp_path: Path) -> None:
    make().save(tmp_path / "a.hess")
    assert format_of(tmp_path / "a.hess") == 1 and not Profile.load(tmp_path / "a.hess").has_patch_rows


def with_outputs(**changes: Any) -> Profile:
    shape = (3, 3, 4)
    generator = torch.Generator().manual_seed(5)
    traces = {f"{e}.output": torch.rand(shape, dtype=torch.float64, generator=generator) for e in ERROR_NAMES}
    return make(traces=traces_of() | traces, **changes)


def test_traces_of_outputs_are_written_read_and_looked_up(tmp_path: Path) -> None:
    for profile in (with_outputs(), with_outputs(harm=with_harm().harm)):
        profile.save(tmp_path / "a.hess")
        loaded = Profile.load(tmp_path / "a.hess")
        assert loaded.has_outputs and not loaded.has_patch_rows and format_of(tmp_path / "a.hess") == 3
        assert torch.equal(loaded.scene_traces("points", "output"), profile.traces["points.output"])
        assert torch.equal(loaded.scores(projection="output"), profile.scores(projection="output"))
        assert not torch.allclose(loaded.scores(projection="output"), loaded.scores())
    with pytest.raises(ProfileError, match=r"projection 'output' needs traces of attention outputs, .*--harm"):
        make().scores(projection="output")
    half = dict(with_outputs().traces)
    half.pop("camera.output")
    with pytest.raises(ProfileError, match=r"none or all of .* and of \['camera\.output', 'points\.output'\]"):
        make(traces=half)


def with_harm(**changes: Any) -> Profile:
    """Curves at two shares; the second scene has no camera error, the third too few blocks."""
    generator = torch.Generator().manual_seed(3)
    harm = {name: torch.rand((3, 3, 4, 2), dtype=torch.float64, generator=generator) for name in ERROR_NAMES}
    harm["shares"] = torch.tensor([[0.25, 0.5], [0.2, 0.2], [0.0, 0.0]], dtype=torch.float64)
    harm["camera"][1] = torch.nan
    for curves in harm.values():
        curves[2] = torch.nan
    return make(**{"harm": harm, **changes})


def test_harm_curves_are_written_and_read_bit_for_bit(tmp_path: Path) -> None:
    for profile in (with_harm(), with_harm(traces=with_patch_rows().traces)):
        profile.save(tmp_path / "a.hess")
        loaded = Profile.load(tmp_path / "a.hess")
        assert loaded.has_harm and format_of(tmp_path / "a.hess") == 3 and len(loaded.traces) == len(profile.traces)
        for name, curves in profile.harm.items():
            assert torch.equal(loaded.harm[name].view(torch.int64), curves.view(torch.int64)), name
        weighed = loaded.with_camera_weight(0.9)
        assert weighed.harm is loaded.harm and torch.equal(weighed.scores(), make(camera_weight=0.9).scores())
    make().save(tmp_path / "a.hess")
    assert not Profile.load(tmp_path / "a.hess").has_harm and format_of(tmp_path / "a.hess") == 1


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            lambda harm: harm.pop("shares"),
            r"harm curves are camera, points, shares; this profile has \['camera', 'points'\]",
        ),
        (lambda harm: harm.update(camera=harm["camera"][:2]), r"harm 'camera' has shape \[2, 3, 4, 2\], wanted"),
        (lambda harm: harm.update(points=harm["points"][..., :1]), "harm 'points' has shape"),
        (lambda harm: harm.update(shares=harm["shares"][0]), "harm 'shares' has shape"),
        (lambda harm: harm["points"][0, 0].neg_(), "harm 'points' holds a negative or infinite value"),
        (lambda harm: harm["points"][0, 0].div_(0), "harm 'points' holds a negative or infinite value"),
        (lambda harm: harm["points"][0, 0].fill_(torch.nan), "harm 'points' is partly not a number in a scene"),
        (lambda harm: harm["shares"][0, 0].fill_(0.6), "harm 'shares' do not ascend"),
        (lambda harm: harm["shares"][0, 1].fill_(1.1), "harm 'shares' do not ascend"),
        (lambda harm: harm["shares"][0].fill_(0.0), "harm 'shares' do not ascend"),
        (lambda harm: harm["shares"][1].fill_(torch.nan), "harm 'points' has a curve in a scene without shares"),
    ],
)
def test_harm_curves_that_are_wrong_are_told(tmp_path: Path, change: Any, sentence: str) -> None:
    harm = dict(with_harm().harm)
    change(harm)
    with pytest.raises(ProfileError, match=sentence):
        with_harm(harm=harm)


@pytest.mark.parametrize("missing", ["camera.q.patch", "points.v.patch"])
def test_patch_rows_come_all_or_none(missing: str) -> None:
    traces = dict(with_patch_rows().traces)
    del traces[missing]
    with pytest.raises(ProfileError, match=r"and none or all of \['camera.k.patch'"):
        make(traces=traces)


def test_patch_rows_that_were_not_recorded_are_told() -> None:
    for ask in (lambda p: p.scores(rows="patch"), lambda p: p.mean_traces("camera", "q", "patch")):
        with pytest.raises(ProfileError, match=r"traces through patch rows .* calibrate again, or take rows 'all'\."):
            ask(make())
    with pytest.raises(ProfileError, match="rows 'special' was given, wanted one of all, patch"):
        with_patch_rows().scene_traces("camera", "q", "special")


def test_another_camera_weight_is_another_profile_of_the_same_traces(tmp_path: Path) -> None:
    profile = with_patch_rows(metadata={"camera_weight_source": "the family's", "weights": "x"})
    other = profile.with_camera_weight(0.9)
    assert other.camera_weight == 0.9 and other.metadata == {"camera_weight_source": "given", "weights": "x"}
    assert profile.camera_weight == 0.3 and profile.metadata["camera_weight_source"] == "the family's"
    assert torch.equal(other.scores(), profile.scores(0.9))
    other.save(tmp_path / "a.hess")
    assert torch.equal(Profile.load(tmp_path / "a.hess").scores(rows="patch"), profile.scores(0.9, rows="patch"))
    with pytest.raises(ProfileError, match=r"camera_weight is 1\.5"):
        profile.with_camera_weight(1.5)


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
