"""The script that makes the paper's tables: what it runs, what a kill costs, and what stands in the tables."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from click.testing import CliRunner

from hess_plugin.cli import main
from hess_plugin.evaluation import arms as arms_module
from hess_plugin.evaluation.arms import PAPER_ROWS, Arm, Row
from hess_plugin.evaluation.comparison import Runner
from hess_plugin.evaluation.records import FAILED, METRICS, Measurement, read_measurements
from hess_plugin.evaluation.sweep import Cell
from hess_plugin.evaluation.sweep_folder import SweepFolder
from hess_plugin.scenes.scene import Scene

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
ROOMS = (
    "--calibration", "rooms:calibration,size=3", "--calibration-scenes", "2", "--calibration-views", "3",
    "--cameras", "rooms:test,size=3", "--cameras-scenes", "2", "--cameras-views", "3",
    "--clouds", "rooms:test,size=3", "--clouds-scenes", "1", "--clouds-views", "3",
    "--block", "8", "--max-points", "500", "--options=--seed 3", "--calibrate-options=--eps 0.2",
    "--sweep-options=--alignment cameras --tolerance 0.02",
)  # fmt: skip
Cells = list[list[str]]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("paper_tables", BENCHMARKS / "paper_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


def parsed(text: str) -> dict[str, Cells]:
    """The Markdown tables of a text by their headings, checked to be tables."""
    found: dict[str, Cells] = {}
    for section in text.split("\n## ")[1:]:
        title, *lines = section.splitlines()
        rows = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in lines if line.startswith("|")]
        assert all(line.startswith("| ") and line.endswith(" |") for line in lines if "|" in line)
        assert len({len(row) for row in rows}) == 1 and set(rows[1]) == {"---"}
        found[title] = [rows[0], *rows[2:]]
    return found


def column(table: Cells, heading: str) -> list[str]:
    return [row[table[0].index(heading)] for row in table[1:]]


def measurement(scene: str, row: Row, arm: Arm, base: float) -> Measurement:
    numbers = dict.fromkeys(METRICS, base) | {"sparsity": 0.0 if arm.dense else row.knob / 2.0, "seconds": 1.0}
    return Measurement(scene, arm.label, arm.name, **numbers, knob=arm.knob, alignment="pixels")


def hand_made(folder: Path, rows: Sequence[Row], dtu: str | None = None, weights: str = "w.pt") -> None:
    """A sweep of these rows of the paper on two scenes: uniform has 0.5 and 0.7, HeSS 0.125 more."""
    plan = {"rows": [asdict(row) for row in PAPER_ROWS], "scoring": {"camera_weight": 0.5}, "weights": weights}
    plan |= {"scenes": ["a", "b"], "data": "co3d:/data", "views": 20, "dtu": dtu}
    found = SweepFolder.start(folder, plan, {"command": "hess-patch sweep", "machine": "here", "hess_plugin": "0"})
    zero = Row(sparsity=0.0)
    cells = [Cell(zero, Arm("dense"), 0.0, True, tuple(measurement(s, zero, Arm("dense"), 0.9) for s in "ab"))]
    for row in rows:
        for name, more in (("uniform", 0.0), ("hess", 0.125)):
            arm = Arm(name, allocation=name).at(row)
            measured = [measurement(s, row, arm, base + more) for s, base in (("a", 0.5), ("b", 0.7))]
            if (name, row) == ("hess", PAPER_ROWS[1]):
                lengths = dict.fromkeys(("chamfer", "point_error", "accuracy", "completeness", "f1"), math.nan)
                measured[1] = replace(measured[1], alignment=f"{FAILED}no point is confident", **lengths)
            cells.append(Cell(row, arm, 0.0, True, tuple(measured)))
    found.journal().add([m for cell in cells for m in cell.measurements])
    found.write_cells(cells)


def test_the_published_figures_stand_beside_ours(script: ModuleType, tmp_path: Path) -> None:
    hand_made(tmp_path / "vggt-cameras", PAPER_ROWS)
    hand_made(tmp_path / "vggt-clouds", PAPER_ROWS[:3], dtu="/data/dtu")
    text = script.tables([script.Model.parse("vggt=w.pt@/code"), script.Model.parse("pi3=p.pt")], tmp_path)
    found = parsed(text)
    assert list(found) == ["vggt, cameras", "vggt, clouds"]  # nothing is there of pi3
    cameras, clouds = found.values()
    with (BENCHMARKS / "published/hess.csv").open() as file:
        published = [row for row in csv.DictReader(file) if row["model"] == "vggt"]
    assert len(published) == 16 == len(cameras) - 2
    for metric, heading in (("auc30", "AUC@30"), ("ate", "ATE")):
        for arm, ours in (("uniform", "0.6000 ± 0.1000"), ("hess", "0.7250 ± 0.1000")):
            assert column(cameras, f"published {heading} {arm}") == ["", *(row[f"{metric}_{arm}"] for row in published)]
            assert set(column(cameras, f"{heading} {arm}")[1:]) == {ours}
        assert set(column(cameras, f"{heading} hess - uniform")[1:]) == {"+0.1250 ± 0.0000"}
    assert column(cameras, "published sparsity") == ["", *(row["sparsity"] for row in published)]
    assert [(float(r), float(t)) for r, t in zip(column(cameras, "rho")[1:], column(cameras, "tau")[1:], strict=True)] \
        == [(row.sparse_ratio, row.cdf_threshold) for row in PAPER_ROWS]  # fmt: skip
    assert column(cameras, "AUC@30 uniform")[0] == "0.9000 ± 0.0000" and cameras[1][0] == "dense"
    assert [row[0] for row in clouds[1:]] == ["dense", "0.1", "0.3", "0.5"]  # the sweep is not further yet
    assert column(clouds, "Chamfer hess")[2] == "0.6250 (1 of 2 scenes)"
    assert column(clouds, "Chamfer hess - uniform")[2] == "+0.1250 (1 of 2 scenes)"
    assert column(clouds, "published Chamfer hess")[1:] == [row["chamfer_hess"] for row in published[:3]]
    assert "mm, DTU's protocol" in text.partition("## vggt, clouds")[2]
    assert "w.pt; 2 scenes of co3d:/data, views 20" in text and "Random" not in text


def test_a_model_that_was_not_published_has_ours_alone(script: ModuleType, tmp_path: Path) -> None:
    hand_made(tmp_path / "demo-clouds", PAPER_ROWS[:1], weights="random")
    text = script.tables([script.Model.parse("demo")], tmp_path)
    assert "**Random weights: figures made with them mean nothing" in text
    assert "published" not in text.partition("## demo")[2] and len(parsed(text)["demo, clouds"]) == 3


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("vggt", ["--model", "vggt"]),
        ("vggt=w.pt", ["--model", "vggt", "--weights", "w.pt"]),
        ("vggt=hub/id@/a/b", ["--model", "vggt", "--weights", "hub/id", "--repo", "/a/b"]),
        ("vggt=@/a/b", ["--model", "vggt", "--repo", "/a/b"]),
    ],
)
def test_a_model_is_read_as_it_is_written(script: ModuleType, text: str, options: list[str]) -> None:
    assert script.Model.parse(text).options == options


class Killed(BaseException):
    """Stands for a kill."""


@pytest.fixture
def in_process(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Run commands in this process, which has imported everything already; gives what was run."""
    commands: list[list[str]] = []

    def run(arguments: Sequence[str], check: bool) -> subprocess.CompletedProcess[str]:
        assert arguments[:3] == [sys.executable, "-m", "hess_plugin.cli"] and not check
        commands.append(list(arguments[3:]))
        result = CliRunner().invoke(main, arguments[3:])
        if isinstance(result.exception, Killed):
            raise result.exception
        print(result.output)
        return subprocess.CompletedProcess(arguments, result.exit_code)

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(arms_module, "PAPER_ROWS", PAPER_ROWS[9:11])
    return commands


