"""The report of a sweep is one page that needs nothing beside it and says what the cells say."""

from __future__ import annotations

import base64
import csv
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from hess_plugin import Profile, SceneError
from hess_plugin.evaluation.arms import Arm, Row
from hess_plugin.evaluation.cloud_picture import Clouds
from hess_plugin.evaluation.records import METRICS, Measurement
from hess_plugin.evaluation.shown import SHOWN, looks
from hess_plugin.evaluation.statistics import Statistic
from hess_plugin.evaluation.sweep import Cell
from hess_plugin.evaluation.sweep_folder import SweepFolder
from hess_plugin.evaluation.sweep_report import write_report
from hess_plugin.evaluation.sweep_results import SweepResults, direction
from hess_plugin.scoring import ERROR_NAMES
from hess_plugin.sites import PROJECTIONS

HOSTILE = "<script>alert('x')</script>&$y^_"
ROWS = (Row(0.35), Row(0.73), Row(sparse_ratio=0.8, cdf_threshold=0.4))
ARMS = ("uniform", "hess", HOSTILE, "hess W_K")
POSES = ("auc30", "auc15", "auc5", "auc3", "ate", "centre_error")
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Everything a test asks of a page; fails where tags do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[list[str]] = []  # of tables, by row
        self.sections: dict[str, str] = {}
        self._open: list[str] = []
        self._section = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag in ("section", "header"):
            self._section = dict(attrs).get("id") or tag
        if tag == "tr":
            self.cells.append([])
        elif tag in ("td", "th"):
            self.cells[-1].append("")
        elif tag == "small":
            self.cells[-1][-1] += "|"

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.sections[self._section] = self.sections.get(self._section, "") + data
        if {"td", "th"} & set(self._open):
            self.cells[-1][-1] += data.strip()

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def measured(scene: int, row: str, arm: str, sparsity: float, known: Sequence[str]) -> Measurement:
    """A measurement that depends on all three, the same every time."""
    generator = torch.Generator().manual_seed(hash_of(f"{scene}{row}{arm}"))
    values = dict(
        zip(METRICS, torch.rand(len(METRICS), generator=generator, dtype=torch.float64).tolist(), strict=True)
    )
    values |= {name: math.nan for name in METRICS if name not in (*known, "seconds")}
    values |= {"sparsity": sparsity + 0.001 * values["seconds"] if sparsity else 0.0}
    layers = tuple(sparsity + 0.01 * layer for layer in range(3)) if sparsity else ()
    return Measurement(f"{HOSTILE}{scene}", row, arm, **values, knob=sparsity, alignment="cameras", layers=layers)


def hash_of(text: str) -> int:
    return sum(ord(letter) * 31**i for i, letter in enumerate(text)) % 2**31


def sweep(path: Path, rows: int, known: Sequence[str], *, arms: Sequence[str] = ARMS, scenes: int = 4) -> Path:
    """A folder as a sweep leaves it after so many of its rows."""
    plan = {
        "rows": [asdict(row) for row in ROWS],
        "scoring": {"camera_weight": 0.5, "projection": "q", "normalisation": "sum", "rows": "all"},
        "model": "vggt",
        "weights": HOSTILE,
        "data": f"co3d:/data/{HOSTILE}",
        "views": 20,
        "tolerance": 0.005,
    }
    about = {
        "command": "hess-patch sweep --model vggt -o 'a b'",
        "machine": "a machine",
        "hess_plugin": "1",
        "date": "now",
    }
    folder = SweepFolder.start(path, plan, about)
    journal, cells = folder.journal(), []
    for row in (Row(0.0), *ROWS[:rows]):
        for name in ("dense",) if row == Row(0.0) else arms:
            arm = Arm("dense") if name == "dense" else Arm(name, allocation=name.split()[0]).at(row)
            sparsity = {"0": 0.0, "0.35": 0.35, "0.73": 0.73}.get(row.label, 0.6)
            found = [measured(i, row.label, name, sparsity, known) for i in range(scenes)]
            found = [Measurement(**{**vars(m), "knob": arm.knob}) for m in found]
            journal.add(found)
            cells.append(Cell(row, arm, 0.02 if name == HOSTILE else 0.001, name != HOSTILE, tuple(found)))
    folder.write_cells(cells)
    return path


