"""`hess-patch demo`."""

from __future__ import annotations

from pathlib import Path

import click

from hess_plugin.files import check_writable
from hess_plugin.terminal import progress_bars

from .options import COUNT, FOLDER, PRESETS


@click.command(short_help="Calibrate, patch and measure a small shipped model.")
@click.option("-o", "--output", default="hess-demo", show_default=True, type=FOLDER, help="Directory to write.")
@click.option(
    "--calibration-scenes", type=COUNT, default=32, show_default=True, help="Synthetic rooms to calibrate on."
)
@click.option(
    "--test-scenes", type=click.IntRange(min=2), default=40, show_default=True, help="Other rooms to measure on."
)
@click.option("--views", type=click.IntRange(3, 256), default=16, show_default=True, help="Images of each room.")
@click.option(
    "--preset",
    type=click.Choice(PRESETS),
    default=PRESETS[0],
    show_default=True,
    help="Also measure this one, beside the method as published; takes twice the time.",
)
def demo(output: Path, calibration_scenes: int, test_scenes: int, views: int, preset: str) -> None:
    """Calibrate, patch and measure the small shipped model on synthetic rooms; a few minutes on two cores."""
    check_writable(output / "demo.hess")
    from hess_plugin.demo.run import DemoSettings, run_demo
    from hess_plugin.evaluation.tables import comparison_table

    settings = DemoSettings(calibration_scenes, test_scenes, views, preset=preset)
    with progress_bars() as note:
        result = run_demo(output, settings, note)
    click.echo(comparison_table(result.summaries))
    click.echo(f"\n{result.protocol}\n")
    for path in result.files:
        click.echo(f"wrote {path}")
