"""Verdicts: which numbers make which, how they live in a profile, and which one applies to a patch."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from hess_plugin import Profile, ProfileError
from hess_plugin.scoring import ERROR_NAMES, Scoring
from hess_plugin.settings import ALLOCATIONS, Settings
from hess_plugin.sites import PROJECTIONS
from hess_plugin.student import t_quantile
from hess_plugin.verdict_records import from_dict, to_dict
from hess_plugin.verification import METRICS, MIN_SCENES, MOST_SCENES, OUTCOMES, TESTED, Difference, Verification
from hess_plugin.verified_profiles import (
    find_verification,
    harm_digest,
    record_verification,
    traces_digest,
    verified_lines,
    write_verifications,
)

OWN = Scoring(0.5)
ARMS = ("dense", "uniform", "hess")
NOTHING: list[float] = []


def difference_of(values: list[float]) -> Difference:
    n = len(values)
    mean = statistics.fmean(values) if n else math.nan
    return Difference(mean, statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan, n)


def verification_of(auc30: list[float], point_error: list[float], **changes: Any) -> Verification:
    """A verification in which the scenes differed by these values."""
    scenes = max(len(auc30), len(point_error), 1)
    fields: dict[str, Any] = {
        "sparsity": 0.73,
        "measured": {"uniform": 0.73, "hess": 0.73},
        "scoring": OWN,
        "block_q": 128,
        "block_k": 64,
        "scenes": scenes,
        "views": (16, 16),
        "data": "folder:held-out",
        "means": {arm: {metric: 0.5 for metric in METRICS} for arm in ARMS},
        "differences": {"auc30": difference_of(auc30), "point_error": difference_of(point_error)},
        "traces": "t" * 16,
        "fingerprint": "f" * 16,
        "machine": "a machine",
        "versions": {"torch": "2.13"},
        "date": "2026-01-01T00:00:00+00:00",
    }
    return Verification(**(fields | changes))


BETTER, WORSE = [0.05, 0.06, 0.04, 0.05, 0.06] * 2, [-0.05, -0.06, -0.04, -0.05, -0.06] * 2
UNSURE = [0.05, -0.06, 0.04, -0.05, 0.01] * 2
OF_OUTCOME = {
    "helps": (BETTER, UNSURE),
    "harms": (WORSE, UNSURE),
    "mixed": (BETTER, BETTER),  # a larger point error is worse
    "undecided": (UNSURE, UNSURE),
}


def profile_of(traces: torch.Tensor | None = None, **changes: Any) -> Profile:
    if traces is None:
        traces = torch.arange(1.0, 9.0).repeat(2, 3, 1)
    fields: dict[str, Any] = {
        "adapter": "vggt",
        "sites": tuple(f"block.{i}" for i in range(3)),
        "num_heads": 8,
        "scenes": ("a", "b"),
        "traces": {f"{e}.{p}": traces.double() for e in ERROR_NAMES for p in PROJECTIONS},
        "camera_weight": 0.5,
        "fingerprint": "f" * 16,
        "metadata": {"weights": "x.pt"},
    }
    return Profile(**(fields | changes))


# ---------------------------------------------------------------- the rule

VALUES = st.lists(st.one_of(st.floats(-0.2, 0.2), st.sampled_from([0.0, 0.1])), max_size=9)


@settings(max_examples=150, deadline=None)
@given(VALUES, VALUES, st.floats(-0.5, 0.5), st.floats(-0.5, 0.5))
def test_the_outcome_is_that_of_a_paired_t_test(
    auc30: list[float], points: list[float], shift_auc: float, shift_points: float
) -> None:
    auc30, points = [v + shift_auc for v in auc30], [v + shift_points for v in points]
    tested = [(sign, values) for sign, values in ((1, auc30), (-1, points)) if len(values) >= MIN_SCENES]
    found = set()
    for sign, values in tested:
        spread, mean = statistics.stdev(values), statistics.fmean(values)
        assume(spread > 1e-9 or spread == 0.0)  # nothing that rounding decides
        p = float(stats.ttest_1samp(values, 0.0).pvalue) if spread > 0.0 else float(mean == 0.0)
        assume(abs(p - 0.05 / len(tested)) > 1e-9)
        if p < 0.05 / len(tested):
            found.add(sign if mean > 0.0 else -sign)
    twin = {(): "undecided", (1,): "helps", (-1,): "harms", (-1, 1): "mixed"}[tuple(sorted(found))]
    verification = verification_of(auc30, points)
    assert verification.outcome == twin
    assert verification.text.startswith(f"{twin} at sparsity 0.73 on ")


def test_a_profile_that_changes_nothing_is_seldom_decided() -> None:
    """Without a correction for two metrics one in ten would be."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2000, 2, 9, generator=generator, dtype=torch.float64).tolist()
    decided = sum(verification_of(*draw).outcome != "undecided" for draw in draws) / len(draws)
    assert 0.035 < decided < 0.065


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_each_outcome_has_its_sentence(outcome: str) -> None:
    verification = verification_of(*OF_OUTCOME[outcome])
    assert verification.outcome == outcome
    text = verification.text
    assert text.startswith(f"{outcome} at sparsity 0.73 on 10 held-out scenes: ") and text.count(".\n") == 0
    low, high = verification.interval("auc30")
    mean = 100 * verification.differences["auc30"].mean
    assert f"AUC@30 {mean:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f}, " in text
    assert ("scenes would decide" in text) == (outcome == "undecided") and "together with 95%" in text


