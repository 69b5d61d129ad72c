"""`hess-patch evaluate`."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hess_plugin.files import check_writable
from hess_plugin.terminal import progress_bars, warn_random

from .measures import metric_facts, metric_options, metrics_of
from .options import (
    FILE,
    OUTPUT,
    attention_options,
    data_facts,
    data_options,
    model_and_scenes,
    model_options,
    selection_of,
)
from .scoring import score_options, scoring_of

if TYPE_CHECKING:
    from hess_plugin.evaluation.arms import Arm
    from hess_plugin.evaluation.metrics import MetricSettings
    from hess_plugin.evaluation.records import Measurement
    from hess_plugin.evaluation.statistics import Summary
    from hess_plugin.profiles import Profile
    from hess_plugin.scoring import Scoring
    from hess_plugin.settings import Settings

_BLOCKS = ("block_q", "block_k", "memory")


@click.command(short_help="Measure cameras and points, unpatched and patched.")
@model_options
@data_options
@click.option("--profile", type=FILE, help="Profile for the arms that divide budgets by score.")
@click.option("--any-weights", is_flag=True, help="Accept a profile that was calibrated on other weights.")
@score_options
@click.option(
    "--sparsity",
    type=float,
    multiple=True,
    help="Dropped share of patch-block pairs; several allowed; 0.73 by default.",
)
@click.option("--sparse-ratio", type=float, help="rho of SparseVGGT, instead of a sparsity.")
@click.option("--cdf-threshold", type=float, help="tau of SparseVGGT, instead of a sparsity.")
@click.option(
    "--arm",
    "arms",
    multiple=True,
    metavar="ALLOCATION",
    help="uniform, equal, hess, harm, reverse, uncapped or random, several allowed; uniform by default, with a profile "
    "also hess, and harm where its preset goes by it.",
)
@attention_options
@metric_options
@click.option("-o", "--output", type=OUTPUT, help="CSV of every measurement, to write.")
def evaluate(model: str, weights: str | None, profile: Path | None, output: Path | None, **options: Any) -> None:
    """Measure cameras and points, unpatched and patched, on scenes with ground truth."""
    if output is not None:
        check_writable(output, ".csv")
    from hess_plugin.block_choice import choice_facts, choice_text
    from hess_plugin.evaluation.comparison import compare
    from hess_plugin.evaluation.statistics import failed_lines, summarise
    from hess_plugin.machine import describe_machine

    scoring = scoring_of(options)
    score = _profile(profile, scoring)
    metrics, (arms, chosen) = metrics_of(options), _arms(options, score)
    loaded, found, manager = model_and_scenes(model, weights, options)
    done, total = iter(range(len(found) * len(arms))), len(found) * len(arms)
    with progress_bars() as note:
        rows = compare(
            loaded,
            found,
            arms,
            profile=score,
            metrics=metrics,
            progress=lambda scene, arm: note("measure", next(done), total, f"{scene} {arm}"),
            adapter=options["adapter"],
            manager=manager,
            strict=not options["any_weights"],
            **_blocks(options),
            **asdict(scoring),
        )
    made = scoring if score is None else scoring.resolved(score)
    click.echo("\n".join([_text(summarise(rows), metrics), *failed_lines(rows)]))
    said = [f"{len(found)} scenes", *([] if score is None else [f"score: {made}"]), choice_text(chosen)]
    click.echo(f"{'; '.join([*said, describe_machine()])}.")
    if output is not None:
        facts = {"model": model, "weights": weights or "shipped", **data_facts(options)}
        facts |= {**{name: options[name] for name in _BLOCKS}, **choice_facts(chosen)}
        _write(output, rows, {**facts, "profile": profile, **asdict(made), **metric_facts(options)})
    if weights == "random":
        warn_random()


def _profile(path: Path | None, scoring: Scoring) -> Profile | None:
    """Read the profile; a score that cannot be made of it is told before a large model is read."""
    from hess_plugin.profiles import Profile
    from hess_plugin.scoring import Scoring, head_scores

    if path is None:
        if scoring != Scoring():
            raise click.UsageError(
                f"a score was chosen ({scoring}), which is made of a profile, and none was given; add --profile."
            )
        return None
    profile = Profile.load(path)
    head_scores(profile, scoring)
    return profile


def _blocks(options: dict[str, Any]) -> dict[str, Any]:
    return {**{name: options[name] for name in _BLOCKS}, **selection_of(options)}


def _write(output: Path, rows: list[Measurement], facts: dict[str, Any]) -> None:
    from hess_plugin.evaluation.records import write_csv
    from hess_plugin.machine import describe_machine

    facts["machine"] = describe_machine()
    facts["alignment_asked"] = facts.pop("alignment")  # beside the column that says what was done
    write_csv(output, rows, facts)
    click.echo(f"wrote {output}")


def _text(summaries: list[Summary], metrics: MetricSettings) -> str:
    """The tables, each with what its figures are."""
    from hess_plugin.evaluation.protocol import describe_cameras, describe_clouds
    from hess_plugin.evaluation.tables import camera_table, cloud_table

    text, clouds = f"{camera_table(summaries)}\n\n{describe_cameras(metrics)}", cloud_table(summaries)
    done = "; ".join(dict.fromkeys(s.alignment for s in summaries))
    if clouds is None:
        failed = all(s.alignment.startswith("failed") for s in summaries)
        why = "No prediction could be aligned" if failed else "No scene has depth or points"
        return f"{text}\n{why}: clouds were not measured."
    return f"{text}\n\n{clouds}\n\n{describe_clouds(metrics)} Alignment that was possible: {done}."


def _arms(options: dict[str, Any], profile: Profile | None) -> tuple[list[Arm], Settings]:
    """The dense model, then every arm at every amount; and the settings that all of them share."""
    from hess_plugin.evaluation.arms import Arm, Row
    from hess_plugin.harm_curves import model_curves
    from hess_plugin.settings import make_settings

    rule = {name: options[name] for name in ("sparse_ratio", "cdf_threshold")}
    if any(value is not None for value in rule.values()):
        if options["sparsity"]:
            raise click.UsageError("--sparsity and --sparse-ratio/--cdf-threshold were given; choose one of them.")
        rows = [Row(**rule)]
    else:
        rows = [Row(sparsity) for sparsity in options["sparsity"] or (0.73,) if sparsity != 0.0]
    blocks = _blocks(options)
    chosen = make_settings(profile=profile, **blocks)
    names = options["arms"] or _default_arms(profile, options, [asdict(row) for row in rows])
    for row, name in itertools.product(rows, names):  # what a patch would refuse
        make_settings(profile=profile, **asdict(row), allocation=name, **blocks)
    guided = [name for name in names if Arm(name, 0.5, name).guided]
    if profile is None and guided:
        raise click.UsageError(f"--arm {guided[0]} divides budgets by a profile and none was given; add --profile.")
    if profile is not None and "harm" in names:
        model_curves(profile, options["camera_weight"])  # what is not there is told before a large model is read
    wanted = [Arm(name, allocation=name).at(row) for row in rows for name in names]
    return list(dict.fromkeys([Arm("dense"), *wanted])), chosen


def _default_arms(profile: Profile | None, options: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """Uniform budgets and those by score; those by harm where a patch would take them."""
    from hess_plugin.harm_curves import has_curves
    from hess_plugin.settings import make_settings

    if profile is None:
        return ("uniform",)
    weight = options["camera_weight"]
    weighed = profile if weight is None else profile.with_camera_weight(weight)
    taken = {make_settings(profile=profile, **row, **_blocks(options)).allocation for row in rows}
    return ("uniform", "hess", *(["harm"] if "harm" in taken and has_curves(weighed) else []))
