"""The script that compares selectors, budgets and block maps: what a kill costs, what drift is, who wins twice."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import hess_plugin_cuda
from hess_plugin import Profile, Scene, patch
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.demo.rooms import make_scene
from hess_plugin.plugins import resolve_adapter
from hess_plugin.sites import Site

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def modules() -> Iterator[SimpleNamespace]:
    """The modules of the script, imported as it imports them."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = ("cells", "comparing", "experiment", "probe", "records", "tables")
        found = {name: importlib.import_module(f"selecting.{name}") for name in names}
        yield SimpleNamespace(**found, script=importlib.import_module("block_selectors"))
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in [n for n in sys.modules if n.partition(".")[0] in ("selecting", "block_selectors")]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def rooms() -> list[Scene]:
    return [make_scene(seed, views=4) for seed in (11, 12, 13)]


class Killed(BaseException):
    """Stands for a kill."""


def experiment_of(modules: SimpleNamespace, model: TinyVGGT, rooms: list[Scene], folder: Path, said: list[str]) -> Any:
    scenes = modules.experiment.Scenes(rooms[2:], rooms[:2], [room.name for room in rooms[:2]])
    return modules.experiment.Experiment(model, scenes, folder, 1, said.append)


@pytest.mark.slow
def test_an_experiment_goes_on_after_a_kill_and_keeps_equal_totals(
    modules: SimpleNamespace, tiny_model: TinyVGGT, rooms: list[Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cell = modules.cells.Cell
    cells = [Cell(), *(Cell(0.53, allocation=name) for name in ("uniform", "hess"))]
    cells.append(Cell(0.53, "restore", "harm", 4, 2, "hilbert", curves="own"))
    said: list[str] = []
    measured: list[tuple[str, str]] = []
    measure = modules.experiment.Experiment.measure

    def counted(self: Any, cell: Any, scene: Scene) -> Any:
        if len(measured) == 5:
            raise Killed
        measured.append((cell.name, scene.name))
        return measure(self, cell, scene)

    with monkeypatch.context() as patcher, pytest.raises(Killed):
        patcher.setattr(modules.experiment.Experiment, "measure", counted)
        experiment_of(modules, tiny_model, rooms, tmp_path, said).run(cells)
    path = tmp_path / "measurements.jsonl"
    before = path.read_bytes()
    assert before.count(b"\n") == 5
    path.write_bytes(before + b'{"cell": "cut o')
    profile = (tmp_path / "mass.hess").stat().st_mtime_ns
    experiment_of(modules, tiny_model, rooms, tmp_path, said).run(cells)
    whole = path.read_bytes()
    assert whole.startswith(before) and whole.count(b"\n") == 8
    assert (tmp_path / "mass.hess").stat().st_mtime_ns == profile  # calibrated once
    own = Profile.load(tmp_path / "restore-4.2-hilbert.hess").metadata["harm"]
    assert (own["selector"], own["pool_q"], own["pool_k"], own["block_order"]) == ("restore", 4, 2, "hilbert")
    lines = [json.loads(line) for line in whole.splitlines()]
    assert {(line["cell"], line["scene"]) for line in lines} == {
        (cell.name, room.name) for cell in cells for room in rooms[:2]
    }
    totals = {line["cell"]: sum(line["kept"]) for line in lines}
    wanted = 2 * math.floor(4 * 18 * 18 * 0.47 + 0.5)  # 144 patches are 18 blocks
    assert totals.pop("dense") == 2 * 4 * 18 * 18 and set(totals.values()) == {wanted}
    assert len({tuple(line["kept"]) for line in lines}) > 2  # harm moves pairs between layers
    assert [bool(line["drift"]) for line in lines if line["cell"] != "dense"] == [True, False] * 3
    assert "left" in said[-1] and "drift" in said[-1]
    with monkeypatch.context() as patcher:
        patcher.setattr(modules.experiment.Experiment, "measure", counted)  # another call would be one too many
        experiment_of(modules, tiny_model, rooms, tmp_path, said).run(cells)
    assert path.read_bytes() == whole


def joined_heads(site: Site, run: Any) -> Tensor:
    """What a site's heads gave in a run, before W_O: ``[N, H * d]`` in the order of the tokens."""
    seen = []
    hook = site.module.proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        run()
    finally:
        hook.remove()
    return seen[0][0].double()


@pytest.mark.parametrize("order", ["raster", "hilbert"])
def test_drift_and_recall_are_those_of_plain_loops(
    modules: SimpleNamespace, tiny_model: TinyVGGT, room: Scene, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    adapter = resolve_adapter(tiny_model)
    sites = adapter.sites(tiny_model)
    lists, inputs = [], {}
    attend = hess_plugin_cuda.block_sparse_attention

    def spied(*arguments: Any, **options: Any) -> Tensor:
        lists.append((arguments[0], arguments[1], arguments[3]))
        return attend(*arguments, **options)

    monkeypatch.setattr(hess_plugin_cuda, "block_sparse_attention", spied)
    options = {"sparsity": 0.6, "block_q": 8, "block_k": 8, "block_order": order}
    with torch.inference_mode():
        plain = adapter.predict(tiny_model, room.images).points
        with patch(tiny_model, **options):
            unwatched = adapter.predict(tiny_model, room.images).points
            sparse = [joined_heads(site, lambda: adapter.predict(tiny_model, room.images)) for site in sites]
            del lists[:]
            hooks = [
                site.module.register_forward_pre_hook(
                    lambda _, args, kwargs, index=index: inputs.update({index: (args, kwargs)}), with_kwargs=True
                )
                for index, site in enumerate(sites)
            ]
            with modules.probe.Probe(sites) as probe:
                assert torch.equal(adapter.predict(tiny_model, room.images).points, unwatched)
            for hook in hooks:
                hook.remove()
        assert torch.equal(adapter.predict(tiny_model, room.images).points, plain)
        assert not torch.equal(plain, unwatched) and len(lists) == len(sites)
        patches = torch.arange(4 * 41).unflatten(0, (4, 41))[:, 5:].flatten()
        for index, site in enumerate(sites):
            args, kwargs = inputs[index]
            dense = joined_heads(site, lambda: site.module(*args, **kwargs))  # noqa: B023 (called at once)
            change = (sparse[index] - dense)[patches]
            weight, drift = site.module.proj.weight.double(), 0.0
            for head in range(4):
                own = slice(8 * head, 8 * head + 8)
                drift += float((change[:, own] @ weight[:, own].T).square().sum(1).mean())
            assert probe.drift[index] == pytest.approx(drift, rel=1e-4) and drift > 0
            assert probe.recall[index] == pytest.approx(plain_recall(*lists[index]), rel=1e-5)
    assert min(probe.recall) > 0 and max(probe.recall) < 1 and probe.seconds > 0
    probe.clear()
    assert probe.drift == [0, 0] and probe.recall == [1, 1]  # what dense attention has


def plain_recall(q: Tensor, k: Tensor, lists: hess_plugin_cuda.BlockLists) -> float:
    """Share of true attention on patch keys that falls on the blocks of the lists, row by row."""
    kept = everything = 0.0
    for head in range(q.shape[1]):
        for row in range(18):
            start, end = lists.row_ptr[head * 18 + row : head * 18 + row + 2].tolist()
            keys = [8 * block + i for block in lists.col[start:end].tolist() for i in range(8)]
            for query in range(8 * row, 8 * row + 8):
                weights = (k[0, head].double() @ q[0, head, query].double() * 8**-0.5).softmax(0)
                kept += float(weights[keys].sum())
                everything += float(weights[:144].sum())
    return kept / everything


def test_cells_of_a_sparsity_keep_one_total(modules: SimpleNamespace) -> None:
    cells = modules.cells
    for part in cells.PARTS:
        found = cells.cells_of(part)
        assert len({cell.name for cell in found}) == len(set(found)) == len(found) and found[0].name == "dense"
    # A total over 4 layers of 8 heads is not always 4 times that of 8 heads, but at these sparsities it is.
    for sparsity in (0.65, 0.75, 0.85, 0.123):
        one = cells.target_total(sparsity, 8, 72, 72)
        moved = cells.exact(sparsity, 8, 72)
        assert cells.target_total(moved, 8, 72, 72) == one and cells.target_total(moved, 32, 72, 72) == 4 * one
        assert cells.total(sparsity, 4, 8, 72) == 4 * one and moved == pytest.approx(sparsity, abs=1e-4)


def written(modules: SimpleNamespace, folder: Path, gains: dict[str, tuple[float, float]]) -> None:
    """A folder of four scenes: what cells gain in AUC and in point error, give or take a little."""
    folder.mkdir()
    (folder / "about.json").write_text(json.dumps({"file": folder.name, "machine": "here", "hess_plugin": "0"}))
    journal = modules.records.Journal(folder)
    for cell, (auc, points) in gains.items():
        for index, wobble in enumerate((-0.01, 0.0, 0.0, 0.01)):
            drift = () if cell == "dense" else (1.0 - auc, 2.0)
            line = modules.records.Line(cell, f"room {index}", 0.5 + auc + wobble, 0.1 + points, (1,), 0.1, drift)
            journal.add(line if index else dataclasses.replace(line, point_error=math.nan))


def test_only_what_wins_on_both_models_is_listed(modules: SimpleNamespace, tmp_path: Path) -> None:
    same = {"dense": (0.2, -0.02), "uniform + mass 8.8 @ 0.75": (0.0, 0.0), "hess + mass 8.8 @ 0.75": (0.01, 0.0)}
    better, once, traded = (f"uniform + {name} 8.8 @ 0.75" for name in ("restore", "drift", "mass 2.2"))
    first = same | {better: (0.05, -0.01), once: (0.05, -0.01), traded: (0.03, 0.01)}
    second = same | {better: (0.04, -0.01), once: (0.0, 0.0), traded: (0.03, 0.01)}
    written(modules, tmp_path / "a", first)
    written(modules, tmp_path / "b", second)
    text = modules.tables.both(tmp_path / "a", tmp_path / "b")
    uniform, hess, best = text.split("\n## ")[1:]
    assert "uniform + restore 8.8 | 0.75 | +5.00 ± 0.00 \\* | +4.00 ± 0.00 \\*" in uniform
    assert "+3.00" in hess and "restore" in hess and "restore" in best
    assert all("At every sparsity (0.75): `uniform + restore 8.8`" in part for part in (uniform, hess))
    assert "drift" not in uniform + hess and "mass 2.2" not in uniform + hess  # once only; traded for points
    lines = modules.records.Journal(tmp_path / "a").lines
    error = modules.comparing.difference(lines[better], lines["dense"], modules.comparing.POINTS)
    assert error.count == 3 and error.mean == pytest.approx(10.0)  # a scene without the metric is left out
    assert not modules.comparing.Estimate(1.0, math.nan, 1).better(modules.comparing.AUC)
    cells = [cell for name, cell in lines.items() if name != "dense"]
    assert modules.comparing.rank_correlation(cells, modules.comparing.AUC) == pytest.approx(1.0)
    assert modules.comparing.rank_correlation(cells, modules.comparing.AUC, 0) == pytest.approx(1.0)
    assert math.isnan(modules.comparing.rank_correlation(cells, modules.comparing.AUC, 1))  # all the same


def test_rounds_are_those_of_the_cell_and_compared_with_the_most(
    modules: SimpleNamespace, tiny_model: TinyVGGT, rooms: list[Scene], tmp_path: Path
) -> None:
    made: list[int] = []
    selection, restored_rows = modules.experiment.selection, modules.experiment.selection.restored_rows
    usual = selection.usual_rounds

    def counted(*arguments: Any, rounds: int) -> None:
        made.append(rounds)
        restored_rows(*arguments, rounds=rounds)

    cells = [modules.cells.Cell(0.53, "restore", "uniform", 4, 8, rounds=rounds) for rounds in (1, 5, None)]
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(selection, "restored_rows", counted)
        experiment_of(modules, tiny_model, rooms, tmp_path, []).run(cells)
    assert made == [1] * 4 + [5] * 4 + [3] * 4 and selection.usual_rounds is usual  # 2 layers, 2 rooms
    name = "uniform + restore 4.8"
    found = modules.records.Journal(tmp_path).lines
    assert set(found) == {f"{name}, rounds 1 @ 0.53", f"{name}, rounds 5 @ 0.53", f"{name} @ 0.53"}
    assert len({tuple(line.drift) for lines in found.values() for line in lines.values() if line.drift}) > 1
    heading, _, *rows = modules.tables._table(found, cells, 0.53)[2:]
    at = heading.split("|").index(" - 5 rounds ")
    gap = modules.comparing.difference(found[cells[0].name], found[cells[1].name], modules.comparing.AUC)
    assert [row.split("|")[at].strip() for row in rows][:2] == [f"{gap.mean:+.2f} ± {gap.error:.2f}", "-"]
    assert set(modules.tables._of_usual_rounds(found)) == {f"{name} @ 0.53"}


def test_another_model_is_refused_and_what_is_there_is_shown(
    modules: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["block_selectors.py", *arguments])
        monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
        modules.script.main()

    journal = modules.records.Journal(tmp_path)
    for cell in ("dense", "uniform + mass 8.8 @ 0.75", "hess + mass 8.8 @ 0.75", "uniform + restore 2.2 @ 0.75"):
        for scene in ("a", "b") if "restore" not in cell else ("a",):
            journal.add(modules.records.Line(cell, scene, 0.5, 0.1, (3,), 0.2))
    run("-o", str(tmp_path), "--show", "--sparsity", "0.75", "--write", str(tmp_path / "results.md"))
    text = (tmp_path / "results.md").read_text()
    assert "`python benchmarks/block_selectors.py -o DIR --sparsity 0.75 --part main`" in text
    assert text in capsys.readouterr().out and "| hess + mass 8.8 | 50.00 ± 0.00 | +0.00 ± 0.00 | - |" in text
    assert "| uniform + restore 2.2 (1 scenes) | 50.00 ± nan |" in text
    with pytest.raises(SystemExit, match=r"views 16, this one has 4; give another"):
        run("-o", str(tmp_path), "--show", "--views", "4")
    with pytest.raises(SystemExit):
        run()
