"""Break-evens in a profile: written, read back, checked, matched, and the dense path they lead to."""

from __future__ import annotations

import copy
import json
import logging
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hess_plugin import PatchError, Profile, ProfileError, patch
from hess_plugin.break_even import BreakEven, Conditions, Timing, smallest_paying
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.demo.scenes import RoomScenes
from hess_plugin.evaluation.arms import Arm
from hess_plugin.evaluation.comparison import compare
from hess_plugin.machine import machine_key
from hess_plugin.plugins import resolve_adapter
from hess_plugin.profiles import weights_fingerprint
from hess_plugin.recorded_break_evens import (
    MAX_DISTANCE,
    METADATA_KEY,
    break_evens,
    record_break_even,
    recorded_limit,
)
from hess_plugin.scoring import ERROR_NAMES
from hess_plugin.sites import PROJECTIONS

PATCHES = 36  # of a view of 60 x 60 pixels
BLOCKS: dict[str, Any] = {"block_q": 8, "block_k": 8}
HERE = Conditions("this processor, 1 threads", "float32", None, "gather", 8, 8)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call this machine by one name, however many threads torch has."""
    monkeypatch.setattr("hess_plugin.machine.machine_key", lambda device: HERE.machine)


def timing(views: int, ratio: float) -> Timing:
    return Timing(views, PATCHES * views, 0.6, 0.5, 0.5 * ratio, ratio, ratio, ratio, 7)


def entry(ratios: dict[int, float], conditions: Conditions = HERE, **changes: Any) -> BreakEven:
    fields: dict[str, Any] = {
        "conditions": conditions,
        "sparsity": 0.6,
        "allocation": "hess",
        "height": 60,
        "width": 60,
        "timings": tuple(timing(views, ratio) for views, ratio in sorted(ratios.items())),
        "versions": {"torch": "2.9"},
        "date": "2026-01-01T00:00:00+00:00",
    }
    return BreakEven(**(fields | changes))


PAYS_FROM_4 = {2: 1.3, 4: 0.8, 8: 0.6}
NEVER_UP_TO_4 = {2: 1.3, 4: 1.1}


def profile_of(model: nn.Module, *entries: BreakEven) -> Profile:
    sites = resolve_adapter(model).sites(model)
    traces = torch.arange(1.0, sites[0].num_heads + 1).repeat(1, len(sites), 1).double()
    profile = Profile(
        adapter="vggt",
        sites=tuple(site.name for site in sites),
        num_heads=sites[0].num_heads,
        scenes=("one",),
        traces={f"{e}.{p}": traces for e in ERROR_NAMES for p in PROJECTIONS},
        camera_weight=0.5,
        fingerprint=weights_fingerprint(sites),
        metadata={"weights": "w.pt"},
    )
    for one in entries:
        profile = record_break_even(profile, one)
    return profile


def predicted(model: nn.Module, views: int) -> Tensor:
    images = torch.rand(views, 3, 60, 60, generator=torch.Generator().manual_seed(views))
    with torch.no_grad():
        output = model(images)
    return torch.cat([output[name].flatten() for name in ("pose_enc", "depth", "world_points")])


# ---------------------------------------------------------------- what a record says


@given(st.dictionaries(st.integers(1, 300), st.sampled_from([0.5, 0.9, 1.0, 1.1]), min_size=1))
@settings(deadline=None)
def test_the_dense_path_is_for_sizes_known_not_to_pay(ratios: dict[int, float]) -> None:
    """Against the definition: no size tried that pays with all above it is made dense, all others are."""
    found = entry(ratios)
    views = sorted(ratios)
    pays = {n: all(ratios[m] < 1.0 for m in views if m >= n) for n in views}
    for n in views:
        assert (n * PATCHES < found.dense_below) == (not pays[n])
    first = min((n for n in views if pays[n]), default=None)
    assert (found.smallest and found.smallest.views) == first
    if first == views[0]:
        assert found.dense_below == 0  # nothing smaller was tried, so nothing is known of it
    if first is None:
        assert found.dense_below == views[-1] * PATCHES + 1  # nor of anything larger


def test_a_record_needs_increasing_sizes() -> None:
    for timings in ((), (timing(4, 1.0), timing(2, 1.0)), (timing(4, 1.0), timing(4, 0.9))):
        with pytest.raises(ProfileError, match="increasing sizes"):
            entry({}, timings=timings)


def test_a_line_tells_all() -> None:
    line = entry(PAYS_FROM_4).describe()
    assert line.startswith("from 4 views (144 patch tokens) on, tried 2 to 8 views, of 60 x 60 px; ")
    for part in (HERE.machine, "float32, autocast none", "gather", "sparsity 0.6 (hess)", "blocks 8 x 8", "2026-01-01"):
        assert part in line
    assert entry(NEVER_UP_TO_4).describe().startswith("never up to 4 views (144 patch tokens), of")


# ---------------------------------------------------------------- JSON


@given(st.dictionaries(st.integers(1, 300), st.floats(0.1, 3.0), min_size=1), st.sampled_from([None, "bfloat16"]))
@settings(deadline=None)
def test_json_and_back(ratios: dict[int, float], autocast: str | None) -> None:
    one = entry(ratios, replace(HERE, autocast=autocast))
    assert BreakEven.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_json_tells_the_answer_beside_the_timings() -> None:
    data = entry(PAYS_FROM_4).to_json()
    assert (data["views"], data["tokens"], data["largest_tokens"]) == (4, 144, 288)
    assert data["machine"] == HERE.machine
    assert [one["ratio"] for one in data["timings"]] == [1.3, 0.8, 0.6] and data["versions"] == {"torch": "2.9"}
    assert entry(NEVER_UP_TO_4).to_json()["tokens"] is None


def damaged(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(entry(PAYS_FROM_4).to_json()), **changes}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("text", ["it is 'text'"]),
        ({}, ["machine is missing"]),
        (damaged(machine=3), ["machine is 3, wanted text"]),
        (damaged(autocast=""), ["autocast"]),
        (damaged(block_q=0), ["block_q is 0"]),
        (damaged(block_k=True), ["block_k is True"]),
        (damaged(sparsity=1.0), ["sparsity is 1.0", "below 1"]),
        (damaged(sparsity="0.7"), ["sparsity"]),
        (damaged(timings={}), ["timings", "a list"]),
        (damaged(timings=[]), ["increasing sizes"]),
        (damaged(timings=[3]), ["timings[0] is 3"]),
        (damaged(timings=[asdict(timing(2, 1.3)) | {"ratio": float("nan")}]), ["timings[0].ratio is nan"]),
        (damaged(timings=[asdict(timing(2, 1.3)) | {"ratio": -1.0}]), ["timings[0].ratio", "positive"]),
        (damaged(tokens=72), ["'tokens' is 72, but the timings say 144"]),
        (damaged(tokens=None), ["'tokens' is None"]),
        (damaged(views=-4), ["views is -4"]),
        (damaged(versions=["torch"]), ["versions"]),
        (damaged(date=None), ["date"]),
    ],
)
def test_a_damaged_record_is_told_in_a_sentence(tiny_model: TinyVGGT, record: object, words: list[str]) -> None:
    profile = replace(profile_of(tiny_model), metadata={METADATA_KEY: [record]})
    for read in (lambda: break_evens(profile), lambda: patch(tiny_model, profile=profile, sparsity=0.6, **BLOCKS)):
        with pytest.raises(ProfileError) as told:
            read()
        text = str(told.value)
        assert text.startswith("a break-even in the profile is damaged (") and "bench" in text and "\n" not in text
        assert all(word in text for word in words), text
    with patch(tiny_model, profile=profile, sparsity=0.6, dense_below=0, **BLOCKS) as handle:  # as the sentence says
        assert handle.active


@pytest.mark.parametrize("stored", ["text", {"a": 1}, 3])
def test_records_that_are_no_list(tiny_model: TinyVGGT, stored: object) -> None:
    profile = replace(profile_of(tiny_model), metadata={METADATA_KEY: stored})
    with pytest.raises(ProfileError, match="wanted a list"):
        break_evens(profile)
    assert break_evens(record_break_even(profile, entry(PAYS_FROM_4))) == [entry(PAYS_FROM_4)]


# ---------------------------------------------------------------- in a profile


def test_an_entry_replaces_its_own_and_leaves_the_others(tiny_model: TinyVGGT, tmp_path: Path) -> None:
    first, other = entry(PAYS_FROM_4), entry(PAYS_FROM_4, sparsity=0.8)
    elsewhere = entry(PAYS_FROM_4, replace(HERE, machine="another"))
    profile = profile_of(tiny_model, first, other, elsewhere)
    again = entry(NEVER_UP_TO_4, date="2026-02-02")
    profile = record_break_even(profile, again)
    path = tmp_path / "a.hess"
    profile.save(path)
    loaded = Profile.load(path)
    assert break_evens(loaded) == [again, other, elsewhere]
    assert loaded.metadata["weights"] == "w.pt"
    assert all(torch.equal(loaded.traces[name], trace) for name, trace in profile.traces.items())


def test_recording_drops_what_is_damaged(tiny_model: TinyVGGT) -> None:
    kept = entry(PAYS_FROM_4)
    profile = replace(profile_of(tiny_model), metadata={METADATA_KEY: [damaged(tokens=1), kept.to_json(), 7]})
    new = entry(PAYS_FROM_4, sparsity=0.9)
    assert break_evens(record_break_even(profile, new)) == [kept, new]


OTHER: dict[str, Any] = {"machine": "another", "dtype": "bfloat16", "backend": "reference", "block_q": 16, "block_k": 4}


@pytest.mark.parametrize("name", sorted(OTHER))
def test_other_conditions_do_not_match(tiny_model: TinyVGGT, name: str) -> None:
    profile = profile_of(tiny_model, entry(PAYS_FROM_4, replace(HERE, **{name: OTHER[name]})))
    assert recorded_limit(profile, HERE, 0.6) == 0
    assert recorded_limit(record_break_even(profile, entry(PAYS_FROM_4)), HERE, 0.6) == 4 * PATCHES


@given(st.lists(st.integers(1, 19), min_size=1, max_size=5, unique=True), st.integers(1, 99))
@settings(deadline=None)
def test_the_nearest_sparsity_counts_up_to_a_distance(stored: list[int], asked: int) -> None:
    """Records at multiples of 0.05, each with a break-even of its own; hundredths are exact integers here."""
    metadata = {METADATA_KEY: [entry({1: 1.2, 1 + n: 0.5}, sparsity=5 * n / 100).to_json() for n in stored]}
    traces = {f"{e}.{p}": torch.ones(1, 1, 1) for e in ERROR_NAMES for p in PROJECTIONS}
    profile = Profile("a", ("s",), 1, ("x",), traces, 0.5, "f", metadata)
    distances = {n: abs(5 * n - asked) for n in stored}
    near = [n for n in stored if distances[n] == min(distances.values()) and distances[n] <= round(100 * MAX_DISTANCE)]
    expected = (1 + max(near)) * PATCHES if near else 0  # of two as near, the larger limit
    assert recorded_limit(profile, HERE, asked / 100) == expected


def test_a_rule_without_a_sparsity_has_no_break_even(tiny_model: TinyVGGT) -> None:
    profile = profile_of(tiny_model, entry(PAYS_FROM_4))
    assert recorded_limit(profile, HERE, None) == 0
    with patch(tiny_model, profile=profile, sparse_ratio=0.6, **BLOCKS) as handle:
        assert handle.report().settings["dense_below"] == 0


def test_autocast_in_force_goes_first_and_others_count_where_there_is_none(tiny_model: TinyVGGT) -> None:
    half = replace(HERE, autocast="bfloat16")
    only_half = profile_of(tiny_model, entry({1: 1.2, 2: 0.5}, half))
    both = record_break_even(only_half, entry({1: 1.2, 6: 0.5}, HERE, sparsity=0.62))
    assert recorded_limit(only_half, HERE, 0.6) == recorded_limit(both, half, 0.6) == 2 * PATCHES
    assert recorded_limit(both, HERE, 0.6) == 6 * PATCHES  # though the other sparsity is nearer
    with torch.autocast("cpu", torch.bfloat16), patch(tiny_model, profile=both, sparsity=0.6, **BLOCKS) as handle:
        assert handle.report().settings["dense_below"] == 2 * PATCHES


# ---------------------------------------------------------------- the dense path


def test_an_evaluation_measures_what_was_asked_for_all_the_same(tiny_model: TinyVGGT) -> None:
    profile = profile_of(tiny_model, entry({1: 1.2, 100: 1.3}))
    with patch(tiny_model, profile=profile, sparsity=0.6, **BLOCKS) as handle:
        assert handle.report().settings["dense_below"] > 4 * PATCHES
    rows = compare(
        tiny_model, RoomScenes("test", 1, 4), [Arm(n, 0.6, n) for n in ("equal", "hess")], profile=profile, **BLOCKS
    )
    assert [row.sparsity for row in rows] == pytest.approx([0.6, 0.6], abs=0.01)


def test_below_the_break_even_the_model_is_bit_for_bit_itself(tiny_model: TinyVGGT) -> None:
    profile = profile_of(tiny_model, entry(PAYS_FROM_4))
    plain = {views: predicted(tiny_model, views) for views in (1, 3, 4, 5)}
    with patch(tiny_model, profile=profile, sparsity=0.6, dense_below=0, **BLOCKS):
        sparse = {views: predicted(tiny_model, views) for views in plain}
    with patch(tiny_model, profile=profile, sparsity=0.6, **BLOCKS) as handle:
        for views in (1, 3):
            assert torch.equal(predicted(tiny_model, views), plain[views])
            assert not torch.equal(sparse[views], plain[views])
        assert handle.report().sparsity == 0.0
        for views in (4, 5):
            assert torch.equal(predicted(tiny_model, views), sparse[views])
            assert not torch.equal(sparse[views], plain[views])
        report = handle.report()
    assert report.settings["dense_below"] == 144 == json.loads(json.dumps(report.to_dict()))["settings"]["dense_below"]
    assert all((site.calls, site.dense_calls) == (4, 2) for site in report.sites)
    assert "fewer than 144 patch tokens take the dense path" in str(report)


def test_where_it_never_paid_everything_tried_is_dense_and_nothing_else(tiny_model: TinyVGGT) -> None:
    profile = profile_of(tiny_model, entry(NEVER_UP_TO_4))
    with patch(tiny_model, profile=profile, sparsity=0.6, **BLOCKS) as handle:
        predicted(tiny_model, 4)
        assert [site.dense_calls for site in handle.report().sites] == [1, 1]
        predicted(tiny_model, 5)
    assert [site.dense_calls for site in handle.report().sites] == [1, 1]


@pytest.mark.parametrize("limit", [143, 144, 145])
def test_an_own_limit_goes_before_the_profile_and_needs_none(tiny_model: TinyVGGT, limit: int) -> None:
    profile = profile_of(tiny_model, entry({2: 1.3, 100: 0.8}))
    for given_profile in (None, profile):
        with patch(tiny_model, profile=given_profile, sparsity=0.6, dense_below=limit, **BLOCKS) as handle:
            predicted(tiny_model, 4)
        assert [site.dense_calls for site in handle.report().sites] == [int(limit > 144)] * 2
    with patch(tiny_model, sparsity=0.6, **BLOCKS) as handle:
        predicted(tiny_model, 1)
    assert [site.dense_calls for site in handle.report().sites] == [0, 0]
    assert "dense path" not in str(handle.report())


@pytest.mark.parametrize("options", [{"sparsity": 0.6}, {"cdf_threshold": 0.5}, {"sparse_ratio": 0.6}])
def test_an_own_limit_holds_for_every_rule(tiny_model: TinyVGGT, options: dict[str, float]) -> None:
    plain = predicted(tiny_model, 3)
    with patch(tiny_model, dense_below=10**9, **options, **BLOCKS):  # type: ignore[arg-type]
        assert torch.equal(predicted(tiny_model, 3), plain)


def test_the_dense_path_that_was_asked_for_is_no_shortfall(
    tiny_model: TinyVGGT, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hess_plugin"):
        with patch(tiny_model, sparsity=0.6, dense_below=200, **BLOCKS):
            predicted(tiny_model, 2)
        assert caplog.records == []
        with patch(tiny_model, sparsity=0.99, dense_below=200, **BLOCKS):
            predicted(tiny_model, 6)  # 216 patch tokens: too few for that sparsity
    assert len(caplog.records) == 1 and "0.99 asked for" in caplog.text


@pytest.mark.parametrize("limit", [-1, 0.5, True, "100"])
def test_a_limit_is_a_whole_number(tiny_model: TinyVGGT, limit: Any) -> None:
    with pytest.raises(PatchError, match=re.escape(f"dense_below is {limit!r}, wanted a whole number of at least 0")):
        patch(tiny_model, dense_below=limit)


def test_a_machine_is_known_by_its_processor_and_threads() -> None:
    threads = torch.get_num_threads()
    first = machine_key(torch.device("cpu"))
    assert first == machine_key(torch.device("cpu")) and first.endswith(f", {threads} threads")
    torch.set_num_threads(threads + 1)
    try:
        assert machine_key(torch.device("cpu")) == first.removesuffix(f"{threads} threads") + f"{threads + 1} threads"
    finally:
        torch.set_num_threads(threads)
    assert machine_key(torch.device("meta")).startswith("meta on ")


def test_conditions_of_a_model() -> None:
    cpu = torch.device("cpu")
    assert Conditions.of(cpu, torch.float32, "gather", 8, 8) == HERE
    half = Conditions.of(cpu, torch.float32, "gather", 8, 8, torch.bfloat16)
    assert half == replace(HERE, autocast="bfloat16")


def test_smallest_paying_of_nothing() -> None:
    assert smallest_paying([]) is None
