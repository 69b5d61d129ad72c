"""`hess-patch calibrate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hess_plugin.files import check_writable
from hess_plugin.terminal import first_rank, one_voice, progress_bars, waiting, warn_random

from .options import (
    BLOCK_ORDERS,
    COUNT,
    OUTPUT,
    PRESETS,
    SELECTORS,
    autocast_of,
    autocast_option,
    data_facts,
    data_options,
    model_and_scenes,
    model_options,
)

if TYPE_CHECKING:
    from hess_plugin.calibration.harm import HarmSettings
    from hess_plugin.calibration.ranks import Ranks
    from hess_plugin.profiles import Profile

_HARM = ("block_q", "block_k", "pool_q", "pool_k", "block_order", "selector")
_WITHOUT_TRUTH = (
    "ground-truth-free: errors were measured against the model's own predictions, displaced at random; no true camera "
    "or point was used, so nothing here tells how accurate the model is on these images"
)


@click.command(short_help="Measure every head's sensitivity; write a profile.")
@model_options
@data_options
@click.option("-o", "--output", type=OUTPUT, help="Profile to write.")
@click.option("--camera-weight", type=click.FloatRange(0, 1), help="Lambda of the score; the family's by default.")
@click.option(
    "--eps",
    type=click.FloatRange(min=0, min_open=True),
    default=0.05,
    show_default=True,
    help="Inlier distance of the point error; the mean distance of true points to the first camera is 1.",
)
@autocast_option
@click.option(
    "--memory",
    type=click.Choice(["lean", "plain"]),
    default="lean",
    show_default=True,
    help="lean recomputes blocks and runs heads frame by frame, plain keeps the whole graph; the traces agree.",
)
@click.option(
    "--target",
    type=click.Choice(["auto", "truth", "self"]),
    default="auto",
    show_default=True,
    help="What errors are measured against: the scenes' ground truth or, where all there is are images, the model's "
    "own prediction.",
)
@click.option(
    "--preset",
    type=click.Choice(PRESETS),
    help="What the profile is for: every patch with it chooses blocks by this preset if it names no other; balanced "
    "and accurate measure harm as well.",
)
@click.option(
    "--harm/--no-harm",
    default=None,
    help="Also measure what leaving out blocks does, by one more forward a scene: what budgets over all layers "
    "(--allocation harm) are made of. Off by default, but for those presets.",
)
@click.option("--block-q", type=COUNT, help="Patch queries in a block of --harm; 128 by default.")
@click.option("--block-k", type=COUNT, help="Patch keys in a block of --harm; 64 by default.")
@click.option("--pool-q", type=COUNT, help="Patch queries pooled together to choose them; a whole block by default.")
@click.option("--pool-k", type=COUNT, help="Patch keys pooled together likewise.")
@click.option(
    "--selector",
    type=click.Choice(SELECTORS),
    help="Rule that chooses the blocks of --harm; the preset's by default, mass without.",
)
@click.option(
    "--block-order",
    type=click.Choice(BLOCK_ORDERS),
    help="Order in which the patches of a frame fill them; the preset's by default, raster without.",
)
@click.option("--dry-run", is_flag=True, help="Print what it would take, in memory and time, and stop.")
def calibrate(output: Path | None, dry_run: bool, model: str, weights: str | None, **options: Any) -> None:
    """Measure every head's sensitivity on scenes, or on images without ground truth, and write a profile.

    A killed calibration goes on where it stopped: run the same command again.

    Several GPUs, or machines, share the scenes if torchrun starts the command, and write the same profile:

    \b
      torchrun --nproc-per-node 8 --no-python hess-patch calibrate --model ...
    """  # noqa: D301 (click wants the character)
    try:
        with one_voice() as ranks:
            _calibrate(ranks, output, dry_run, model, weights, options)
    except KeyboardInterrupt as interrupt:
        if first_rank():
            partial = Path(f"{output}.partial")
            kept = f"{partial} holds the finished scenes" if partial.exists() else "no scene was finished"
            click.echo(f"\n{str(interrupt) or 'Interrupted'}; {kept}; run the same command again to go on.", err=True)
        sys.exit(130)


def _calibrate(
    ranks: Ranks, output: Path | None, dry_run: bool, model: str, weights: str | None, options: dict[str, Any]
) -> None:
    _check_arguments(ranks, output, dry_run, options)
    import hess_plugin

    loaded, found, manager = model_and_scenes(model, weights, options)
    how: dict[str, Any] = {name: options[name] for name in ("eps", "memory", "target")}
    how["harm"] = _harm(options)
    how["autocast"] = autocast_of(options["autocast"], loaded)
    if dry_run:
        _rehearse(ranks, loaded, found, how, options["adapter"], manager)
        return
    with progress_bars(shown=ranks.rank == 0) as note:
        profile = hess_plugin.calibrate(
            loaded,
            found,
            output=output,
            camera_weight=options["camera_weight"],
            **{**how, "harm": how["harm"] or False},  # what the preset has measured was settled above
            preset=options["preset"],
            metadata={"model": model, "weights": weights or "shipped", **data_facts(options)},
            progress=lambda done, total, scene: note("calibrate", done, total, scene),
            adapter=options["adapter"],
            manager=manager,
            ranks=ranks,
        )
    if ranks.rank == 0:
        _tell(profile, output, weights)


def _check_arguments(ranks: Ranks, output: Path | None, dry_run: bool, options: dict[str, Any]) -> None:
    """Refuse what cannot be done before a large model is read."""
    given = [name for name in _HARM if options[name] is not None]
    if given and _harm(options) is None:
        raise click.UsageError(f"--{given[0].replace('_', '-')} says how harm is measured; add --harm.")
    _harm(options)  # a wrong value is told before a large model is read
    if output is None and not dry_run:
        raise click.UsageError(
            "Missing option '-o' / '--output': name the profile to write, or ask with --dry-run what it takes."
        )
    from hess_plugin.scenes.reading import with_and_without_truth

    if options["target"] == "auto" and with_and_without_truth(options["data"]):
        raise click.UsageError(
            "--data names scenes with ground truth and images without, whose traces cannot be averaged; give one kind, "
            "or --target self for all."
        )
    if output is not None and ranks.rank == 0:
        check_writable(output)


def _harm(options: dict[str, Any]) -> HarmSettings | None:
    """How harm is to be measured, if it is."""
    from hess_plugin.calibration.harm import HarmSettings

    given = {name: options[name] for name in _HARM if options[name] is not None}
    by_preset = None
    if options["preset"] is not None and options["harm"] is not False:
        by_preset = HarmSettings.of_preset(options["preset"], **given)
    return HarmSettings(**given) if options["harm"] and by_preset is None else by_preset


def _rehearse(ranks: Ranks, model: Any, scenes: Any, how: dict[str, Any], adapter: str | None, manager: Any) -> None:
    """Print what a calibration would take, once for all ranks."""
    from hess_plugin.calibration.measuring import Protocol
    from hess_plugin.calibration.rehearsal import rehearse

    if ranks.rank == 0:
        with waiting("estimating"):
            text = rehearse(model, scenes, Protocol(**how), adapter, manager, processes=ranks.size)
        click.echo(text)


def _tell(profile: Profile, output: Path | None, weights: str | None) -> None:
    from hess_plugin.evaluation.tables import profile_summary

    click.echo(profile_summary(profile))
    if profile.metadata["target"] == "self":
        click.echo(_WITHOUT_TRUTH)
    click.echo(f"wrote {output}")
    if weights == "random":
        warn_random()
