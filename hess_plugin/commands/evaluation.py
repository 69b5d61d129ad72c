"""`hess-patch evaluate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from hess_plugin.files import check_writable
from hess_plugin.terminal import progress_bars, warn_random

from .options import COUNT, FILE, OUTPUT, data_facts, data_options, model_and_scenes, model_options
from .scoring import score_options, scoring_of


@click.command()
@model_options
@data_options
@click.option("--profile", type=FILE, help="Profile for the arms that divide budgets by score.")
@click.option("--any-weights", is_flag=True, help="Accept a profile that was calibrated on other weights.")
@score_options
@click.option("--sparsity", type=float, multiple=True, default=(0.73,), show_default=True, help="Several allowed.")
@click.option(
    "--arm",
    "arms",
    multiple=True,
    metavar="ALLOCATION",
    help="uniform, equal, hess, reverse, uncapped or random, several allowed; uniform, with a profile also hess.",
)
@click.option("--block-q", type=COUNT, default=128, show_default=True, help="Patch queries in a block.")
@click.option("--block-k", type=COUNT, default=64, show_default=True, help="Patch keys in a block.")
@click.option("-o", "--output", type=OUTPUT, help="CSV of every measurement, to write.")
def evaluate(model: str, weights: str | None, profile: Path | None, output: Path | None, **options: Any) -> None:
    """Measure cameras and points, unpatched and patched, on scenes with ground truth."""
    if output is not None:
        check_writable(output, ".csv")
    from hess_plugin.evaluation.comparison import Arm, compare, summarise, write_csv
    from hess_plugin.evaluation.tables import comparison_table
    from hess_plugin.machine import describe_machine
    from hess_plugin.profiles import Profile
    from hess_plugin.scoring import Scoring, head_scores

    scoring = scoring_of(options)
    if profile is None and scoring != Scoring():
        raise click.UsageError(
            f"a score was chosen ({scoring}), which is made of a profile, and none was given; add --profile."
        )
    score = None if profile is None else Profile.load(profile)
    if score is not None:
        head_scores(score, scoring)  # a score that cannot be made is told before a large model is read
    names = options["arms"] or (("uniform",) if score is None else ("uniform", "hess"))
    wanted = [Arm(name, s, name) for s in options["sparsity"] if s != 0.0 for name in names]
    arms = list(dict.fromkeys([Arm("dense"), *wanted]))
    loaded, found, manager = model_and_scenes(model, weights, options)
    done, total = iter(range(len(found) * len(arms))), len(found) * len(arms)
    blocks = {name: options[name] for name in ("block_q", "block_k")}
    with progress_bars() as note:
        rows = compare(
            loaded,
            found,
            arms,
            profile=score,
            progress=lambda scene, arm: note("measure", next(done), total, f"{scene} {arm}"),
            adapter=options["adapter"],
            manager=manager,
            strict=not options["any_weights"],
            **blocks,
            **asdict(scoring),
        )
    click.echo(comparison_table(summarise(rows)))
    made = "" if score is None else f"; score: {scoring.resolved(score)}"
    click.echo(f"\nscenes: {len(found)}; mean ± standard error; AUC in points{made}; {describe_machine()}.")
    if output is not None:
        facts = data_facts(options) | blocks
        facts |= {"profile": profile} | asdict(scoring if score is None else scoring.resolved(score))
        write_csv(
            output, rows, {"model": model, "weights": weights or "shipped", **facts, "machine": describe_machine()}
        )
        click.echo(f"wrote {output}")
    if weights == "random":
        warn_random()
