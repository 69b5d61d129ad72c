"""`hess-patch sweep`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hess_plugin.terminal import progress_bars, warn_random

from .measures import metric_facts, metric_options, metrics_of
from .options import (
    COUNT,
    FILE,
    FOLDER,
    adapter_of,
    data_facts,
    data_options,
    framing_of,
    model_and_scenes,
    model_options,
    selection_of,
    selection_options,
)

if TYPE_CHECKING:
    from hess_plugin.evaluation.arms import Arm, Row
    from hess_plugin.evaluation.comparison import Pruner
    from hess_plugin.evaluation.metrics import MetricSettings
    from hess_plugin.evaluation.sweep import Cell
    from hess_plugin.profiles import Profile
    from hess_plugin.settings import Settings

_SPARSITIES = (0.35, 0.55, 0.73, 0.85)
_ARMS = ("uniform", "equal", "hess", "reverse", "uncapped", "random")


class _Rule(click.ParamType[Any]):
    name = "RHO,TAU"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        """Read two numbers."""
        if isinstance(value, tuple):
            return value
        try:
            rho, tau = (float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} was given, wanted rho and tau of SparseVGGT like 0.8,0.4.", param, ctx)
        return rho, tau


@click.command(short_help="Compare ways to divide budgets over many sparsities.")
@model_options
@data_options
@click.option("--profile", type=FILE, required=True, help="Profile whose budgets are compared.")
@click.option("--any-weights", is_flag=True, help="Accept a profile that was calibrated on other weights.")
@click.option("-o", "--output", type=FOLDER, required=True, help="Folder of the sweep; the same command goes on there.")
@click.option(
    "--sparsity",
    type=float,
    multiple=True,
    help="Dropped share of patch-block pairs; several allowed; 0.35, 0.55, 0.73 and 0.85 by default.",
)
@click.option("--rule", type=_Rule(), multiple=True, help="Sparse ratio and CDF threshold; several allowed.")
@click.option("--paper", is_flag=True, help="The 16 rules of the paper's tables S1 and S2.")
@click.option(
    "--arm",
    "arms",
    multiple=True,
    type=click.Choice([*_ARMS, "harm", "michel", "kwon", "kwon-tuned"]),
    help=f"Several allowed; {', '.join(_ARMS)} by default, and harm if the profile has its curves. michel and kwon "
    "prune heads and need --calibration-data.",
)
@click.option("--camera-weight", type=click.FloatRange(0, 1), multiple=True, help="Adds hess with this lambda.")
@click.option(
    "--projection", type=click.Choice(["q", "k", "v", "output"]), multiple=True, help="Adds hess by these traces."
)
@click.option(
    "--normalisation",
    type=click.Choice(["sum", "scene", "raw", "linear", "softmax", "log"]),
    multiple=True,
    help="Adds hess with errors made comparable this way.",
)
@click.option("--ablations", is_flag=True, help="Adds all of these, and hess by the gradient through patch rows.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.005,
    show_default=True,
    help="Measured sparsity of all arms of a row is matched to within this.",
)
@click.option("--calibration-data", multiple=True, metavar="FORMAT:PATH", help="Scenes for michel and kwon.")
@click.option("--block-q", type=COUNT, default=128, show_default=True, help="Patch queries in a block.")
@click.option("--block-k", type=COUNT, default=64, show_default=True, help="Patch keys in a block.")
@selection_options
@metric_options
def sweep(model: str, weights: str | None, profile: Path, output: Path, **options: Any) -> None:
    """Compare ways to divide budgets over many sparsities, at matched measured sparsity.

    Every cell has a standard error over scenes and a difference to uniform budgets, paired by scene. What is measured
    is kept; after a kill the same command goes on. `hess-patch report FOLDER` makes a page of it.
    """
    from hess_plugin.block_choice import choice_facts, choice_text
    from hess_plugin.evaluation.comparison import Runner
    from hess_plugin.evaluation.protocol import describe_cameras, describe_clouds
    from hess_plugin.evaluation.statistics import failed_lines, summarise
    from hess_plugin.evaluation.sweep import Sweep
    from hess_plugin.evaluation.tables import comparison_table
    from hess_plugin.profiles import Profile

    score = Profile.load(profile)
    amounts, arms, metrics = _rows(options), _arms(options, score), metrics_of(options)
    blocks = {**{name: options[name] for name in ("block_q", "block_k")}, **selection_of(options)}
    chosen = _check_rows(amounts, arms, options["tolerance"], score, blocks)
    loaded, found, manager = model_and_scenes(model, weights, options)
    plan = _plan(loaded, score, amounts, arms, options) | {"model": model, "weights": weights or "shipped"}
    plan |= {**{name: options[name] for name in ("block_q", "block_k")}, **choice_facts(chosen)}
    plan |= {"adapter": adapter_of(loaded, options, manager).name, "scenes": found.names}
    _check_scene(found[0], metrics)
    folder = _start(output, plan, score)
    with progress_bars() as note:
        pruner = _pruner(loaded, arms, options, score, manager, output, note)
        runner = Runner(
            loaded,
            profile=score,
            metrics=metrics,
            pruner=pruner,
            adapter=options["adapter"],
            manager=manager,
            options={**blocks, "strict": not options["any_weights"]},
        )
        running = Sweep(
            runner, found, folder.journal(), options["tolerance"], lambda done, of, what: note("sweep", done, of, what)
        )
        cells = running.run(amounts, arms, folder.write_cells)
        _picture(runner, found, cells, metrics, output)
    rows = [m for cell in cells for m in cell.measurements]
    click.echo("\n".join([comparison_table(summarise(rows)), *failed_lines(rows)]))
    click.echo(f"\n{describe_cameras(metrics)}\n{describe_clouds(metrics)}\nAll arms: {choice_text(chosen)}.")
    _tell_unmatched(cells, options["tolerance"])
    click.echo(f"\nwrote {output}; hess-patch report {output} makes a page of it")
    if weights == "random":
        warn_random()


def _rows(options: dict[str, Any]) -> list[Row]:
    from hess_plugin.evaluation.arms import PAPER_ROWS, Row

    rows = [Row(sparsity) for sparsity in options["sparsity"]]
    rows += [Row(sparse_ratio=rho, cdf_threshold=tau) for rho, tau in options["rule"]]
    rows += PAPER_ROWS if options["paper"] else ()
    return list(dict.fromkeys(rows)) or [Row(sparsity) for sparsity in _SPARSITIES]


def _arms(options: dict[str, Any], profile: Profile) -> list[Arm]:
    from hess_plugin.evaluation.ablations import ablations, all_ablations, named_arms
    from hess_plugin.harm_curves import has_curves, model_curves

    # The others are matched to uniform: it is there whether asked for or not.
    arms = named_arms(("uniform", *(options["arms"] or (*_ARMS, *(["harm"] if has_curves(profile) else [])))))
    if any(arm.allocation == "harm" for arm in arms):
        model_curves(profile)  # what is not there is told before a large model is read
    arms += ablations(
        profile,
        camera_weights=options["camera_weight"],
        projections=options["projection"],
        normalisations=options["normalisation"],
    )
    arms += all_ablations(profile) if options["ablations"] else []
    if any(arm.pruning for arm in arms) and not options["calibration_data"]:
        raise click.UsageError("arms that prune heads need scenes for their gradients; add --calibration-data.")
    return list({arm.name: arm for arm in arms}.values())


def _check_rows(
    rows: Sequence[Row], arms: Sequence[Arm], tolerance: float, profile: Profile, blocks: dict[str, Any]
) -> Settings:
    """Refuse an amount or blocks out of range before a large model is read; the settings that all arms share."""
    from hess_plugin.settings import make_settings

    if tolerance != tolerance:  # click's range lets NaN through, which nothing would ever match
        raise click.UsageError("--tolerance nan was given, wanted a difference of sparsities like 0.005.")
    for row in rows:
        if row.sparsity == 0.0:
            raise click.UsageError("sparsity 0 is the dense model, which is always measured; leave it out.")
        made = make_settings(profile=profile, **asdict(row), allocation=arms[0].allocation, **blocks)
    return made


def _check_scene(scene: Any, metrics: MetricSettings) -> None:
    """Refuse scenes that cannot be measured before a folder is made for them; the first stands for all."""
    from hess_plugin.evaluation.comparison import check_scene
    from hess_plugin.evaluation.dtu import scan_number

    check_scene(scene)
    if metrics.dtu is not None:
        scan_number(scene.name)


def _plan(
    model: Any, profile: Profile, rows: Sequence[Row], arms: Sequence[Arm], options: dict[str, Any]
) -> dict[str, Any]:
    """Everything that the figures depend on but the model's name and the scenes."""
    import torch

    from hess_plugin import __version__
    from hess_plugin.machine import machine_key
    from hess_plugin.profiles import model_digest
    from hess_plugin.scoring import Scoring
    from hess_plugin.verified_profiles import harm_digest, traces_digest

    return {
        "computed_on": machine_key(next(model.parameters()).device),
        "versions": f"hess-plugin {__version__}, torch {torch.__version__}",
        "model_digest": model_digest(model),
        "profile": traces_digest(profile),
        **({"harm_curves": harm_digest(profile)} if profile.has_harm else {}),
        "scoring": asdict(Scoring().resolved(profile)),
        "rows": [asdict(row) for row in rows],
        # Without what earlier versions, whose sweeps go on, did not know.
        "arms": [{name: value for name, value in asdict(arm).items() if name != "preset" or value} for arm in arms],
        "tolerance": options["tolerance"],
        "calibration_data": " ".join(options["calibration_data"]),
        **data_facts(options),
        # "alignment" is what was done; this is what was asked for.
        **{("alignment_asked" if key == "alignment" else key): value for key, value in metric_facts(options).items()},
    }


