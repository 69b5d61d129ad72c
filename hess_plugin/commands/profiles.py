"""`hess-patch show`: what a profile tells."""

from __future__ import annotations

from pathlib import Path

import click

from hess_plugin.files import check_writable
from hess_plugin.terminal import warn_random

from .options import COUNT, FILE, OUTPUT


@click.command()
@click.argument("profile", type=FILE)
@click.option("--png", type=OUTPUT, help="Heat map to write; PROFILE.png by default.")
@click.option("--camera-weight", type=click.FloatRange(0, 1), help="Lambda of the score; the profile's by default.")
@click.option("--heads", type=COUNT, default=8, show_default=True, help="Heads to list at each end.")
def show(profile: Path, png: Path | None, camera_weight: float | None, heads: int) -> None:
    """Print where a profile comes from and which heads are sensitive; draw its heat map."""
    from hess_plugin.evaluation.plots import head_sensitivity_map
    from hess_plugin.evaluation.tables import profile_summary
    from hess_plugin.profiles import Profile

    loaded = Profile.load(profile)
    target = png or profile.with_name(profile.name + ".png")
    check_writable(target, ".png")
    click.echo(profile_summary(loaded, camera_weight, heads))
    head_sensitivity_map(loaded, target, camera_weight)
    click.echo(f"wrote {target}")
    if loaded.metadata.get("weights") == "random":
        warn_random()
