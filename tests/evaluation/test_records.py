"""Measurements survive their files, also ones that a kill cut off."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hess_plugin import SceneError
from hess_plugin.evaluation.records import METRICS, Journal, Measurement, read_measurements, write_csv

NUMBERS = st.floats(allow_infinity=False, width=64)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=12)


@st.composite
def measurements(draw: st.DrawFn) -> Measurement:
    values = {name: draw(NUMBERS) for name in METRICS}
    layers = tuple(draw(st.lists(st.floats(0, 1), max_size=3)))
    return Measurement(
        scene=draw(TEXT),
        row=draw(TEXT),
        arm=draw(TEXT),
        knob=draw(NUMBERS),
        alignment=draw(TEXT),
        layers=layers,
        **values,
    )


def same(first: Measurement, second: Measurement) -> bool:
    """Equal field by field, NaN to NaN."""
    for field in dataclasses.fields(Measurement):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if a != b and not (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)):
            return False
    return True


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(measurements(), max_size=5))
def test_what_is_written_is_read_back_exactly(
    rows: list[Measurement], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("records") / "m.csv"
    write_csv(path, rows, {"machine": "a, b"})
    found = read_measurements(path)
    assert len(found) == len(rows) and all(map(same, found, rows))


def row(scene: str, **values: float) -> Measurement:
    return Measurement(scene, "0.5", "hess", **{**dict.fromkeys(METRICS, 0.25), **values}, knob=0.5)


def test_a_journal_goes_on_where_a_kill_left_it(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    journal = Journal(path, {"machine": "one"})
    journal.add([row("a"), row("b")])
    whole = path.read_bytes()
    journal.add([row("c", auc30=0.125)])
    complete = path.read_bytes()
    for cut in range(len(whole), len(complete)):  # killed at any byte of the last line
        path.write_bytes(complete[:cut])
        again = Journal(path, {"machine": "two"})
        assert [m.scene for m in again.rows] == ["a", "b"]
        again.add([row("d")])
        assert [m.scene for m in read_measurements(path)] == ["a", "b", "d"]
    path.write_bytes(complete)
    assert [m.scene for m in Journal(path, {"machine": "two"}).rows] == ["a", "b", "c"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    for text in ("", "a,b\n1,2\n", "\0"):
        path.write_text(text)
        with pytest.raises(SceneError, match="does not hold measurements"):
            read_measurements(path)
    write_csv(path, [row("a")], {})
    path.write_text(path.read_text().replace("0.25", "many", 1))
    with pytest.raises(SceneError, match="is damaged"):
        read_measurements(path)


def test_the_target_is_the_rows_sparsity() -> None:
    assert row("a").target == 0.5 and math.isnan(dataclasses.replace(row("a"), row="rho 0.5 tau 0.9").target)
