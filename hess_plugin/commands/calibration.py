"""`hess-patch calibrate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from hess_plugin.files import check_writable
from hess_plugin.terminal import progress_bars, warn_random

from .options import DATA, OUTPUT, data_options, model_and_scenes, model_options


@click.command()
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
@click.option(
    "--autocast",
    type=click.Choice(["none", "bfloat16"]),
    default="none",
    show_default=True,
    help="Type of the forward.",
)
@click.option(
    "--memory",
    type=click.Choice(["lean", "plain"]),
    default="lean",
    show_default=True,
    help="lean recomputes blocks and runs heads frame by frame, plain keeps the whole graph; the traces agree.",
)
@click.option("--dry-run", is_flag=True, help="Print what it would take, in memory and time, and stop.")
def calibrate(output: Path | None, dry_run: bool, model: str, weights: str | None, **options: Any) -> None:
    """Measure every head's sensitivity on scenes with ground truth and write a profile.

    A killed calibration goes on where it stopped: run the same command again.
    """
    if output is None and not dry_run:
        raise click.UsageError(
            "Missing option '-o' / '--output': name the profile to write, or ask with --dry-run what it takes."
        )
    if output is not None:
        check_writable(output)
    import torch

    import hess_plugin
    from hess_plugin.calibration.measuring import Protocol
    from hess_plugin.calibration.rehearsal import rehearse
    from hess_plugin.evaluation.tables import profile_summary

    loaded, found, manager = model_and_scenes(model, weights, options)
    autocast = torch.bfloat16 if options["autocast"] == "bfloat16" else None
    if dry_run:
        protocol = Protocol(eps=options["eps"], autocast=autocast, memory=options["memory"])
        click.echo(rehearse(loaded, found, protocol, options["adapter"], manager))
        return
    try:
        with progress_bars() as note:
            profile = hess_plugin.calibrate(
                loaded,
                found,
                output=output,
                camera_weight=options["camera_weight"],
                eps=options["eps"],
                autocast=autocast,
                memory=options["memory"],
                metadata={
                    "model": model,
                    "weights": weights or "shipped",
                    **{name: options[name] for name in DATA},
                    "data": " ".join(options["data"]),
                },
                progress=lambda done, total, scene: note("calibrate", done, total, scene),
                adapter=options["adapter"],
                manager=manager,
            )
    except KeyboardInterrupt:
        partial = Path(f"{output}.partial")
        kept = f"{partial} holds the finished scenes" if partial.exists() else "no scene was finished"
        click.echo(f"\nInterrupted; {kept}; run the same command again to go on.", err=True)
        sys.exit(130)
    click.echo(profile_summary(profile))
    click.echo(f"wrote {output}")
    if weights == "random":
        warn_random()
