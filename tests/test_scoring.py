"""The score: the paper's formulas, the ablations as documented, and never a number where there is no information."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hess_plugin import PatchError, Profile, ProfileError, Scene, patch
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.interception import is_patched
from hess_plugin.plugins import resolve_adapter
from hess_plugin.profiles import weights_fingerprint
from hess_plugin.scoring import (
    ERROR_NAMES,
    NORMALISATIONS,
    ROWS,
    TRACES,
    Scoring,
    error_shares,
    head_scores,
    mix,
    scene_shares,
    trace_name,
)

CHOICES = [(trace, rows) for trace in TRACES for rows in ROWS if (trace, rows) != ("output", "patch")]
OPTIONS = st.builds(
    lambda weight, choice, normalisation: Scoring(weight, choice[0], normalisation, choice[1]),
    st.one_of(st.none(), st.floats(0, 1)),
    st.sampled_from(CHOICES),
    st.sampled_from(NORMALISATIONS),
)


def profile_of(traces: Mapping[str, Tensor], camera_weight: float = 0.3) -> Profile:
    """A profile with these traces, all others one."""
    scenes, layers, heads = next(iter(traces.values())).shape
    names = [trace_name(error, trace, rows) for error in ERROR_NAMES for trace, rows in CHOICES]
    ones = {name: torch.ones(scenes, layers, heads, dtype=torch.float64) for name in names}
    return Profile(
        adapter="vggt",
        sites=tuple(f"aggregator.global_blocks.{i}.attn" for i in range(layers)),
        num_heads=heads,
        scenes=tuple(f"scene {i}" for i in range(scenes)),
        traces=ones | dict(traces),
        camera_weight=camera_weight,
        fingerprint="0123456789abcdef",
    )


def random_profile(seed: int, scenes: int = 3, layers: int = 2, heads: int = 4) -> Profile:
    """Traces over forty orders of magnitude; some scenes lack an error, some layers a gradient, all or in a scene."""
    generator = torch.Generator().manual_seed(seed)
    shape = (scenes, layers, heads)

    def chance(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64)

    traces = {}
    for error in ERROR_NAMES:
        missing, silent = chance(scenes) < 0.2, chance(layers) < 0.2
        size = 10.0 ** torch.randint(-20, 20, (), generator=generator)
        for projection, rows in CHOICES:
            trace = chance(*shape) ** 4 * size
            trace[:, silent] = 0
            trace[chance(scenes, layers) < 0.1] = 0
            trace[missing] = torch.nan
            traces[trace_name(error, projection, rows)] = trace
    return profile_of(traces, camera_weight=chance(1).item())


def plain_values(trace: Sequence[float], normalisation: str) -> list[float]:
    """What an error's heads get, formula by formula."""
    mean = sum(trace) / len(trace)
    if normalisation == "sum":
        return [t / sum(trace) for t in trace]
    if normalisation in ("raw", "scene"):
        return list(trace)
    if normalisation == "linear":
        return [t / max(trace) for t in trace]
    if normalisation == "softmax":
        powers = [math.exp(t / mean) for t in trace]
        return [p / sum(powers) for p in powers]
    return [math.log(1 + t / mean) for t in trace]


