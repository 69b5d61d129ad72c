"""What was found out about scenes survives being packed, and the latest word on a scene counts."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hess_plugin.calibration.record import Findings

SCENES = st.sampled_from(["a", "b", "0", "1.a", "room 1", "ü"])
FOUND = st.lists(st.tuples(SCENES, st.integers(0, 3), st.booleans()), max_size=8)


def findings(entries: list[tuple[str, int, bool]]) -> Findings:
    found = Findings()
    for scene, seed, usable in entries:
        one = Findings(digests={scene: f"digest {seed}"})
        if usable:
            one.traces[scene] = {name: torch.full((2, 3), seed / 3, dtype=torch.float64) for name in ("a.q", "1.a.q")}
            one.facts[scene] = {"scale": seed / 7, "size": [seed, 2], "alignment": None}
        else:
            one.skipped[scene] = f"reason {seed}"
        found.take(one)
    return found


def plain(found: Findings) -> Any:
    return [
        {s: {n: t.tolist() for n, t in traces.items()} for s, traces in found.traces.items()},
        found.facts,
        found.skipped,
        found.digests,
    ]


@settings(deadline=None)
@given(FOUND, FOUND)
def test_findings_are_packed_and_taken_over(mine: list[Any], theirs: list[Any]) -> None:
    one, two = findings(mine), findings(theirs)
    unpacked, header = Findings.unpack(two.pack(left=True, news=[["a", 1]]))
    assert plain(unpacked) == plain(two) and header == {"left": True, "news": [["a", 1]]}
    one.take(unpacked)
    latest = {scene: (seed, usable) for scene, seed, usable in [*mine, *theirs]}
    assert one.digests == {scene: f"digest {seed}" for scene, (seed, _) in latest.items()}
    assert set(one.traces) == set(one.facts) == {scene for scene, (_, usable) in latest.items() if usable}
    assert one.skipped == {scene: f"reason {seed}" for scene, (seed, usable) in latest.items() if not usable}
    for scene, (seed, usable) in latest.items():
        if usable:
            assert one.traces[scene]["1.a.q"].tolist() == [[seed / 3] * 3] * 2
        assert one.done(scene, f"digest {seed}") and not one.done(scene, "other") and scene not in one.digests
