"""Options through the environment, and the record of a run."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hess_plugin.auto.environment import OPTIONS, environment_for, is_off, options_in_environment
from hess_plugin.auto.record import add_to_record, begin_record, read_record
from hess_plugin.exceptions import PatchError


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {}),
        ("off", {}),
        ("on", {}),
        ("sparsity=0.85", {"sparsity": 0.85}),
        ("sparsity=.5, profile=a b.hess,block_q=8", {"sparsity": 0.5, "profile": "a b.hess", "block_q": 8}),
        ('{"sparsity": 0.5, "profile": "a,b=c.hess"}', {"sparsity": 0.5, "profile": "a,b=c.hess"}),
        (
            "strict=false,allocation=equal,dense_below=null",
            {"strict": False, "allocation": "equal", "dense_below": None},
        ),
    ],
)
def test_options_are_read(monkeypatch: pytest.MonkeyPatch, text: str, options: dict[str, Any]) -> None:
    monkeypatch.setenv(OPTIONS, text)
    assert options_in_environment() == options


@pytest.mark.parametrize("text", ["off", "OFF", " 0 ", "no", "false"])
def test_off(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(OPTIONS, text)
    assert is_off() and options_in_environment() == {}


@pytest.mark.parametrize("text", ["sparsity", "=3", "sparsity=0.5,,", "{sparsity: 3}", "{"])
def test_nonsense_is_one_sentence(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(OPTIONS, text)
    with pytest.raises(PatchError, match="correct it, or set it to `off`"):
        options_in_environment()


values = st.one_of(st.booleans(), st.none(), st.integers(-9, 9), st.floats(0, 1), st.text(max_size=8))


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.text(st.characters(categories=["Ll"]), min_size=1, max_size=8), values, max_size=4))
def test_what_is_written_is_read(options: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patcher:
        for name, value in environment_for(options, None).items():
            patcher.setenv(name, value)
        assert options_in_environment() == options


def test_a_path_that_is_there_stays_behind_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/a", "", "/b"]))
    once = environment_for({}, Path("/tmp/r.json"))
    ours, *others = once["PYTHONPATH"].split(os.pathsep)
    assert Path(ours, "sitecustomize.py").is_file() and others == ["/a", "", "/b"]  # the empty one is this folder
    monkeypatch.setenv("PYTHONPATH", once["PYTHONPATH"])
    assert environment_for({}, Path("/tmp/r.json")) == once  # a run inside a run


def _add(path: Path, number: int) -> None:
    add_to_record(path, {"number": number})


def test_processes_that_end_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    begin_record(path)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add, args=(path, number)) for number in range(12)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(entry["number"] for entry in read_record(path)) == list(range(12))
    assert list(json.loads(path.read_text())) == ["processes"] and os.listdir(tmp_path) == ["record.json"]


@pytest.mark.parametrize("text", [None, "", "[]", "{}", "nonsense"])
def test_a_record_that_is_none_has_no_entries(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "record.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert read_record(path) == []