@pytest.mark.parametrize("count", [0, 1, 4, MIN_SCENES - 1])
def test_few_scenes_are_undecided_by_rule(count: int) -> None:
    verification = verification_of(WORSE[:count], WORSE[:count], scenes=max(count, 1))
    assert verification.outcome == "undecided" and f"give at least {MIN_SCENES}, better 20" in verification.text


def test_scenes_without_depth_are_judged_by_cameras_alone() -> None:
    one, both = verification_of(BETTER, NOTHING), verification_of(BETTER, UNSURE)
    assert one.outcome == "helps" and one.level == pytest.approx(0.95) and both.level == pytest.approx(0.975)
    assert "point error" not in one.text and "95% interval." in one.text


def test_the_same_output_everywhere_is_undecided_and_no_number_of_scenes_is_named() -> None:
    verification = verification_of([0.0] * 10, [0.0] * 10)
    assert verification.outcome == "undecided" and verification.scenes_needed is None
    assert verification.text.endswith("; no scene showed any difference.")
    tiny = verification_of([1.0, -1.0, 1.0, -0.999] * 2, NOTHING)
    assert tiny.scenes_needed is None and f"{MOST_SCENES} scenes would not show" in tiny.text


@settings(max_examples=60, deadline=None)
@given(st.floats(0.02, 3.0), st.integers(4, 40), st.sampled_from([0.95, 0.975]))
def test_scenes_needed_equal_a_search_one_by_one(ratio: float, scenes: int, level: float) -> None:
    counts = np.arange(MIN_SCENES, MOST_SCENES + 1)
    enough = ratio * np.sqrt(counts) >= stats.t.isf((1 - level) / 2, counts - 1) + stats.norm.ppf(0.8)
    twin = int(counts[enough][0]) if enough.any() else None
    found = Difference(ratio, 1.0 / math.sqrt(scenes), scenes).scenes_needed(level)
    if found is None or twin is None:
        assert found is twin is None or max(found or 0, twin or 0) > 0.999 * MOST_SCENES
    else:
        assert found == pytest.approx(twin, rel=1e-4, abs=1)  # the quantile of 0.8 is rounded