def plain_scores(profile: Profile, scoring: Scoring) -> list[list[float]] | None:
    """The score by loops over scenes, layers and heads; None if a layer has none."""
    weight = profile.camera_weight if scoring.camera_weight is None else scoring.camera_weight
    suffix = "" if scoring.rows == "all" else ".patch"
    scores = []
    for layer in range(len(profile.sites)):
        mixed = [0.0] * profile.num_heads
        for error, share in (("camera", weight), ("points", 1 - weight)):
            scenes = profile.traces[f"{error}.{scoring.projection}{suffix}"][:, layer].tolist()
            scenes = [scene for scene in scenes if not math.isnan(scene[0])]
            if scoring.normalisation == "scene":
                scenes = [[value / sum(scene) for value in scene] for scene in scenes if sum(scene) > 0]
            trace = [sum(values) / len(scenes) for values in zip(*scenes, strict=True)]
            if sum(trace) > 0:
                for head, value in enumerate(plain_values(trace, scoring.normalisation)):
                    mixed[head] += share * value
        if sum(mixed) == 0:
            return None
        scores.append([value / sum(mixed) for value in mixed])
    return scores


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6), OPTIONS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))
def test_scores_are_the_documented_formulas(seed: int, scoring: Scoring, scenes: int, layers: int, heads: int) -> None:
    profile = random_profile(seed, scenes, layers, heads)
    wanted = plain_scores(profile, scoring)
    if wanted is None:
        with pytest.raises(ProfileError, match="the profile has no gradient at aggregator"):
            head_scores(profile, scoring)
        return
    scores = head_scores(profile, scoring)
    torch.testing.assert_close(scores, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scores.sum(1), torch.ones(layers, dtype=torch.float64))
    again = profile.scores(scoring.camera_weight, scoring.projection, scoring.normalisation, scoring.rows)
    assert torch.equal(again, scores)


def test_the_default_is_the_method() -> None:
    """HeSS, eq. 7 to 9: shares of W_Q's mean traces, mixed by lambda."""
    profile = profile_of({f"{e}.q": torch.rand(3, 2, 4, dtype=torch.float64) for e in ERROR_NAMES}, camera_weight=0.3)
    camera, points = (profile.traces[f"{error}.q"].mean(0) for error in ERROR_NAMES)
    wanted = 0.3 * camera / camera.sum(1, keepdim=True) + 0.7 * points / points.sum(1, keepdim=True)
    torch.testing.assert_close(profile.scores(), wanted)
    torch.testing.assert_close(head_scores(profile, Scoring(normalisation="sum", rows="all", projection="q")), wanted)


def test_every_option_changes_the_score() -> None:
    names = [trace_name(error, trace, rows) for error in ERROR_NAMES for trace, rows in CHOICES]
    profile = profile_of({name: torch.rand(3, 2, 8, dtype=torch.float64) for name in names})
    found = {
        tuple(profile.scores(weight, projection, normalisation, rows).flatten().tolist())
        for weight in (0.2, 0.8)
        for projection, rows in CHOICES
        for normalisation in NORMALISATIONS
    }
    assert len(found) == 2 * 7 * 6


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_only_raw_depends_on_the_size_of_an_error(normalisation: str) -> None:
    profile = profile_of({f"{e}.q": torch.rand(2, 2, 4, dtype=torch.float64) for e in ERROR_NAMES})
    scaled = {n: t * (1e-9 if n.startswith("camera") else 1e6) for n, t in profile.traces.items()}
    same = torch.allclose(
        profile_of(scaled, 0.5).scores(normalisation=normalisation), profile.scores(0.5, normalisation=normalisation)
    )
    assert same == (normalisation != "raw")


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_equal_heads_get_equal_shares_and_a_larger_trace_a_larger_share(normalisation: str) -> None:
    equal = torch.full((1, 2, 5), 3e-7, dtype=torch.float64)
    score = profile_of({f"{e}.q": equal for e in ERROR_NAMES}).scores(normalisation=normalisation)
    torch.testing.assert_close(score, torch.full((2, 5), 0.2, dtype=torch.float64))
    rising = torch.arange(5, dtype=torch.float64).expand(1, 2, 5)
    score = profile_of({f"{e}.q": rising for e in ERROR_NAMES}).scores(normalisation=normalisation)
    assert bool((score.diff(dim=1) > 0).all())


def test_ablations_spread_heads_as_documented() -> None:
    """Softmax sharpens, log flattens."""
    trace = torch.tensor([1.0, 1, 1, 1, 12], dtype=torch.float64).expand(1, 1, 5)
    profile = profile_of({f"{e}.q": trace for e in ERROR_NAMES})
    top = {name: profile.scores(normalisation=name)[0, 4].item() for name in NORMALISATIONS}
    assert top["log"] < top["sum"] < top["softmax"] and top["sum"] == pytest.approx(0.75)
    assert top["raw"] == pytest.approx(top["sum"]) == pytest.approx(top["linear"])  # both errors are the same here


