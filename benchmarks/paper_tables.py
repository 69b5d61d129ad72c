"""Makes the paper's tables S1 and S2 with real weights and data, unattended, beside the published figures.

    python benchmarks/paper_tables.py -o paper \
        --model vggt=facebook/VGGT-1B@$HOME/vggt --model pi3=yyfz233/Pi3@$HOME/Pi3 \
        --calibration co3d:/data/co3d,split=train --cameras co3d:/data/co3d,split=test \
        --clouds "dtu:/data/dtu/test,scans=test,truth=/data/dtu/SampleSet/MVS Data" --dtu "/data/dtu/SampleSet/MVS Data"

For each model: calibrates on 40 scenes of 20 views, verifies the profile on the camera scenes, and sweeps the 16 rows
of the paper with uniform and HeSS budgets at matched measured sparsity, on the camera scenes (AUC@30, ATE) and on the
cloud scenes (Chamfer, by DTU's protocol with --dtu). Every step is a `hess-patch` command, printed before it runs;
after a kill the same command goes on where it was, what is measured is not measured again. tables.md and a report for
each sweep are written into the output folder as results come. The paper does not say how many scenes and views its
tables rest on, so sizes are options here, and what was used is written above each table. What else `hess-patch` should
be told is given as it would be to it: --options="--resolution 336 --device cuda:1" to every command,
--calibrate-options="--autocast none" and --sweep-options="--alignment icp" to one. (ICP needs the reference points as
part of the scenes, hence truth= above.) A dash in a table stands for what no scene could be measured in: by DTU's
protocol, a cloud of which nothing lies within 20 mm of the reference has no distance at all.

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

from hess_plugin.evaluation.statistics import Statistic, Summary, summarise
from hess_plugin.evaluation.sweep_folder import CELLS, SweepFolder
from hess_plugin.files import write_bytes
from hess_plugin.machine import describe_machine
from hess_plugin.profiles import Profile

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
    parser = _parser()
    args = parser.parse_args()
    if not (args.cameras or args.clouds):
        parser.error("no scenes to measure on; give --cameras, --clouds or both")
    models = [Model.parse(text) for text in args.model]
    for model in models:
        profile = args.output / f"{model.name}.hess"
        common = [*model.options, *shlex.split(args.options)]
        _prepare(common, profile, args)
        for kind in METRICS:
            if getattr(args, kind):
                _sweep(f"{model.name}-{kind}", kind, [*common, "--profile", str(profile)], args)
                write_bytes(args.output / "tables.md", tables(models, args.output).encode())
    print(f"\nwrote {args.output / 'tables.md'}", flush=True)


def _prepare(common: Sequence[str], profile: Path, args: argparse.Namespace) -> None:
    """Calibrate and verify, as far as that is not done yet: before the sweeps, which take much longer."""
    if not profile.exists():
        scenes = _specs(args.calibration, args.calibration_scenes, args.calibration_views)
        _run("calibrate", *common, *scenes, *shlex.split(args.calibrate_options), "-o", str(profile))
    if not Profile.load(profile).metadata.get("verdicts"):
        kind = "cameras" if args.cameras else "clouds"
        _run("verify", *common, "--profile", str(profile), *_scenes(kind, args), *_blocks(args))


def _sweep(name: str, kind: str, common: Sequence[str], args: argparse.Namespace) -> None:
    """Sweep one kind of scenes and make its report."""
    folder = args.output / name
    protocol = ["--dtu", args.dtu] if kind == "clouds" and args.dtu else []
    arms = [part for arm in ("uniform", "hess") for part in ("--arm", arm)]
    how = [*_blocks(args), *protocol, "--max-points", str(args.max_points), *shlex.split(args.sweep_options)]
    _run("sweep", *common, *_scenes(kind, args), *how, "--paper", *arms, "-o", str(folder))
    _run("report", str(folder), "-o", str(folder / "report.html"))


def _scenes(kind: str, args: argparse.Namespace) -> list[str]:
    return _specs(getattr(args, kind), getattr(args, f"{kind}_scenes"), getattr(args, f"{kind}_views"))


def _blocks(args: argparse.Namespace) -> list[str]:
    return [] if args.block is None else ["--block-q", str(args.block), "--block-k", str(args.block)]


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
    headings = ["rho", "tau", "sparsity uniform", "sparsity hess"]
    headings += [f"{HEADINGS[m]} {arm}" for m in metrics for arm in ("uniform", "hess", "hess - uniform")]
    if published:
        headings.append("published sparsity")
        headings += [f"published {HEADINGS[m]} {arm}" for m in metrics for arm in ("uniform", "hess")]
    rows = [["dense", "", "0", "", *(cell for m in metrics for cell in (_cell(dense, m), "", ""))]]
    for row in plan["rows"]:
        rho, tau = row["sparse_ratio"], row["cdf_threshold"]
        uniform, hess = (found.get((f"rho {rho:g} tau {tau:g}", arm)) for arm in ("uniform", "hess"))
        if uniform is None or hess is None:  # the sweep is not there yet
            continue
        cells = [f"{rho:g}", f"{tau:g}", *(f"{summary.value.mean['sparsity']:.3f}" for summary in (uniform, hess))]
        cells += [cell for m in metrics for cell in (_cell(uniform, m), _cell(hess, m), _difference(hess, m))]
        if (rho, tau) in published:
            record = published[rho, tau]
            cells += [record["sparsity"], *(record[f"{m}_{arm}"] for m in metrics for arm in ("uniform", "hess"))]
        rows.append(cells)
    is_random = plan["weights"] == "random"
    unit = "mm, DTU's protocol" if plan["dtu"] else "units of the mean distance of true points to the first camera"
    return [
        f"## {model.name}, {kind}",
        "",
        f"{plan['weights']}; {len(plan['scenes'])} scenes of {plan['data']}, views {plan['views']}; AUC 0 to 1; "
        f"lengths in {unit}; mean ± standard error; aligned by {dense.alignment}. Command: `{folder.about['command']}`",
        "",
        *(["**Random weights: figures made with them mean nothing about the real model.**", ""] if is_random else []),
        *_markdown(headings, rows),
    ]


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; short rows are filled up."""
    full = [headings, ["---"] * len(headings), *([*row, *[""] * (len(headings) - len(row))] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in full]


def _cell(summary: Summary, metric: str) -> str:
    return _told(summary.value, metric, summary.scenes, ".4f")


def _difference(summary: Summary, metric: str) -> str:
    return _told(summary.against["uniform"], metric, summary.scenes, "+.4f")


def _told(statistic: Statistic, metric: str, scenes: int, style: str) -> str:
    """Mean and standard error; and on how many scenes, where some could not be measured."""
    mean, error, count = statistic.mean[metric], statistic.error[metric], statistic.count[metric]
    if not count:
        return "-"
    text = f"{mean:{style}}" if math.isnan(error) else f"{mean:{style}} ± {error:.4f}"
    return text if count == scenes else f"{text} ({count} of {scenes} scenes)"


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
    for name, of in (("options", "every command"), ("calibrate-options", "calibrate"), ("sweep-options", "sweep")):
        parser.add_argument(f"--{name}", default="", metavar="'--OPTION ...'", help=f"further options of {of}")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for everything")
    return parser


if __name__ == "__main__":
    main()
