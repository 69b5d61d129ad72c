"""`hess-patch report`: what it writes and what it refuses."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hess_plugin.cli import main
from hess_plugin.evaluation.arms import Arm, Row
from hess_plugin.evaluation.records import METRICS, Measurement
from hess_plugin.evaluation.sweep import Cell
from hess_plugin.evaluation.sweep_folder import SweepFolder


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)], prog_name="hess-patch")


def assert_one_sentence(result: Result, *words: str, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    sentence = result.stderr.partition("Error: ")[2].strip()
    assert "\n" not in sentence and "Traceback" not in result.output
    for word in words:
        assert word in sentence, sentence


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sweep that has measured the dense model alone."""
    plan = {"rows": [asdict(Row(0.5))], "scoring": {}, "model": "demo", "data": "rooms:test"}
    held = SweepFolder.start(tmp_path / "s", plan, {"machine": "m", "hess_plugin": "1"})
    values = {m: math.nan for m in METRICS} | {"auc30": 0.5, "sparsity": 0.0}
    rows = [Measurement("room", "0", "dense", **values, knob=0.0)]
    held.journal().add(rows)
    held.write_cells([Cell(Row(0.0), Arm("dense"), 0.0, True, tuple(rows))])
    return tmp_path / "s"


def test_the_page_lies_in_the_folder_or_where_it_was_asked_for(folder: Path, tmp_path: Path) -> None:
    result = invoke(folder)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"wrote {folder / 'report.html'}\n"
    assert "No row is finished yet; the dense model has AUC@30 50.0 points." in (folder / "report.html").read_text()
    result = invoke(folder, "-o", tmp_path / "pages" / "a.html", "--threshold", 0.2)
    assert result.exit_code == 0 and "--threshold 0.2" in (tmp_path / "pages" / "a.html").read_text()


def test_mistakes_are_told_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    assert_one_sentence(invoke(tmp_path / "none"), "holds no sweep (sweep.json is missing)", "hess-patch sweep")
    assert_one_sentence(invoke(folder, "-o", tmp_path / "a.pdf"), "wanted a name that ends in .html")
    assert_one_sentence(invoke(folder, "--threshold", 0), "--threshold", code=2)
    (folder / "measurements.csv").write_bytes(b"\xff\xfe\n")
    assert_one_sentence(invoke(folder), "damaged")
    (folder / "cells.csv").unlink()
    assert_one_sentence(invoke(folder), "has no finished cell yet")
    (folder / "sweep.json").write_text("[]")
    assert_one_sentence(invoke(folder), "sweep.json is damaged")
    assert not (folder / "report.html").exists()
