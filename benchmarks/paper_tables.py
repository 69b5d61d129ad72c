"""Makes the paper's tables S1 and S2 with real weights and data, unattended, beside the published figures.

    python benchmarks/paper_tables.py -o paper \
        --model vggt=facebook/VGGT-1B@$HOME/vggt --model pi3=yyfz233/Pi3@$HOME/Pi3 \
        --calibration co3d:/data/co3d,split=train --cameras co3d:/data/co3d,split=test \
        --clouds dtu:/data/dtu/Rectified,scans=test --dtu /data/dtu/SampleSet

For each model: calibrates on 40 scenes of 20 views, verifies the profile, and sweeps the 16 rows of the paper with
uniform and HeSS budgets at matched measured sparsity, on the camera scenes (AUC@30, ATE) and on the cloud scenes
(Chamfer, by DTU's protocol with --dtu). Every step is a `hess-patch` command, printed before it runs and resumable:
after a kill the same command goes on where it was. tables.md and a report for each sweep are written into the output
folder as results come. The paper does not say how many scenes and views its tables rest on, so sizes are options here,
and what was used is written above each table.

Without weights or data, `--model demo --calibration rooms:calibration --cameras rooms:test --clouds rooms:test
--block 8` goes through all of it with the demo model.
"""

from __future__ import annotations

import argparse
import csv
import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hess_plugin.evaluation.statistics import Summary, summarise
from hess_plugin.evaluation.sweep_folder import CELLS, SweepFolder
from hess_plugin.files import write_bytes
from hess_plugin.machine import describe_machine

PUBLISHED = Path(__file__).parent / "published" / "hess.csv"
METRICS = {"cameras": ("auc30", "ate"), "clouds": ("chamfer",)}
HEADINGS = {"auc30": "AUC@30", "ate": "ATE", "chamfer": "Chamfer"}


@dataclass(frozen=True)
class Model:
    """A model as `hess-patch` takes it: NAME, NAME=WEIGHTS or NAME=WEIGHTS@REPO."""

    name: str
    weights: str | None
    repo: str | None

    @classmethod
    def parse(cls, text: str) -> Model:
        """Read what was given on the command line."""
        name, _, rest = text.partition("=")
        weights, _, repo = rest.partition("@")
        return cls(name, weights or None, repo or None)

    @property
    def options(self) -> list[str]:
        """The options of `hess-patch`."""
        named = (("--model", self.name), ("--weights", self.weights), ("--repo", self.repo))
        return [part for option, value in named if value is not None for part in (option, value)]


def main() -> None:
    """Run everything that is asked for."""
    args = _parser().parse_args()
    models = [Model.parse(text) for text in args.model]
    for model in models:
        profile = args.output / f"{model.name}.hess"
        scenes = _specs(args.calibration, args.calibration_scenes, args.calibration_views)
        if not profile.exists():
            _run("calibrate", *model.options, *scenes, "-o", str(profile))
        for kind in METRICS:
            specs = getattr(args, kind)
            if specs:
                _sweep(model, kind, specs, profile, args)
            write_bytes(args.output / "tables.md", tables(models, args.output).encode())
    print(f"\nwrote {args.output / 'tables.md'}", flush=True)


def _sweep(model: Model, kind: str, specs: Sequence[str], profile: Path, args: argparse.Namespace) -> None:
    """Sweep one kind of scenes and make its report; on the first kind the profile is verified, too."""
    folder = args.output / f"{model.name}-{kind}"
    scenes = _specs(specs, getattr(args, f"{kind}_scenes"), getattr(args, f"{kind}_views"))
    blocks = [] if args.block is None else ["--block-q", str(args.block), "--block-k", str(args.block)]
    protocol = ["--dtu", args.dtu] if kind == "clouds" and args.dtu else []
    arms = [part for arm in ("uniform", "hess") for part in ("--arm", arm)]
    common = [*model.options, "--profile", str(profile), *scenes, *blocks]
    _run("sweep", *common, *protocol, "--max-points", str(args.max_points), "--paper", *arms, "-o", str(folder))
    _run("report", str(folder), "-o", str(folder / "report.html"))
    if kind == "cameras":
        _run("verify", *common)


def _specs(specs: Sequence[str], scenes: int, views: int) -> list[str]:
    return [*(part for spec in specs for part in ("--data", spec)), "--scenes", str(scenes), "--views", str(views)]


def _run(*arguments: str) -> None:
    """Run one `hess-patch` command; stop with its exit code if it fails."""
    print(f"\n$ {shlex.join(['hess-patch', *arguments])}", flush=True)
    code = subprocess.run([sys.executable, "-m", "hess_plugin.cli", *arguments], check=False).returncode
    if code:
        sys.exit(code)