@pytest.fixture
def run_script(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["paper_tables.py", *arguments])
        script.main()

    return run


def kill_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the next measurement but so many the last."""
    measure = Runner.measure
    left = iter(range(count))

    def measured(self: Runner, scene: Scene, arm: Arm) -> Measurement:
        if next(left, None) is None:
            raise Killed
        return measure(self, scene, arm)

    monkeypatch.setattr(Runner, "measure", measured)


@pytest.mark.slow
def test_the_demo_model_goes_through_all_of_it_and_on_after_kills(
    in_process: list[list[str]], run_script: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("--model", "demo", *ROOMS, "-o", str(tmp_path))
    with pytest.MonkeyPatch.context() as patcher:
        kill_after(10 + 5, patcher)  # verify takes 2 scenes and 3 arms; then in the middle of the sweep
        with pytest.raises(Killed):
            run_script(*command)
    assert [name for name, *_ in in_process] == ["calibrate", "verify", "sweep"]
    before = (tmp_path / "demo-cameras/measurements.csv").read_bytes()
    assert 0 < before.count(b"\n") - 1 < 10 and not (tmp_path / "tables.md").exists()
    in_process.clear()
    run_script(*command)
    assert [name for name, *_ in in_process] == ["sweep", "report", "sweep", "report"]
    assert all("--seed" in options for name, *options in in_process if name == "sweep")
    assert (tmp_path / "demo-cameras/measurements.csv").read_bytes().startswith(before)
    tables = parsed((tmp_path / "tables.md").read_text())
    for kind, heading, metric, scenes in (("cameras", "AUC@30", "auc30", 2), ("clouds", "Chamfer", "chamfer", 1)):
        check_table(tables[f"demo, {kind}"], tmp_path / f"demo-{kind}", heading, metric, scenes)
        assert (tmp_path / f"demo-{kind}/report.html").stat().st_size > 1000
    assert "published" not in str(tables)
    done = {path: path.read_bytes() for path in tmp_path.rglob("*.csv")}
    run_script(*command)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.csv")} == done
    assert "$ hess-patch sweep --model demo --seed 3 --profile" in capsys.readouterr().out


def check_table(table: Cells, folder: Path, heading: str, metric: str, scenes: int) -> None:
    """A table of the script against the files of its sweep."""
    plan = json.loads((folder / "sweep.json").read_text())["plan"]
    assert plan["alignment_asked"] == "cameras" and plan["tolerance"] == 0.02 and plan["seed"] == 3
    with (folder / "cells.csv").open() as file:
        cells = {(cell["row"], cell["arm"]): cell for cell in csv.DictReader(file)}
    assert len(read_measurements(folder / "measurements.csv")) >= len(cells) * scenes
    assert len(cells) == 1 + 2 * 2 and len(table) == 1 + 1 + 2
    sparsities = [float(value) for value in column(table, "sparsity uniform")]
    assert sparsities == sorted(sparsities)
    for rho, tau, arm in ((*pair, arm) for pair in [r[:2] for r in table[2:]] for arm in ("uniform", "hess")):
        row, cell = f"rho {rho} tau {tau}", cells[f"rho {rho} tau {tau}", arm]
        shown = next(r for r in table[2:] if r[:2] == [rho, tau])
        at = dict(zip(table[0], shown, strict=True))
        assert float(at[f"sparsity {arm}"]) == pytest.approx(float(cell["sparsity"]), abs=6e-4)
        assert abs(float(at["sparsity hess"]) - float(at["sparsity uniform"])) <= 0.021, row
        value = f"{float(cell[metric]):.4f}"
        error = f" ± {float(cell[f'{metric}_se']):.4f}" if scenes > 1 else ""
        assert at[f"{heading} {arm}"] == value + error
        if arm == "hess":
            assert at[f"{heading} hess - uniform"].startswith(f"{float(cell[f'{metric}_minus_uniform']):+.4f}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no scenes to measure on"),
        (("--cameras", "rooms:test", "--block", "x"), "invalid int value"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    in_process: list[list[str]],
    run_script: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    with pytest.raises(SystemExit):
        run_script("--model", "demo", "--calibration", "rooms:calibration", *arguments, "-o", str(tmp_path / "o"))
    assert words in capsys.readouterr().err and not in_process and not (tmp_path / "o").exists()


def test_a_command_that_fails_ends_the_script(
    in_process: list[list[str]], run_script: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_script(
            "--model", "demo", "--calibration", "folder:/nowhere", "--cameras", "rooms:test", "-o", str(tmp_path)
        )
    assert stop.value.code == 1 and len(in_process) == 1 and "/nowhere" in capsys.readouterr().out
