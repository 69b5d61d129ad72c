"""The script that judges the paper's findings: when a difference counts."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest

FINDINGS = runpy.run_path(str(Path(__file__).resolve().parents[1] / "benchmarks" / "findings.py"))


@pytest.mark.parametrize(
    ("gain", "error", "word"),
    [
        (0.31, 0.1, "hold"),
        (-0.31, 0.1, "fail"),
        (0.29, 0.1, "open"),
        (0.0, 0.0, "open"),
        (0.31, math.nan, "open"),  # a single scene
        (math.nan, math.nan, "open"),  # no scene has the metric
    ],
)
def test_a_finding_needs_three_standard_errors(gain: float, error: float, word: str) -> None:
    assert FINDINGS["_word"](gain, error) == word
