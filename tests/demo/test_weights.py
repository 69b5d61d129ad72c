"""The shipped checkpoint."""

from __future__ import annotations

import pytest
import torch

from hess_plugin.demo.data import Batch
from hess_plugin.demo.model import WEIGHTS, TinyVGGT, load_demo_model
from hess_plugin.demo.validation import pose_errors, validate, validation_set


@pytest.fixture(scope="module")
def trained() -> TinyVGGT:
    return load_demo_model()


@pytest.fixture(scope="module")
def batch() -> Batch:
    return validation_set(scenes=8, views=6)


def test_loads_in_eval_mode_and_float32(trained: TinyVGGT) -> None:
    assert not trained.training
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert WEIGHTS.stat().st_size < 10_000_000
    assert (WEIGHTS.parent / "training_log.txt").exists()


def test_beats_the_mean_prediction(trained: TinyVGGT, batch: Batch) -> None:
    """Against the best constant map and against no motion at all."""
    row = validate(trained, batch)
    mean_points = batch.points.mean(dim=(0, 1), keepdim=True)
    mean_depth = batch.depth.mean(dim=(0, 1), keepdim=True)
    assert row.points < 0.6 * (batch.points - mean_points).norm(dim=-1).mean()
    assert row.depth < 0.6 * (batch.depth - mean_depth).abs().mean()
    assert row.auc30 > 0.5
    mean_pose = batch.pose_enc.mean(dim=0, keepdim=True).expand_as(batch.pose_enc)
    rotation, translation = pose_errors(mean_pose, batch.pose_enc)
    assert row.rotation < rotation.median() and row.translation < translation.median()
