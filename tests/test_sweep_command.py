"""`hess-patch sweep` and `evaluate` on the demo model, and the mistakes people make with them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hess_plugin import Profile, calibrate
from hess_plugin.cli import main
from hess_plugin.demo.model import load_demo_model
from hess_plugin.demo.scenes import RoomScenes

DATA = (
    "--model",
    "demo",
    "--data",
    "rooms:test,count=2,size=4",
    "--block-q",
    "8",
    "--block-k",
    "8",
    "--max-points",
    "500",
)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "demo.hess"
    calibrate(load_demo_model(), RoomScenes("calibration", 2, 4), output=path)
    return path


def hess_patch(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(part) for part in arguments])


def test_a_sweep_and_the_same_again(profile: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    command = ("sweep", *DATA, "--profile", profile, "-o", folder, "--rule", "0.5,0.8", "--sparsity", ".6",
               "--arm", "hess", "--arm", "kwon", "--calibration-data", "rooms:calibration,count=2,size=4",
               "--camera-weight", "1")  # fmt: skip
    first = hess_patch(*command)
    assert first.exit_code == 0, first.output
    for text in ("| dense ", "| uniform ", "| hess camera 1 ", "rho 0.5 tau 0.8", "hess-patch report", "kwon at 0.6"):
        assert text in first.output
    with (folder / "cells.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert [(cell["row"], cell["arm"]) for cell in cells] == [
        ("0", "dense"),
        *((row, arm) for row in ("0.6", "rho 0.5 tau 0.8") for arm in ("uniform", "hess", "kwon", "hess camera 1")),
    ]
    assert all(cell["torch"] if "torch" in cell else "torch" in cell["machine"] for cell in cells)
    assert Profile.load(folder / "profile.hess").fingerprint == Profile.load(profile).fingerprint
    measurements = (folder / "measurements.csv").read_bytes()
    again = hess_patch(*command)
    assert again.exit_code == 0 and (folder / "measurements.csv").read_bytes() == measurements
    other = hess_patch(*command, "--sparsity", ".7")
    assert other.exit_code == 1 and "other settings (rows was" in other.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--sparsity", "0"), "sparsity 0 is the dense model"),
        (("--sparsity", "1.5"), "sparsity is 1.5"),
        (("--rule", "0.8"), "wanted rho and tau of SparseVGGT like 0.8,0.4"),
        (("--rule", "0.8,7"), "cdf_threshold is 7.0"),
        (("--arm", "kwon"), "add --calibration-data"),
        (("--arm", "best"), "'best' is not one of"),
        (("--threshold", "0"), "0.0 is not in the range"),
        (("--tolerance", "nan"), "--tolerance nan was given"),
        (("--weights", "/nothing.pt"), "/nothing.pt"),
    ],
)
def test_mistakes_of_a_sweep(arguments: tuple[str, ...], words: str, profile: Path, tmp_path: Path) -> None:
    result = hess_patch("sweep", *DATA, "--profile", profile, "-o", tmp_path / "s", *arguments)
    assert result.exit_code in (1, 2) and words in result.output and "Traceback" not in result.output
    assert not (tmp_path / "s").exists()


def test_a_folder_of_something_else_is_left_alone(profile: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = hess_patch("sweep", *DATA, "--profile", profile, "-o", tmp_path, "--sparsity", ".6")
    assert result.exit_code == 1 and "is not empty and holds no sweep" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_evaluate_says_what_was_measured_and_how(profile: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.csv"
    result = hess_patch("evaluate", *DATA, "--profile", profile, "--sparsity", "0.6", "-o", output)
    assert result.exit_code == 0, result.output
    for text in ("AUC@30", "AUC@3 ", "Chamfer", "F1", "Umeyama", "Alignment that was possible: pixels", "2 scenes"):
        assert text in result.output
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["arm"] for row in rows} == {"dense", "uniform", "hess"}
    assert all(float(row["chamfer"]) > 0 and row["alignment"] == "pixels" and row["alignment_asked"] for row in rows)


def test_evaluate_takes_rules_alignments_and_poses_alone(tmp_path: Path) -> None:
    rule = hess_patch("evaluate", *DATA, "--sparse-ratio", ".5", "--cdf-threshold", ".8", "--alignment", "cameras")
    assert (
        rule.exit_code == 0
        and "rho 0.5 tau 0.8" in rule.output
        and "Alignment that was possible: cameras" in rule.output
    )
    both = hess_patch("evaluate", *DATA, "--sparse-ratio", ".5", "--sparsity", ".8")
    assert both.exit_code == 2 and "choose one of them" in both.output
    written = hess_patch("convert", "--data", "rooms:test,count=1,size=4", "-o", tmp_path / "rooms")
    assert written.exit_code == 0
    (room,) = (tmp_path / "rooms").iterdir()
    record = json.loads((room / "cameras.json").read_text())
    for frame in record["frames"]:
        frame["depth"] = None
    (room / "cameras.json").write_text(json.dumps({**record, "depth_scale": None}))
    options = ("--model", "demo", "--data", f"folder:{tmp_path / 'rooms'}", "--block-q", "8", "--block-k", "8")
    poses = hess_patch("evaluate", *options)
    assert poses.exit_code == 0, poses.output
    assert "No scene has depth or points" in poses.output and "Chamfer" not in poses.output