def test_by_scene_no_scene_outweighs_the_others() -> None:
    camera = torch.tensor([[[1.0, 3.0]], [[3.0, 1.0]], [[3.0, 1.0]], [[0.0, 0.0]]], dtype=torch.float64)
    camera[0] *= 1e6  # one scene has nearly all of the trace
    profile = profile_of({"camera.q": camera, "points.q": camera})
    torch.testing.assert_close(profile.scores()[0], torch.tensor([0.25, 0.75], dtype=torch.float64), rtol=1e-5, atol=0)
    wanted = torch.tensor([(0.25 + 0.75 + 0.75) / 3, (0.75 + 0.25 + 0.25) / 3], dtype=torch.float64)
    torch.testing.assert_close(
        profile.scores(normalisation="scene")[0], wanted
    )  # the scene without gradient is left out
    shares = scene_shares(camera)
    assert bool(shares[3].isnan().all()) and not bool(shares[:3].isnan().any())


# ---------------------------------------------------------------- errors that are missing


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("projection, rows", [("q", "all"), ("q", "patch"), ("output", "all")])
def test_a_layer_without_camera_gradient_is_scored_by_its_points(
    normalisation: str, projection: str, rows: str
) -> None:
    camera, points = torch.rand(2, 3, 4, dtype=torch.float64), torch.rand(2, 3, 4, dtype=torch.float64)
    camera[:, 1] = 0  # what the last layer of a model may do
    both = zip(ERROR_NAMES, (camera, points), strict=True)
    profile = profile_of({trace_name(error, projection, rows): traces for error, traces in both})
    alone = profile.scores(0.0, projection, normalisation, rows)
    for weight in (0.3, 0.5, 0.999):
        scores = profile.scores(weight, projection, normalisation, rows)
        torch.testing.assert_close(scores[1], alone[1])
        assert not torch.allclose(scores[0], alone[0])
    with pytest.raises(ProfileError, match=r"no gradient at aggregator\.global_blocks\.1\.attn \(1 of 3 sites\)"):
        profile.scores(1.0, projection, normalisation, rows)


def test_an_error_that_no_scene_has() -> None:
    points = torch.full((2, 2, 4), torch.nan, dtype=torch.float64)
    camera = torch.rand(2, 2, 4, dtype=torch.float64)
    profile = profile_of({"points.q": points, "camera.q": camera})
    assert profile.mean_traces("points") is None
    shares = camera.mean(0) / camera.mean(0).sum(1, keepdim=True)
    for weight in (0.5, 1.0):
        torch.testing.assert_close(profile.scores(weight), shares)
    with pytest.raises(ProfileError, match=r"camera_weight 0\.0 the profile has no gradient .*change camera_weight"):
        profile.scores(0.0)
    assert set(error_shares(profile)) == {"camera"}


def test_the_shares_of_each_error_are_its_scores_alone() -> None:
    camera, points = torch.rand(2, 3, 4, dtype=torch.float64), torch.rand(2, 3, 4, dtype=torch.float64)
    camera[:, 2] = 0
    points[1] = torch.nan
    profile = profile_of({"camera.k": camera, "points.k": points})
    for normalisation in NORMALISATIONS:
        shares = error_shares(profile, Scoring(0.5, "k", normalisation))
        assert list(shares) == ["camera", "points"]
        assert bool(shares["camera"][2].isnan().all()) and not bool(shares["camera"][:2].isnan().any())
        torch.testing.assert_close(shares["points"], profile.scores(0.0, "k", normalisation))


