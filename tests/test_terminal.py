"""Outputs are checked before long work, an interrupt tells how to go on, shortfalls are told."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from hess_plugin import CalibrationError, HessError, PatchError, UnknownModel, calibrate, patch
from hess_plugin.calibration import rounds
from hess_plugin.cli import main
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.demo.run import DemoSettings, run_demo
from hess_plugin.files import check_writable
from hess_plugin.scenes.scene import Scene
from hess_plugin.scenes.writing import write_folder
from hess_plugin.terminal import waiting


@pytest.mark.parametrize("where", ["file/x.hess", "folder", "file/deep/x.hess"])
def test_an_output_that_cannot_be_written_is_told_first(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(HessError, match=r"(is not a directory you may write to|is a directory; give a file name)"):
        check_writable(tmp_path / where)
    check_writable(tmp_path / "new" / "deep" / "x.hess")
    assert not (tmp_path / "new").exists()


def test_commands_check_their_output_before_they_load_anything(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    options = ["--model", "nobody", "--data", "folder:nowhere"]
    for command in (
        ["calibrate", *options, "-o", str(tmp_path / "file" / "x.hess")],
        ["evaluate", *options, "-o", str(tmp_path / "x.json")],
        ["demo", "-o", str(tmp_path / "file")],
    ):
        result = CliRunner().invoke(main, command)
        assert result.exit_code in (1, 2) and str(tmp_path) in result.output and "nobody" not in result.output


def test_an_interrupt_tells_how_to_go_on(room: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(room, tmp_path / "data" / "room")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds, "_measure", interrupt)
    arguments = ["--model", "demo", "--data", f"folder:{tmp_path / 'data'}", "-o", str(tmp_path / "a.hess")]
    result = CliRunner().invoke(main, ["calibrate", *arguments])
    assert result.exit_code == 130 and "run the same command again to go on" in result.output


def test_a_sparsity_out_of_reach_is_told_once(
    tiny_model: TinyVGGT, room: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.no_grad(), caplog.at_level(logging.WARNING), patch(tiny_model, sparsity=0.95):
        tiny_model(room.images)
        tiny_model(room.images)
    (record,) = caplog.records
    assert "sparsity 0.95 asked for, 0.33 reached: 144 patch tokens are 2 x 3 blocks of 128 x 64" in record.getMessage()
    caplog.clear()
    with torch.no_grad(), patch(tiny_model, sparsity=0.6, block_q=8, block_k=8):
        tiny_model(room.images)
    assert not caplog.records


def test_arguments_of_the_wrong_kind_are_told(tiny_model: TinyVGGT, room: Scene, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"a model of type str was given, wanted a torch\.nn\.Module"):
        patch("vggt")  # type: ignore[arg-type]
    with pytest.raises(PatchError, match="profile is of type int, wanted a Profile or the name of its file"):
        patch(tiny_model, profile=3)  # type: ignore[arg-type]
    for scenes in (room, "folder:x", tmp_path):
        with pytest.raises(CalibrationError, match="wanted a sequence of scenes"):
            calibrate(tiny_model, scenes)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="eps is -1, wanted a distance above 0"):
        calibrate(tiny_model, [room], eps=-1)
    with pytest.raises(CalibrationError, match="camera_weight is 3, wanted a number from 0"):
        calibrate(tiny_model, [room], camera_weight=3)


def test_a_new_demo_leaves_no_results_of_an_old_one(tmp_path: Path) -> None:
    for name in ("results.csv", "table.md", "trade_off.png"):
        (tmp_path / name).write_text("old")

    def stop(stage: str, done: int, total: int, what: str) -> None:
        if stage == "measure":
            raise KeyboardInterrupt

    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path, DemoSettings(calibration=1, test=2, views=4), stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.hess", "heads.png"]
    assert torch.get_num_threads() == threads


def test_waiting_is_silent_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with waiting("looking for scenes"):
        pass
    assert capsys.readouterr() == ("", "")


def test_waiting_is_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with waiting("looking for scenes"):
        pass
    assert "looking for scenes" in capsys.readouterr().err