def _start(output: Path, plan: dict[str, Any], profile: Profile) -> Any:
    """Begin or go on in the folder, with a copy of the profile beside."""
    from datetime import date

    from hess_plugin import __version__
    from hess_plugin.evaluation.sweep_folder import SweepFolder
    from hess_plugin.machine import describe_machine

    about = {
        "command": shlex.join(["hess-patch", *sys.argv[1:]]),
        "machine": describe_machine(),
        "hess_plugin": __version__,
        "date": date.today().isoformat(),
    }
    folder = SweepFolder.start(output, plan, about)
    profile.save(output / "profile.hess")
    return folder


def _pruner(
    model: Any, arms: Sequence[Arm], options: dict[str, Any], profile: Profile, manager: Any, output: Path, note: Any
) -> Pruner | None:
    """What prunes heads for the arms that do, if any; its gradients are kept beside the sweep."""
    if not any(arm.pruning for arm in arms):
        return None
    from hess_plugin.evaluation.head_pruner import HeadPruner
    from hess_plugin.scenes.reading import read_scenes

    scenes = read_scenes(options["calibration_data"], views=options["views"], seed=options["seed"])
    return HeadPruner(
        model,
        scenes.framed(framing_of(model, options, manager)),
        output / "gates.safetensors",
        profile.camera_weight,
        note=note,
        adapter=options["adapter"],
        manager=manager,
    )