def test_a_quotient_of_numbers_too_small_to_divide_is_no_information() -> None:
    tiny = torch.full((1, 4), 5e-324, dtype=torch.float64)
    assert bool(mix(tiny, tiny, 0.5, "sum").isnan().all())
    one = torch.tensor([[1.0, 1, 1, 5]], dtype=torch.float64)
    torch.testing.assert_close(mix(tiny, one, 0.5, "sum"), one / 8)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"camera_weight": -0.1}, r"camera_weight -0\.1 was given, wanted a number from 0"),
        ({"camera_weight": 1.1}, r"camera_weight 1\.1 was given"),
        ({"camera_weight": float("nan")}, "camera_weight nan was given"),
        ({"camera_weight": "0.5"}, r"camera_weight 0\.5 was given, wanted a number"),
        ({"camera_weight": True}, "camera_weight True was given"),
        ({"projection": "o"}, "projection 'o' was given, wanted one of q, k, v, output"),
        ({"projection": "output", "rows": "patch"}, "with projection 'output', which is of patch tokens alone"),
        ({"projection": ""}, "projection '' was given"),
        (
            {"normalisation": "max"},
            "normalisation 'max' was given, wanted one of sum, scene, raw, linear, softmax, log",
        ),
        ({"rows": "special"}, "rows 'special' was given, wanted one of all, patch"),
    ],
)
def test_options_that_do_not_exist_are_told(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ProfileError, match=sentence):
        Scoring(**options)  # type: ignore[arg-type]
    with pytest.raises(ProfileError, match=sentence):
        random_profile(0).scores(**options)  # type: ignore[arg-type]


def test_a_scoring_says_what_it_is() -> None:
    profile = random_profile(0)
    text = str(Scoring(rows="patch").resolved(profile))
    assert text == f"camera weight {profile.camera_weight:g}, projection q, normalisation sum, rows patch"
    assert str(Scoring()).startswith("the profile's camera weight, ")
    assert Scoring(0.25).resolved(profile) == Scoring(0.25)


# ---------------------------------------------------------------- scores in a patch


def test_a_patch_divides_budgets_by_the_score_asked_for(tiny_model: TinyVGGT, room: Scene) -> None:
    sites = resolve_adapter(tiny_model).sites(tiny_model)
    rising = torch.tensor([1.0, 2, 3, 6], dtype=torch.float64).expand(1, 2, 4)
    named = {"camera.q": rising, "points.q": rising, "camera.q.patch": rising.flip(2), "points.q.patch": rising.flip(2)}
    profile = replace(
        profile_of(named), sites=tuple(site.name for site in sites), fingerprint=weights_fingerprint(sites)
    )
    kept = {}
    for options in ({}, {"normalisation": "log"}, {"rows": "patch"}, {"projection": "v"}):
        blocks = {"sparsity": 0.6, "block_q": 8, "block_k": 8}
        with torch.no_grad(), patch(tiny_model, profile=profile, **blocks, **options) as handle:  # type: ignore[arg-type]
            tiny_model(room.images)
        report = handle.report()
        dropped = report.sites[0].head_sparsity
        assert dropped is not None and sum(dropped) / 4 == pytest.approx(0.6, abs=0.01)
        kept[str(options)] = torch.tensor(dropped, dtype=torch.float64).mul(-1).add(1)
        wanted = Scoring(**options).resolved(profile)  # type: ignore[arg-type]
        assert {name: report.settings[name] for name in asdict(wanted)} == asdict(wanted)
        # No head is full here, so its part of what is kept is its score.
        assert bool((kept[str(options)] < 1).all())
        scores = head_scores(profile, wanted)[0]
        torch.testing.assert_close(kept[str(options)] / kept[str(options)].sum(), scores, atol=0.02, rtol=0)


@pytest.mark.parametrize("options", [{"normalisation": "log"}, {"rows": "patch"}, {"projection": "k"}])
def test_a_patch_refuses_a_score_without_a_profile(tiny_model: TinyVGGT, options: dict[str, str]) -> None:
    with pytest.raises(PatchError, match="made of a profile, and none was given; pass profile=FILE"):
        patch(tiny_model, **options)  # type: ignore[arg-type]
    assert not is_patched(tiny_model)


def test_a_patch_reports_no_score_where_none_was_made(tiny_model: TinyVGGT) -> None:
    with patch(tiny_model, sparsity=0.5) as handle:
        assert not set(asdict(Scoring())) & set(handle.report().settings)