def tables(models: Sequence[Model], output: Path) -> str:
    """Every table that has results, as Markdown.

    Args:
        models: the models asked for.
        output: folder of their sweeps.
    """
    parts = ["# Tables S1 and S2 of HeSS, measured here and as published", "", f"{describe_machine()}.", ""]
    for model in models:
        for kind in METRICS:
            folder = output / f"{model.name}-{kind}"
            if (folder / CELLS).exists():
                parts += [*_table(model, kind, SweepFolder.load(folder)), ""]
    return "\n".join(parts)


def _table(model: Model, kind: str, folder: SweepFolder) -> list[str]:
    """One table: ours, and beside it what was published for the model."""
    plan, metrics, published = folder.plan, METRICS[kind], _published(model.name)
    found = {(s.row, s.arm): s for s in summarise([m for cell in folder.cells() for m in cell.measurements])}
    dense = found["0", "dense"]
    headings = ["rho", "tau", "sparsity"]
    headings += [f"{HEADINGS[m]} {arm}" for m in metrics for arm in ("uniform", "hess", "hess - uniform")]
    if published:
        headings.append("published sparsity")
        headings += [f"published {HEADINGS[m]} {arm}" for m in metrics for arm in ("uniform", "hess")]
    rows = [["dense", "", "0", *(cell for m in metrics for cell in (_cell(dense, m), "", ""))]]
    for row in plan["rows"]:
        rho, tau = row["sparse_ratio"], row["cdf_threshold"]
        uniform, hess = (found.get((f"rho {rho:g} tau {tau:g}", arm)) for arm in ("uniform", "hess"))
        if uniform is None or hess is None:  # the sweep is not there yet
            continue
        cells = [f"{rho:g}", f"{tau:g}", f"{uniform.value.mean['sparsity']:.3f}"]
        cells += [cell for m in metrics for cell in (_cell(uniform, m), _cell(hess, m), _difference(hess, m))]
        if (rho, tau) in published:
            record = published[rho, tau]
            cells += [record["sparsity"], *(record[f"{m}_{arm}"] for m in metrics for arm in ("uniform", "hess"))]
        rows.append(cells)
    unit = "mm, DTU's protocol" if plan["dtu"] else "units of the mean distance of true points to the first camera"
    return [
        f"## {model.name}, {kind}",
        "",
        f"{plan['weights']}; {len(plan['scenes'])} scenes of {plan['data']}, views {plan['views']}; AUC 0 to 1; "
        f"lengths in {unit}; mean ± standard error; aligned by {dense.alignment}. Command: `{folder.about['command']}`",
        "",
        *_markdown(headings, rows),
    ]


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; short rows are filled up."""
    full = [headings, ["---"] * len(headings), *([*row, *[""] * (len(headings) - len(row))] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in full]


def _cell(summary: Summary, metric: str) -> str:
    value, error = summary.value.mean[metric], summary.value.error[metric]
    return "-" if math.isnan(value) else f"{value:.4f} ± {error:.4f}"


def _difference(summary: Summary, metric: str) -> str:
    against = summary.against["uniform"]
    value, error = against.mean[metric], against.error[metric]
    return "-" if math.isnan(value) else f"{value:+.4f} ± {error:.4f}"


def _published(model: str) -> dict[tuple[float, float], dict[str, str]]:
    """The published rows of one model by rho and tau; none for a model that the paper does not have."""
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == model]
    return {(float(row["sparse_ratio"]), float(row["cdf_threshold"])): row for row in rows}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="NAME[=WEIGHTS[@REPO]]")
    parser.add_argument("--calibration", action="append", required=True, metavar="FORMAT:PATH")
    parser.add_argument("--cameras", action="append", default=[], metavar="FORMAT:PATH", help="AUC@30 and ATE")
    parser.add_argument("--clouds", action="append", default=[], metavar="FORMAT:PATH", help="Chamfer")
    parser.add_argument("--dtu", metavar="FOLDER", help="Points/stl/ and ObsMask/, for DTU's protocol on the clouds")
    for name, scenes, views in (("calibration", 40, 20), ("cameras", 40, 20), ("clouds", 22, 49)):
        parser.add_argument(f"--{name}-scenes", type=int, default=scenes, metavar="N", help=f"{scenes} by default")
        parser.add_argument(f"--{name}-views", type=int, default=views, metavar="N", help=f"{views} by default")
    parser.add_argument("--block", type=int, help="patch tokens in a block; hess-patch's own sizes by default")
    parser.add_argument("--max-points", type=int, default=200_000, help="of a cloud outside of DTU's protocol")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for everything")
    return parser


if __name__ == "__main__":
    main()
