"""What the shipped model shows: only what is safe to claim with this many paired scenes."""

from __future__ import annotations

import pytest

from hess_plugin import calibrate
from hess_plugin.demo.model import load_demo_model
from hess_plugin.demo.scenes import RoomScenes
from hess_plugin.evaluation.arms import Arm
from hess_plugin.evaluation.comparison import compare
from hess_plugin.evaluation.statistics import summarise

SCENES = 24


@pytest.mark.slow
def test_budgets_by_sensitivity_help_at_high_sparsity_and_reversed_ones_hurt() -> None:
    model = load_demo_model()
    profile = calibrate(model, RoomScenes("calibration", 16, 16))
    arms = [Arm("dense")] + [Arm(name, s, name) for s in (0.75, 0.85) for name in ("uniform", "hess", "reverse")]
    rows = compare(model, RoomScenes("test", SCENES, 16), arms, profile=profile, block_q=8, block_k=8)
    found = {(s.arm, s.target): s for s in summarise(rows)}
    for target in (0.75, 0.85):
        hess, reverse = (found[name, target].against["uniform"] for name in ("hess", "reverse"))
        assert hess.mean["auc30"] >= 0.0, (target, hess)
        assert reverse.mean["auc30"] <= -0.05, (target, reverse)
        assert found["uniform", target].value.mean["sparsity"] == pytest.approx(target, abs=0.005)
