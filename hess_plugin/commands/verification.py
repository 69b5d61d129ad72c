"""`hess-patch verify`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from hess_plugin.exceptions import HessError
from hess_plugin.files import check_writable
from hess_plugin.terminal import progress_bars, warn_random

from .options import (
    COUNT,
    FILE,
    data_facts,
    data_options,
    model_and_scenes,
    model_options,
    selection_of,
    selection_options,
)
from .scoring import score_options, scoring_of


@click.command(short_help="Show whether a profile beats uniform budgets.")
@model_options
@data_options
@click.option("--profile", required=True, type=FILE, help="Profile to verify; the verdict is written into it.")
@click.option(
    "--any-weights",
    is_flag=True,
    help="Accept a profile that was calibrated on other weights; the verdict is then about this model's.",
)
@score_options
@click.option(
    "--sparsity",
    "sparsities",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    multiple=True,
    default=(0.73,),
    show_default=True,
    help="Several allowed.",
)
@click.option("--block-q", type=COUNT, default=128, show_default=True, help="Patch queries in a block.")
@click.option("--block-k", type=COUNT, default=64, show_default=True, help="Patch keys in a block.")
@selection_options
@click.option("--no-record", is_flag=True, help="Only print the verdict; leave the profile as it is.")
@click.option("--strict", is_flag=True, help="Exit with code 1 unless the profile helps at every sparsity.")
def verify(model: str, weights: str | None, profile: Path, no_record: bool, strict: bool, **options: Any) -> None:
    """Compare a profile with uniform budgets on held-out scenes, and write the verdict into it.

    From then on `hess_plugin.patch` takes uniform budgets, and says so, where the profile was shown to be worse.
    Scenes that the profile was calibrated on are left out. Give 20 scenes or more: differences are small.
    """
    from hess_plugin.block_choice import choice_text
    from hess_plugin.evaluation.protocol import ALIGNMENT_WORDS
    from hess_plugin.evaluation.statistics import summarise
    from hess_plugin.evaluation.tables import comparison_table
    from hess_plugin.evaluation.verify import HeldOut, arms_of
    from hess_plugin.evaluation.verify import verify as measure
    from hess_plugin.harm_curves import model_curves
    from hess_plugin.machine import describe_machine
    from hess_plugin.profiles import Profile
    from hess_plugin.scoring import head_scores
    from hess_plugin.settings import make_settings
    from hess_plugin.verified_profiles import write_verifications

    loaded, scoring = Profile.load(profile), scoring_of(options)
    if not no_record:
        _check_replaceable(profile)
    head_scores(loaded, scoring)  # a score that cannot be made is told before a large model is read
    blocks = {name: options[name] for name in ("block_q", "block_k")}
    settings = make_settings(profile=loaded, **blocks, **selection_of(options))  # as is what a patch would refuse
    if settings.allocation == "harm":
        model_curves(loaded, scoring.camera_weight)
    arms = arms_of(options["sparsities"], settings.allocation)
    net, scenes, manager = model_and_scenes(model, weights, options)
    held_out = HeldOut(scenes, loaded)
    if held_out.left_out:
        click.echo(
            f"left out {len(held_out.left_out)} of {len(scenes)} scenes, which the profile was calibrated on: "
            f"{_some(held_out.left_out)}"
        )
    done, total = iter(range(len(held_out) * len(arms))), len(held_out) * len(arms)
    with progress_bars() as note:
        found = measure(
            net,
            held_out,
            loaded,
            options["sparsities"],
            scoring=scoring,
            **blocks,
            selection=selection_of(options),
            strict=not options["any_weights"],
            data=_described(options),
            progress=lambda scene, arm: note("measure", next(done), total, f"{scene} {arm}"),
            adapter=options["adapter"],
            manager=manager,
        )
    click.echo(comparison_table(summarise(found.rows)))
    click.echo(
        f"\nscenes: {len(held_out)} held out; mean ± standard error; AUC in points; ATE after "
        f"{ALIGNMENT_WORDS['cameras']}, point error after {ALIGNMENT_WORDS['pixels']}; score: "
        f"{scoring.resolved(loaded)}; budgets by {'harm' if settings.allocation == 'harm' else 'score'}; "
        f"{choice_text(settings)}; {describe_machine()}."
    )
    for verification in found.verifications:
        click.echo(f"verdict: {verification.text}")
    if not no_record:
        write_verifications(profile, found.verifications)
        click.echo(f"wrote {profile}")
    if weights == "random":
        warn_random()
    if strict and any(verification.outcome != "helps" for verification in found.verifications):
        raise SystemExit(1)


def _check_replaceable(profile: Path) -> None:
    """Check before long work that the verdict can be written into the profile."""
    target = profile.resolve()
    check_writable(target)
    if not os.access(target, os.W_OK):
        raise HessError(f"{profile} is read-only; make it writable, or give --no-record to print the verdict alone.")


def _described(options: dict[str, Any]) -> str:
    """Where the scenes are from, in words."""
    facts = data_facts(options)
    return ", ".join([facts.pop("data"), *(f"{name} {value}" for name, value in facts.items() if value is not None)])


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