def profile(path: Path) -> Profile:
    generator = torch.Generator().manual_seed(0)
    traces = {
        f"{e}.{p}": torch.rand(3, 3, 4, dtype=torch.float64, generator=generator)
        for e in ERROR_NAMES
        for p in PROJECTIONS
    }
    sites = tuple(f"blocks.{i}" for i in range(3))
    metadata = {"model": "vggt", "weights": "w w.pt", "data": "co3d:/d", "views": 20, "seed": 1, "eps": 0.05}
    metadata |= {"autocast": None, "target": "truth", "skipped": {"x": "dark"}, "versions": {"torch": "2.13"}}
    made = Profile("vggt", sites, 4, (f"{HOSTILE}0", "b", "c"), traces, 0.5, "f" * 16, metadata)
    made.save(path)
    return made


def clouds(path: Path) -> Clouds:
    points = torch.rand(200, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([-0.5, -0.5, 1.5])
    tensors = {"c2w": torch.eye(4)[None]}
    for i in range(2):
        tensors |= {f"{i}.points": points + 0.01 * i, f"{i}.colours": torch.full((200, 3), 90, dtype=torch.uint8)}
        tensors[f"{i}.errors"] = points[:, 0] + 0.1 * i
    made = Clouds(tensors, HOSTILE, ("dense", HOSTILE), "0.73", 0.3, "scene", "nearest", ("cameras", "cameras"))
    made.save(path)
    return made


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of three rows, with points, a profile and clouds; names that would break a page."""
    path = sweep(tmp_path_factory.mktemp("sweep") / "full", 2, (*POSES, "point_error"))
    profile(path / "profile.hess")
    clouds(path / "clouds.safetensors")
    write_report(path)
    return path


@pytest.fixture(scope="module")
def cameras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep of scenes with cameras alone, without a profile, of two arms."""
    path = sweep(tmp_path_factory.mktemp("sweep") / "cameras", 3, POSES, arms=("uniform", "hess"))
    write_report(path)
    return path


@pytest.fixture(params=["full", "cameras"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_the_page_needs_nothing_beside_it(folder: Path) -> None:
    page = Page(folder / "report.html")
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
        assert not re.search(r"url\(|@import", attributes.get("style") or "")
    assert page.named("link") == page.named("script") == []
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text and "url(" not in text and "@import" not in text


def test_every_picture_is_embedded_and_lies_beside_the_page(folder: Path) -> None:
    images = Page(folder / "report.html").named("img")
    embedded = [base64.b64decode((image["src"] or "").removeprefix("data:image/png;base64,")) for image in images]
    assert sorted(embedded) == sorted(path.read_bytes() for path in folder.glob("report-*.png"))
    assert all(picture.startswith(b"\x89PNG") for picture in embedded) and all(image["alt"] for image in images)


def test_there_is_a_picture_of_everything_that_was_measured(full: Path, cameras: Path) -> None:
    names = {path.name.removeprefix("report-").removesuffix(".png") for path in full.glob("report-*.png")}
    curves = {"auc30", "auc5", "ate", "point_error"}
    differences = {f"{part}-{m}" for part in ("against", "ablations") for m in ("auc30", "auc5", "point_error")}
    assert names == {"heads", "layers", "clouds"} | curves | differences
    names = {path.name.removeprefix("report-").removesuffix(".png") for path in cameras.glob("report-*.png")}
    assert names == {"layers", "auc30", "auc5", "ate", "against-auc30", "against-auc5"}


def test_pruned_heads_have_pictures_of_their_own(tmp_path: Path) -> None:
    """On one axis with them the other arms would fall together."""
    path = sweep(tmp_path / "s", 2, POSES, arms=("uniform", "hess", "kwon"))
    write_report(path)
    names = {file.name.removeprefix("report-").removesuffix(".png") for file in path.glob("report-*.png")}
    assert names == {"layers", "auc30", "auc5", "ate", "against-auc30", "against-auc5", "pruning-auc30"}
    assert "Pruning whole heads" in (path / "report.html").read_text(encoding="utf-8")


def test_the_table_holds_the_figures_of_the_cells(folder: Path) -> None:
    page = Page(folder / "report.html")
    head, *body = page.cells
    metrics = {heading.rstrip(" ↑↓"): i for i, heading in enumerate(head)}
    with (folder / "cells.csv").open(encoding="utf-8", newline="") as file:
        cells = {(line["row"], line["arm"]): line for line in csv.DictReader(file)}
    seen, row = set(), ""
    for line in body:
        if len(line) == 1:
            row = line[0].removeprefix("row ")
            continue
        cell = cells["0" if row == "dense" else row, line[0]]
        seen.add((cell["row"], cell["arm"]))
        sparsity, _, unmatched = line[1].partition("|")
        assert sparsity.split(" ±")[0] == f"{float(cell['sparsity']):.4f}"
        assert unmatched == ("" if cell["matched"] == "True" else "not matched, +0.0200")
        for metric, shown in SHOWN.items():
            if metric == "sparsity" or shown.heading not in metrics:
                continue
            value, _, difference = line[metrics[shown.heading]].partition("|")
            assert value == told(cell, metric, "", "")
            if cell["arm"] in ("dense", "uniform") or metric == "seconds":  # seconds are not side by side
                assert difference == ""
            else:
                assert difference.removesuffix(" *") == told(cell, metric, "_minus_uniform", "+")
    assert seen == set(cells)
    known = {
        heading
        for metric, heading in ((m, s.heading) for m, s in SHOWN.items())
        if cells["0", "dense"][metric] != "nan"
    }
    assert set(metrics) == (known - {"sparsity"}) | {"arm", "measuredsparsity"}


def told(cell: dict[str, str], metric: str, suffix: str, sign: str) -> str:
    mean, error = (SHOWN[metric].factor * float(cell[f"{metric}{suffix}{end}"]) for end in ("", "_se"))
    return f"{mean:{sign}.{SHOWN[metric].decimals}f} ± {error:.{SHOWN[metric].decimals}f}"


def test_rows_come_in_the_order_of_measured_sparsity(cameras: Path) -> None:
    rows = [line[0] for line in Page(cameras / "report.html").cells if len(line) == 1]
    assert rows == ["dense", "row 0.35", "row rho 0.8 tau 0.4", "row 0.73"]


def test_names_from_outside_are_text(full: Path) -> None:
    page = Page(full / "report.html")
    assert page.named("script") == [] and HOSTILE in page.sections["header"]
    assert any(line[0] == HOSTILE for line in page.cells)
    assert f"Scene {HOSTILE}" in page.sections["clouds"]
    assert "alert('x')</script>" not in (full / "report.html").read_text(encoding="utf-8")


def test_a_sweep_that_goes_on_says_so(full: Path, cameras: Path) -> None:
    header = Page(full / "report.html").sections["header"]
    assert "This sweep is not finished: 2 of 3 rows are there; missing: rho 0.8 tau 0.4." in header
    assert "calibrated on 1 of the scenes measured here" in header
    assert "not finished" not in Page(cameras / "report.html").sections["header"]


def test_scenes_with_cameras_alone_have_no_clouds(full: Path, cameras: Path) -> None:
    assert "true cameras only, neither depth nor points" in Page(cameras / "report.html").sections["clouds"]
    section = Page(full / "report.html").sections["clouds"]
    assert "farther than 0.3 mean distances" in section and "nearest point of the true cloud" in section


def test_the_same_sweep_gives_the_same_bytes(cameras: Path) -> None:
    before = {path: path.read_bytes() for path in cameras.glob("report*")}
    write_report(cameras)
    assert {path: path.read_bytes() for path in cameras.glob("report*")} == before


def test_commands_and_protocol_are_told(full: Path, cameras: Path) -> None:
    page = Page(full / "report.html")
    commands = page.sections["commands"]
    assert "hess-patch sweep --model vggt -o 'a b'" in commands
    assert f"hess-patch report {full} -o {full}/report.html" in commands
    assert (
        "hess-patch calibrate --model vggt --weights 'w w.pt' --data co3d:/d --scenes 4 --views 20 --seed 1 --eps 0.05 "
        "--autocast none --target truth -o profile.hess"
    ) in commands
    protocol = page.sections["protocol"]
    for words in ("mean distance of true points", "camera centres", "within 0.005", "Student's t", "AUC@30, AUC@15"):
        assert words in protocol
    assert "hess-patch calibrate" not in Page(cameras / "report.html").sections["commands"]


def test_only_dense_is_a_report_too(tmp_path: Path) -> None:
    path = sweep(tmp_path / "s", 0, POSES)
    assert write_report(path, tmp_path / "out" / "page.html") == [tmp_path / "out" / "page.html"]
    page = Page(tmp_path / "out" / "page.html")
    assert "No row is finished yet; the dense model has AUC@30" in page.sections["header"]
    assert "0 of 3 rows" in page.sections["header"] and "true cameras only" in page.sections["clouds"]
    assert len(page.cells) == 3 and page.named("img") == []


def headline(tmp_path: Path, hess: Sequence[float], uniform: Sequence[float], matched: bool = True) -> str:
    folder = SweepFolder.start(
        tmp_path, {"rows": [asdict(ROWS[1])], "scoring": {}}, {"machine": "m", "hess_plugin": "1"}
    )
    journal, cells = folder.journal(), []
    for name, column in (("uniform", uniform), ("hess", hess)):
        arm = Arm(name, allocation=name).at(ROWS[1])
        values = {m: math.nan for m in METRICS}
        found = [
            Measurement(f"s{i}", "0.73", name, **{**values, "auc30": v, "sparsity": 0.73}, knob=0.73)
            for i, v in enumerate(column)
        ]
        journal.add(found)
        cells.append(Cell(ROWS[1], arm, 0.0 if matched else 0.03, matched, tuple(found)))
    folder.write_cells(cells)
    return SweepResults.load(tmp_path).headline


@pytest.mark.parametrize(
    "gain, words",
    [
        ((0.10, 0.11, 0.12), "hess minus uniform: AUC@30 +11.0 ± 0.6 points (better, 95% interval +8.5 to +13.5)"),
        ((-0.10, -0.11, -0.12), "AUC@30 -11.0 ± 0.6 points (worse, 95% interval -13.5 to -8.5)"),
        ((0.10, -0.11, 0.12), "AUC@30 +3.7 ± 7.4 points (within error, no difference shown, 95% interval"),
    ],
)
def test_the_headline_is_honest(tmp_path: Path, gain: tuple[float, ...], words: str) -> None:
    text = headline(tmp_path, [0.5 + g for g in gain], [0.5] * 3)
    assert words in text and text.startswith("At the sparsest row (0.73; measured sparsity 0.730)")
    assert text.endswith("; 3 scenes, paired by scene.")


def test_the_headline_of_one_scene_claims_no_error(tmp_path: Path) -> None:
    text = headline(tmp_path, [0.6], [0.5], matched=False)
    assert "AUC@30 +10.0 points (no error known); measured sparsity is not matched, it differs by +0.030" in text
    assert text.endswith("; one scene, so without errors.")


@pytest.mark.parametrize("metric, better", [("auc30", 1), ("ate", -1)])
def test_directions_follow_the_interval(metric: str, better: int) -> None:
    def statistic(mean: float, count: int) -> Statistic:
        return Statistic({metric: mean}, {metric: 1.0}, {metric: count})

    assert direction(statistic(4.4, 3), metric) == better and direction(statistic(-4.4, 3), metric) == -better
    assert direction(statistic(4.2, 3), metric) == 0  # t with 2 degrees of freedom is 4.303
    assert direction(statistic(2.1, 30), metric) == better and direction(statistic(2.0, 30), metric) == 0


def test_every_arm_has_its_own_look_whoever_else_is_there() -> None:
    names = ["dense", "uniform", "equal", "hess", "reverse", "uncapped", "random", "michel", "kwon", "kwon-tuned"]
    others = [f"hess {i}" for i in range(9)]
    found = looks([*names, *others])
    assert len({(look.colour, look.marker, look.line) for look in found.values()}) == len(found)
    assert {name: looks([name])[name] for name in names} == {name: found[name] for name in names}


def test_every_metric_is_shown() -> None:
    assert set(SHOWN) == set(METRICS)
    assert SHOWN["auc30"].number(-0.0004, signed=True) == "+0.0" and SHOWN["ate"].number(0.5) == "0.5000"


def test_damage_is_told_in_a_sentence(tmp_path: Path) -> None:
    path = sweep(tmp_path / "s", 1, POSES, arms=("uniform",))
    text = (path / "cells.csv").read_text(encoding="utf-8")
    for file, damaged in (
        ("cells.csv", text.replace("uniform", "unicorn")),
        ("cells.csv", text.replace("0.35", "x")),
        ("clouds.safetensors", "nothing"),
        ("sweep.json", "{"),
    ):
        whole = (path / file).read_bytes() if (path / file).exists() else None
        (path / file).write_text(damaged, encoding="utf-8")
        with pytest.raises(SceneError, match=f"{re.escape(str(path / file))}.*damaged"):
            write_report(path)
        (path / file).unlink() if whole is None else (path / file).write_bytes(whole)


def test_a_plan_that_is_no_plan_is_told(tmp_path: Path) -> None:
    path: Any = sweep(tmp_path / "s", 1, POSES, arms=("uniform",))
    plan = (path / "sweep.json").read_text(encoding="utf-8")
    (path / "sweep.json").write_text(plan.replace("sparse_ratio", "sparse_ration"), encoding="utf-8")
    with pytest.raises(SceneError, match="damaged"):
        write_report(path)