def test_scenes_needed_decide_four_times_in_five() -> None:
    needed = Difference(0.6, 1.0 / math.sqrt(8), 8).scenes_needed(0.975)
    assert needed is not None
    draws = torch.randn(4000, needed, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.6
    against = t_quantile(0.975, needed - 1) * draws.std(1) / math.sqrt(needed)
    assert float((draws.mean(1) > against).double().mean()) == pytest.approx(0.8, abs=0.04)


# ---------------------------------------------------------------- in a file


@settings(max_examples=50, deadline=None)
@given(VALUES, VALUES)
def test_a_verification_survives_json(auc30: list[float], points: list[float]) -> None:
    means = {arm: {metric: math.nan if metric == "point_error" else 0.5 for metric in METRICS} for arm in ARMS}
    verification = verification_of(auc30, points, means=means, views=(3, 9))
    record = json.loads(json.dumps(to_dict(verification), allow_nan=False))
    again = from_dict(record)
    assert repr(again) == repr(verification) and to_dict(again) == record  # NaN is not equal to itself
    assert (record["outcome"], record["text"]) == (verification.outcome, verification.text)


def places(record: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested tables and lists."""
    items = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


RECORD = json.loads(json.dumps(to_dict(verification_of(BETTER, UNSURE))))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(places(RECORD)), JSON, st.booleans())
def test_a_damaged_record_is_one_sentence(place: tuple[Any, ...], wrong: Any, gone: bool) -> None:
    record = {"verdict": copy.deepcopy(RECORD)}
    *above, last = ("verdict", *place)
    table: Any = record
    for key in above:
        table = table[key]
    table.pop(last) if gone else table.__setitem__(last, wrong)
    try:
        found = from_dict(record.get("verdict"))
    except ProfileError as error:
        assert str(error).startswith("a verdict in the profile is damaged (") and "verify` again" in str(error)
        assert "\n" not in str(error)
    else:  # then it makes sense as it is
        assert repr(from_dict(to_dict(found))) == repr(found)


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"sparsity": 0.0}, "sparsity"),
        ({"sparsity": "0.73"}, "sparsity"),
        ({"scenes": 2}, "differences"),
        ({"views": [16]}, "views"),
        ({"block_q": True}, "block_q"),
        ({"scoring": {"camera_weight": None}}, "scoring"),
        ({"scoring": {"weight": 1}}, "scoring"),
        ({"means": {}}, "means"),
        ({"differences": {"auc30": {"mean": 1.0, "error": -1.0, "scenes": 10}}}, "differences"),
        ({"traces": None}, "traces"),
    ],
)
def test_a_damaged_field_is_named(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ProfileError, match=word):
        from_dict({**RECORD, **changes})
    left_out = {name: value for name, value in RECORD.items() if name not in changes}
    with pytest.raises(ProfileError, match=next(iter(changes))):
        from_dict(left_out)


def test_records_of_the_first_versions_are_about_budgets_by_score_and_mass() -> None:
    older = {name: value for name, value in RECORD.items() if name not in ("allocation", "selection", "harm")}
    found = from_dict(older)
    assert (found.allocation, found.selection, found.harm) == ("hess", "mass", None) and to_dict(found) == RECORD


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"allocation": "reverse"}, "allocation"),
        ({"allocation": None}, "allocation"),
        ({"allocation": "harm", "harm": "d" * 16}, "measured"),  # of arm hess
        ({"selection": ""}, "selection"),
        ({"selection": ["mass"]}, "selection"),
        ({"harm": "d" * 16}, "harm"),  # of budgets by score
        ({"harm": ""}, "harm"),
        ({"harm": 7}, "harm"),
    ],
)
def test_what_was_compared_is_checked(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ProfileError, match=rf"\((numbers: a verification with )?{word}"):
        from_dict({**RECORD, **changes})


def test_the_outcome_follows_from_the_numbers() -> None:
    """A rule that changes later must not make verdicts of today unreadable, and a forged outcome is no verdict."""
    assert from_dict({**RECORD, "outcome": "harms"}).outcome == RECORD["outcome"] == "helps"


# ---------------------------------------------------------------- in a profile


def recorded(profile: Profile, *found: Verification) -> Profile:
    for verification in found:
        profile = record_verification(profile, dataclasses.replace(verification, traces=traces_digest(profile)))
    return profile


def outcomes(profile: Profile) -> list[tuple[float, str]]:
    return [(record["sparsity"], record["outcome"]) for record in profile.metadata["verdicts"]]


def test_a_newer_verdict_of_the_same_setting_takes_the_place_of_the_older() -> None:
    helps, harms = verification_of(BETTER, UNSURE), verification_of(WORSE, UNSURE)
    others = [
        dataclasses.replace(helps, **changes)
        for changes in (
            {"sparsity": 0.85},
            {"block_q": 64},
            {"block_k": 128},
            {"scoring": Scoring(1.0)},
            {"scoring": Scoring(0.5, "k")},
            {"fingerprint": "e" * 16},
        )
    ]
    profile = recorded(profile_of(), helps, *others)
    assert len(outcomes(profile)) == 7 and all(outcome == "helps" for _, outcome in outcomes(profile))
    again = recorded(profile, dataclasses.replace(harms, date="2027-01-01T00:00:00+00:00"))
    assert outcomes(again) == [*outcomes(profile)[1:], (0.73, "harms")]
    assert again.metadata["weights"] == "x.pt" and again.traces is profile.traces


def test_verdicts_of_other_traces_and_damaged_ones_go() -> None:
    profile = recorded(profile_of(), verification_of(BETTER, UNSURE, sparsity=0.5))
    edited = profile_of(profile.traces["camera.q"].flip(-1), metadata=profile.metadata)
    for verdicts in (profile.metadata["verdicts"], ["damaged"], "damaged", None, [None, 3]):
        stale = dataclasses.replace(edited, metadata={"verdicts": verdicts})
        assert outcomes(recorded(stale, verification_of(WORSE, UNSURE))) == [(0.73, "harms")]


def test_a_verdict_of_other_traces_is_not_recorded() -> None:
    with pytest.raises(ProfileError, match="other traces were verified"):
        record_verification(profile_of(), verification_of(BETTER, UNSURE))


def test_every_trace_counts_and_nothing_else_does() -> None:
    profile = profile_of()
    digest = traces_digest(profile)
    assert traces_digest(dataclasses.replace(profile, camera_weight=0.1, metadata={}, fingerprint="e" * 16)) == digest
    for name in profile.traces:
        changed = {key: trace.clone() for key, trace in profile.traces.items()}
        changed[name][1, 2, 7] = torch.nextafter(changed[name][1, 2, 7], torch.tensor(9.0, dtype=torch.float64))
        assert traces_digest(dataclasses.replace(profile, traces=changed)) != digest


def test_writing_keeps_what_was_written_meanwhile_and_follows_a_link(tmp_path: Path) -> None:
    profile = profile_of()
    profile.save(tmp_path / "a.hess")
    (tmp_path / "link.hess").symlink_to("a.hess")
    found = dataclasses.replace(verification_of(BETTER, UNSURE), traces=traces_digest(profile))
    dataclasses.replace(profile, metadata={"weights": "x.pt", "break_even": [1]}).save(tmp_path / "a.hess")
    write_verifications(tmp_path / "link.hess", [found, dataclasses.replace(found, sparsity=0.85)])
    assert (tmp_path / "link.hess").is_symlink()
    loaded = Profile.load(tmp_path / "a.hess")
    assert outcomes(loaded) == [(0.73, "helps"), (0.85, "helps")] and loaded.metadata["break_even"] == [1]
    assert traces_digest(loaded) == found.traces and sorted(os.listdir(tmp_path)) == ["a.hess", "link.hess"]
    profile_of(2 * profile.traces["camera.q"]).save(tmp_path / "a.hess")  # calibrated again while it was verified
    before = (tmp_path / "a.hess").read_bytes()
    with pytest.raises(ProfileError, match="other traces"):
        write_verifications(tmp_path / "a.hess", [found])
    assert (tmp_path / "a.hess").read_bytes() == before


def with_harm(profile: Profile, **changes: Any) -> Profile:
    """The profile with harm curves."""
    curves = torch.linspace(1.0, 0.1, 4).double().expand(2, 3, 8, 4)
    shares = torch.tensor([0.1, 0.2, 0.4, 0.7]).double().expand(2, 4)
    harm = {"camera": curves, "points": curves, "shares": shares} | changes
    return dataclasses.replace(profile, harm=harm)


def by_harm(profile: Profile, auc30: list[float] = WORSE, **changes: Any) -> Verification:
    """A verification of budgets by the profile's curves."""
    arms: dict[str, Any] = {
        "measured": {"uniform": 0.73, "harm": 0.73},
        "means": {arm: dict.fromkeys(METRICS, 0.5) for arm in ("dense", "uniform", "harm")},
    }
    return verification_of(auc30, UNSURE, allocation="harm", harm=harm_digest(profile), **(arms | changes))


def test_a_verdict_on_harm_is_about_the_curves_it_was_measured_with() -> None:
    profile = with_harm(profile_of())
    profile = recorded(profile, verification_of(BETTER, UNSURE), by_harm(profile))
    assert outcomes(profile) == [(0.73, "helps"), (0.73, "harms")]
    harm = settings_of(allocation="harm")
    found = find_verification(profile, harm, OWN)
    assert found is not None and (found.outcome, from_dict(json.loads(json.dumps(to_dict(found))))) == ("harms", found)
    score = find_verification(profile, settings_of(), OWN)
    assert score is not None and score.outcome == "helps"
    # Harm follows the camera weight of a score alone.
    assert find_verification(profile, harm, Scoring(0.5, "k")) == found
    assert find_verification(profile, harm, Scoring(0.4)) is None
    assert "chosen by mass; budgets by harm: " in verified_lines(profile)[1]
    other = with_harm(profile, shares=profile.harm["shares"] / 2)
    assert find_verification(other, harm, OWN) is None and find_verification(other, settings_of(), OWN) == score
    assert verified_lines(other)[1].startswith("verified: for other harm curves than these")
    with pytest.raises(ProfileError, match="other harm curves were verified"):
        record_verification(other, found)
    assert outcomes(recorded(other, by_harm(other, BETTER))) == [(0.73, "helps"), (0.73, "helps")]


def test_verdicts_are_told_in_lines() -> None:
    assert verified_lines(profile_of()) == [
        "verified: no; `hess-patch verify` measures on held-out scenes whether it beats uniform budgets."
    ]
    profile = recorded(
        profile_of(), verification_of(BETTER, UNSURE), verification_of(WORSE, UNSURE, fingerprint="e" * 16)
    )
    first, second = verified_lines(profile)
    assert first.startswith("verified: helps at sparsity 0.73 on 10 held-out scenes") and "folder:held-out" in first
    assert second.startswith(f"verified: with other weights ({'e' * 16}), harms at")
    edited = profile_of(profile.traces["camera.q"] + 1, metadata=profile.metadata)
    assert all(line.startswith("verified: for other traces") for line in verified_lines(edited))
    assert verified_lines(profile_of(metadata={"verdicts": [7]}))[0].startswith("verified: damaged: ")


# ---------------------------------------------------------------- which applies


def settings_of(sparsity: float = 0.73, **changes: Any) -> Settings:
    return Settings(
        **({"sparsity": sparsity, "sparse_ratio": None, "cdf_threshold": None, "allocation": "hess"} | changes)
    )


SPARSITIES = st.integers(1, 19).map(lambda n: n / 20)
SELECTORS = st.sampled_from(["mass", "restore"])
STORED = st.lists(
    st.tuples(SPARSITIES, st.sampled_from([8, 64]), st.sampled_from([0.5, 1.0]), SELECTORS), max_size=6, unique=True
)


@settings(max_examples=80, deadline=None)
@given(STORED, SPARSITIES, st.sampled_from([8, 64]), st.sampled_from([None, 0.5, 1.0]), SELECTORS)
def test_the_verdict_that_applies_equals_a_search(
    stored: list[tuple[float, int, float, str]], asked: float, block: int, weight: float | None, selector: str
) -> None:
    profile = recorded(
        profile_of(),
        *(
            verification_of(BETTER, UNSURE, sparsity=s, block_q=b, block_k=b, scoring=Scoring(w), selection=chosen)
            for s, b, w, chosen in stored
        ),
    )
    asked_for = settings_of(asked, block_q=block, block_k=block, selector=selector)
    found = find_verification(profile, asked_for, Scoring(weight))
    twin = None
    # The patch's own way to choose blocks first, then its own size of them.
    for otherwise, other in itertools.product((False, True), repeat=2):
        for steps in range(3):  # of 0.05: as near as 0.1
            for sign in (1, -1):  # the sparser first
                target = round(20 * asked) + sign * steps
                for s, b, w, chosen in stored:
                    alike = (chosen != selector, b != block) == (otherwise, other)
                    if twin is None and alike and w == (weight or 0.5) and round(20 * s) == target:
                        twin = (s, b, chosen)
    assert (None if found is None else (found.sparsity, found.block_q, found.selection)) == twin


def test_only_budgets_by_score_at_a_plain_sparsity_of_the_same_traces_and_weights_are_judged() -> None:
    profile = recorded(profile_of(), verification_of(WORSE, UNSURE))
    assert find_verification(profile, settings_of(), Scoring()) is not None
    for allocation in set(ALLOCATIONS) - {"hess"}:
        assert find_verification(profile, settings_of(allocation=allocation), OWN) is None
    assert find_verification(profile, settings_of(None, sparse_ratio=0.73), OWN) is None
    assert find_verification(profile, settings_of(0.0), OWN) is None
    for scoring in (Scoring(0.4), Scoring(0.5, "k"), Scoring(normalisation="log"), Scoring(rows="patch")):
        assert find_verification(profile, settings_of(), scoring) is None
    assert find_verification(profile, settings_of(), OWN, "e" * 16) is None
    assert find_verification(profile.with_camera_weight(0.9), settings_of(), Scoring()) is None
    assert find_verification(profile.with_camera_weight(0.9), settings_of(), OWN) is not None
    edited = profile_of(profile.traces["camera.q"].flip(-1), metadata=profile.metadata)
    assert find_verification(edited, settings_of(), OWN) is None
    # 0.83 - 0.73 is less than 0.1 in binary, 0.63 is more than 0.1 away
    assert all(find_verification(profile, settings_of(s), OWN) is not None for s in (0.63, 0.83))
    assert all(find_verification(profile, settings_of(s), OWN) is None for s in (0.62, 0.84))


def test_every_tested_metric_is_recorded() -> None:
    assert set(TESTED) <= set(METRICS)