def _picture(runner: Any, scenes: Any, cells: Sequence[Cell], metrics: MetricSettings, output: Path) -> None:
    """Keep the clouds of the first scene at the sparsest row, for the report."""
    from hess_plugin.evaluation.cloud_picture import capture_clouds
    from hess_plugin.exceptions import CalibrationError

    file = output / "clouds.safetensors"
    if file.exists():
        return
    last = max((cell for cell in cells if cell.arm.name == "uniform"), key=lambda cell: cell.sparsity).row
    arms = [c.arm for c in cells if c.arm.dense or (c.row == last and c.arm.name in ("uniform", "hess"))]
    try:
        clouds = capture_clouds(runner, runner.prepared(scenes[0]), arms, metrics)
    except CalibrationError as error:
        click.echo(f"No clouds of {scenes.names[0]} were kept for a picture: {error}", err=True)
        return
    if clouds is not None:
        clouds.save(file)


def _tell_unmatched(cells: Sequence[Cell], tolerance: float) -> None:
    off = [f"{cell.arm.name} at {cell.row.label} ({cell.gap:+.3f})" for cell in cells if not cell.matched]
    if off:
        click.echo(
            f"\nNot matched to within {tolerance:g} of the uniform arm's measured sparsity: {', '.join(off)}.", err=True
        )
