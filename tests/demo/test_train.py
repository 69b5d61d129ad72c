"""Training: targets, losses, and a run that is killed and goes on as if nothing had happened."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hess_plugin.demo.data import make_batch, training_rooms
from hess_plugin.demo.losses import camera_loss, correspondence_loss
from hess_plugin.demo.optimizer import orthogonalise
from hess_plugin.demo.rooms import SPLITS, render_room
from hess_plugin.demo.train import main
from hess_plugin.demo.trainer import TrainConfig, Trainer
from hess_plugin.demo.validation import pose_errors, validate
from hess_plugin.geometry import quaternion_to_matrix


def quick(out: Path, steps: int) -> TrainConfig:
    return TrainConfig(
        out=str(out), steps=steps, views=4, processes=1, average_every=1, save_every=1, validate_every=100
    )


def test_a_resumed_run_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "validate", lambda self: None)
    whole = Trainer(quick(tmp_path / "whole", 2))
    whole.run()

    def interrupted(self: Trainer) -> None:
        if self.step == 1:
            raise KeyboardInterrupt
        train_step(self)

    train_step = Trainer.train_step
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(Trainer, "train_step", interrupted)
        Trainer(quick(tmp_path / "parts", 2)).run()
    resumed = Trainer(quick(tmp_path / "parts", 2))
    resumed.run()
    assert resumed.step == whole.step == 2
    for name, value in whole.trained.state_dict().items():
        torch.testing.assert_close(resumed.trained.state_dict()[name], value, rtol=0, atol=0)
    for name, value in whole.average.items():
        torch.testing.assert_close(resumed.average[name], value, rtol=0, atol=0)
    assert sorted(p.name for p in (tmp_path / "parts").glob("state*")) == ["state-0000002-rank0.pt"]


def test_command_line_trains_two_processes(tmp_path: Path) -> None:
    options = "--steps 1 --views 4 --processes 2 --average-every 1 --validation-scenes 1"
    assert main(["--out", str(tmp_path), *options.split()]) == 0
    states = [torch.load(tmp_path / f"state-0000001-rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name, value in states[0]["trained"].items():
        torch.testing.assert_close(states[1]["trained"][name], value)
    assert (tmp_path / "tiny_vggt.safetensors").exists()
    assert "auc30" in (tmp_path / "training_log.txt").read_text()


def test_ending_the_launcher_ends_the_processes(tmp_path: Path) -> None:
    options = "--steps 100000 --views 4 --processes 1 --save-every 1 --validate-every 100000"
    command = [sys.executable, "-m", "hess_plugin.demo.train", "--out", str(tmp_path), *options.split()]
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        _wait_for((tmp_path / "latest").exists)
    finally:
        launcher.terminate()
    assert launcher.wait(30) == 143
    seen = (tmp_path / "latest").read_text()
    time.sleep(1)
    assert (tmp_path / "latest").read_text() == seen


def _wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_steps_and_processes_see_different_training_rooms() -> None:
    depths = [training_rooms(step, rank, 2, 1, 2, 60.0)[0].depth for step in range(2) for rank in range(2)]
    assert len({float(depth.sum()) for depth in depths}) == 4
    again = training_rooms(1, 1, 2, 1, 2, 60.0)[0]
    assert (again.depth == depths[3]).all()
    assert max(SPLITS["train"]) < min(SPLITS["validation"])


def test_targets_agree_with_each_other() -> None:
    """Depth at a pixel, carried to the world by the encoded camera, is the world point there."""
    batch = make_batch([render_room(1, 3), render_room(2, 3)])
    rotation, translation = quaternion_to_matrix(batch.pose_enc[..., 3:7]), batch.pose_enc[..., :3]
    assert batch.points.shape == (2, 3, 30, 30, 3)
    torch.testing.assert_close(batch.pose_enc[:, 0, :7], torch.tensor([[0.0, 0, 0, 0, 0, 0, 1]] * 2), atol=1e-5, rtol=0)
    assert batch.points.norm(dim=-1).mean(dim=(1, 2, 3)).sub(1).abs().max() < 0.02
    local = torch.einsum("bsij,bshwj->bshwi", rotation, batch.points) + translation[:, :, None, None]
    torch.testing.assert_close(local[..., 2], batch.depth, atol=2e-3, rtol=0)


def test_perfect_poses_have_no_error() -> None:
    target = make_batch([render_room(1, 4)]).pose_enc
    rotation, translation = pose_errors(target, target)
    assert rotation.max() < 0.1 and translation.max() < 0.1
    assert camera_loss([target], target) < 0.01
    assert camera_loss([target + 0.1], target) > 0.05


def test_correspondence_loss_prefers_matching_features() -> None:
    points = make_batch([render_room(4, 2, sector=15.0)]).points
    centres = points[:, :, 2::5, 2::5].reshape(1, 2, 36, 3)
    waves = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * 4
    placed, shuffled = torch.sin(centres @ waves), torch.sin(centres.flip(2) @ waves)
    assert correspondence_loss(placed, points) < correspondence_loss(shuffled, points) - 1


def test_orthogonalised_matrices_have_equal_singular_values() -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(2, 8, 24)))
    assert values.min() > 0.5 and values.max() < 1.5


def test_learning_rate_rises_holds_and_ends_at_zero(tmp_path: Path) -> None:
    trainer = Trainer(replace(quick(tmp_path, 1000), warmup=10))
    rates = []
    for trainer.step in (0, 9, 300, 700, 1000):
        rates.append(trainer.learning_rate())
    assert rates[0] < rates[1] == rates[2] > rates[3] > rates[4] == 0


def test_validation_tells_better_from_worse(tmp_path: Path) -> None:
    batch = make_batch([render_room(1, 3)])

    class Oracle(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {
                "pose_enc": batch.pose_enc,
                "world_points": batch.points,
                "depth": batch.depth.unsqueeze(-1) + 0.5,
            }

    row = validate(Oracle(), batch)
    assert row.auc30 == 1 and row.points == 0 and row.depth == pytest.approx(0.5, abs=1e-5)
