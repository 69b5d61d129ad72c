"""`hess-patch report`."""

from __future__ import annotations

from pathlib import Path

import click

from hess_plugin.files import check_writable

from .options import FOLDER, OUTPUT


@click.command(short_help="Make one self-contained page of a sweep.")
@click.argument("folder", type=FOLDER)
@click.option("-o", "--output", type=OUTPUT, help="HTML file to write; report.html in the folder by default.")
@click.option(
    "--threshold",
    type=click.FloatRange(0, min_open=True),
    help="Error above which points of the clouds are coloured, in the unit of the sweep's lengths.",
)
def report(folder: Path, output: Path | None, threshold: float | None) -> None:
    """Make one self-contained page of a sweep, finished or not: pictures, table, protocol and commands.

    FOLDER is what `hess-patch sweep` wrote. The pictures are written beside the page as well.
    """
    output = output or folder / "report.html"
    check_writable(output, ".html")
    from hess_plugin.evaluation.sweep_report import write_report

    for path in write_report(folder, output, threshold=threshold):
        click.echo(f"wrote {path}")
