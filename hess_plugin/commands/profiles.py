"""`hess-patch show` and `hess-patch compare`: what a profile tells, and whether two tell the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hess_plugin.files import check_writable
from hess_plugin.terminal import warn_random

from .options import COUNT, FILE, OUTPUT
from .scoring import score_options, scoring_of


@click.command(short_help="Print a profile: provenance, sensitive heads, heat map.")
@click.argument("profile", type=FILE)
@click.option("--png", type=OUTPUT, help="Heat map to write; PROFILE.png by default.")
@score_options
@click.option("--heads", type=COUNT, default=8, show_default=True, help="Heads to list at each end.")
@click.option(
    "--draws",
    type=click.IntRange(100, 10_000),
    default=1000,
    show_default=True,
    help="Resamples of the scenes behind the intervals and the verdict.",
)
@click.option(
    "-o", "--output", type=OUTPUT, help="Profile to write: this one with the given --camera-weight as its own."
)
def show(profile: Path, png: Path | None, heads: int, draws: int, output: Path | None, **options: Any) -> None:
    """Print where a profile comes from, which heads are sensitive and how sure that is; draw its heat map."""
    if output is not None and options["camera_weight"] is None:
        raise click.UsageError("--output writes the profile with another camera weight; give --camera-weight.")
    from hess_plugin.evaluation.plots import head_sensitivity_map
    from hess_plugin.evaluation.tables import profile_summary
    from hess_plugin.profiles import Profile

    loaded, scoring = Profile.load(profile), scoring_of(options)
    target = png or profile.with_name(profile.name + ".png")
    check_writable(target, ".png")
    if output is not None:
        check_writable(output)
        weighed = loaded.with_camera_weight(options["camera_weight"])
        weighed.scores()  # what could not be used is not written
    click.echo(profile_summary(loaded, scoring, heads, draws))
    head_sensitivity_map(loaded, target, scoring)
    click.echo(f"wrote {target}")
    if output is not None:
        weighed.save(output)
        click.echo(f"wrote {output}")
    if loaded.metadata.get("weights") == "random":
        warn_random()


@click.command(short_help="Compare two profiles: are budgets divided alike?")
@click.argument("first", type=FILE)
@click.argument("second", type=FILE)
@click.option("--png", type=OUTPUT, help="Heat maps of both and a scatter plot, to write.")
@score_options
def compare(first: Path, second: Path, png: Path | None, **options: Any) -> None:
    """Compare two profiles of the same model: would budgets be divided alike?

    For example profiles calibrated on two data sets, on two choices of scenes, or before and after fine-tuning.
    """
    if png is not None:
        check_writable(png, ".png")
    from hess_plugin.agreement import compare_profiles
    from hess_plugin.evaluation.plots import agreement_map
    from hess_plugin.evaluation.tables import agreement_table
    from hess_plugin.exceptions import ProfileError
    from hess_plugin.profiles import Profile
    from hess_plugin.scoring import head_scores

    scoring = scoring_of(options)
    profiles = Profile.load(first), Profile.load(second)
    for path, profile in zip((first, second), profiles, strict=True):
        try:
            head_scores(profile, scoring)
        except ProfileError as error:
            raise ProfileError(f"{path}: {error}") from error  # which of the two it is
    agreement = compare_profiles(*profiles, scoring)
    click.echo(f"A: {first}\nB: {second}\nscore: {scoring}")
    click.echo(agreement_table(agreement, ("A", "B")))
    if png is not None:
        agreement_map(agreement, (f"A: {first.name}", f"B: {second.name}"), png)
        click.echo(f"wrote {png}")
    if any(profile.metadata.get("weights") == "random" for profile in profiles):
        warn_random()
