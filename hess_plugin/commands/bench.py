"""`hess-patch bench`: how much faster patching is on this machine, and from which size on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hess_plugin.files import check_writable
from hess_plugin.terminal import waiting

from .options import (
    COUNT,
    FILE,
    adapter_of,
    attention_options,
    autocast_of,
    autocast_option,
    framing_of,
    load,
    model_options,
    selection_of,
)

if TYPE_CHECKING:
    from torch import nn

    from hess_plugin.adapting import Adapter
    from hess_plugin.break_even import BreakEven, Conditions, Timing
    from hess_plugin.evaluation.sizes import Measure, Sizes
    from hess_plugin.evaluation.timing import Stopwatch
    from hess_plugin.profiles import Profile
    from hess_plugin.settings import Settings
    from hess_plugin.sites import Site

_SHARE = click.FloatRange(0, 1, min_open=True, max_open=True)


@click.command(short_help="Time patched against unpatched; find the break-even.")
@model_options
@click.option(
    "--profile", type=FILE, help="Profile whose budgets are timed; --end-to-end records the break-even in it."
)
@click.option(
    "--end-to-end", is_flag=True, help="Time whole forwards and find the number of views from which patching pays."
)
@click.option("--sparsity", type=_SHARE, default=0.73, show_default=True, help="Dropped share of patch-block pairs.")
@click.option("--views", type=COUNT, multiple=True, help="Time these numbers of views and no others; several allowed.")
@click.option("--min-views", type=COUNT, default=2, show_default=True, help="Views to begin with; then doubled.")
@click.option("--max-views", type=COUNT, default=256, show_default=True, help="Views to end with.")
@click.option(
    "--max-seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="Doubling ends where one unpatched call takes longer; --views are timed all the same.",
)
@click.option(
    "--repeats", type=click.IntRange(min=3), default=7, show_default=True, help="Pairs of calls behind a ratio."
)
@click.option("--resolution", type=click.IntRange(min=14), help="Image size in pixels; the model's own by default.")
@autocast_option
@click.option("--backend", default="auto", show_default=True, help="Attention code, by name; auto chooses.")
@attention_options
def bench(model: str, weights: str | None, profile: Path | None, end_to_end: bool, **options: Any) -> None:
    """Time patched against unpatched on random images, side by side on this machine.

    Without --end-to-end, the attention of the model's first site alone is timed, choosing the blocks included. A ratio
    is the median over repeats of patched / unpatched seconds of the same repeat, with the interval of that median by
    the sign test; patching pays where the whole interval lies below 1. Weights may be random: at a fixed sparsity the
    time does not depend on them.
    """
    if not options["views"] and options["min_views"] > options["max_views"]:
        raise click.UsageError(
            f"--min-views {options['min_views']} is more than --max-views {options['max_views']}; give a range."
        )
    from hess_plugin.evaluation.sizes import timing_table
    from hess_plugin.machine import describe_machine
    from hess_plugin.plugins import get_plugin_manager
    from hess_plugin.profiles import Profile

    score = None if profile is None else Profile.load(profile)
    if profile is not None and end_to_end:
        check_writable(profile)
    loaded = load(model, weights, options)
    adapter = adapter_of(loaded, options, get_plugin_manager())
    size = _image_size(adapter, loaded, options)
    how: dict[str, Any] = {name: options[name] for name in ("sparsity", "backend", "block_q", "block_k", "memory")}
    how |= selection_of(options)
    # Timing depends on the budgets of a profile, not on whose weights they were found with.
    how |= {"profile": score, "strict": False, "verdict": "ignore", "dense_below": 0}
    if not end_to_end:  # one site has no part in budgets of the whole model
        how["allocation"] = "uniform" if score is None else "hess"
    watch, site = _stopwatch(loaded, options), adapter.sites(loaded)[0]
    conditions = _conditions(adapter, loaded, site, watch, how)
    sizes = _time(_timer(adapter, loaded, site, size, watch, how, end_to_end), options, search=end_to_end)
    click.echo(timing_table(sizes.timings))
    click.echo(_protocol(site, size, watch, how, conditions, end_to_end))
    click.echo(f"machine: {describe_machine()}")
    if end_to_end:
        _conclude(profile, sizes, _entry(sizes, size, how, conditions))
    elif profile is not None:
        click.echo("Nothing was recorded in the profile: attention alone tells no break-even, --end-to-end does.")
    if sizes.stopped is not None:
        click.echo(f"Larger sizes were not tried: {sizes.stopped}.")
    if weights == "random":
        click.echo(
            "Times are the exception to the warning above: at a fixed sparsity they do not depend on the weights (with "
            "a CDF threshold they would)."
        )


def _conditions(adapter: Adapter, model: nn.Module, site: Site, watch: Stopwatch, how: dict[str, Any]) -> Conditions:
    """What a break-even is recorded for; by a patch, which tells mistakes before anything is timed."""
    from hess_plugin.break_even import Conditions
    from hess_plugin.patching import patch

    with patch(model, **how, adapter=adapter.name, manager=adapter.manager) as handle:
        backend = handle.report().backend
    weight, settings = site.weight(), _settings(how)
    return Conditions.of(
        weight.device,
        weight.dtype,
        backend,
        settings.block_q,
        settings.block_k,
        watch.autocast,
        settings.selection,
    )


def _settings(how: dict[str, Any]) -> Settings:
    """What `patch` makes of them."""
    from hess_plugin.settings import make_settings

    return make_settings(**{name: value for name, value in how.items() if name not in ("strict", "verdict")})


def _image_size(adapter: Adapter, model: nn.Module, options: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of a square image as the family frames it."""
    framing = framing_of(model, {**options, "framing": None}, adapter.manager)
    if framing.resolution is None:
        raise click.UsageError(f"adapter {adapter.name!r} tells no image size for this model; give --resolution.")
    side = math.ceil(framing.resolution)
    placed = framing.place(side, side)
    return placed.rows, placed.columns


def _stopwatch(model: nn.Module, options: dict[str, Any]) -> Stopwatch:
    from hess_plugin.evaluation.timing import Stopwatch

    return Stopwatch(
        next(model.parameters()).device,
        repeats=options["repeats"],
        max_seconds=math.inf if options["views"] else options["max_seconds"],
        autocast=autocast_of(options["autocast"], model),
    )


def _timer(
    adapter: Adapter,
    model: nn.Module,
    site: Site,
    size: tuple[int, int],
    watch: Stopwatch,
    how: dict[str, Any],
    whole: bool,
) -> Measure:
    from hess_plugin.evaluation.timers import AttentionTimer, ForwardTimer
    from hess_plugin.scoring import Scoring, head_scores

    if whole:
        return ForwardTimer(adapter, model, size, watch, **how)
    profile: Profile | None = how["profile"]
    scores = None if profile is None else head_scores(profile, Scoring())[0]
    return AttentionTimer(adapter, model, site, size, watch, _settings(how), scores)


def _time(timer: Measure, options: dict[str, Any], *, search: bool) -> Sizes:
    from hess_plugin.evaluation.sizes import doubled, find_break_even, time_sizes

    def measure(views: int) -> Timing:
        with waiting(f"timing {views} views"):
            return timer(views)

    if options["views"]:
        return time_sizes(measure, options["views"])
    if search:
        return find_break_even(measure, options["min_views"], options["max_views"])
    return time_sizes(measure, doubled(options["min_views"], options["max_views"]))


def _protocol(
    site: Site, size: tuple[int, int], watch: Stopwatch, how: dict[str, Any], conditions: Conditions, whole: bool
) -> str:
    from hess_plugin.evaluation.timing import coverage

    what = "whole forwards" if whole else f"attention of {site.name} alone ({site.num_heads} heads of {site.head_dim})"
    return (
        f"{what}, images {size[0]} x {size[1]} px, {conditions.dtype}, autocast {conditions.autocast or 'none'}, "
        f"backend {conditions.backend}, sparsity {how['sparsity']:g} ({_settings(how).allocation}), "
        f"{conditions.blocks}, memory {how['memory']}; "
        f"ratio: median of {watch.repeats} repeats of patched / dense, "
        f"with its {coverage(watch.repeats):.1%} interval"
    )


def _entry(sizes: Sizes, size: tuple[int, int], how: dict[str, Any], conditions: Conditions) -> BreakEven:
    import platform
    from datetime import datetime, timezone

    import torch

    from hess_plugin import __version__
    from hess_plugin.break_even import BreakEven

    return BreakEven(
        conditions,
        sparsity=how["sparsity"],
        allocation=_settings(how).allocation,
        height=size[0],
        width=size[1],
        timings=sizes.timings,
        versions={"hess_plugin": __version__, "python": platform.python_version(), "torch": torch.__version__},
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _conclude(profile: Path | None, sizes: Sizes, entry: BreakEven) -> None:
    """Say from which size on patching pays, and record it where there is a profile."""
    from hess_plugin.evaluation.sizes import conclusion

    click.echo(conclusion(entry, sizes))
    if profile is not None:
        _record(profile, entry)


def _record(path: Path, entry: BreakEven) -> None:
    from hess_plugin.profiles import Profile
    from hess_plugin.recorded_break_evens import record_break_even

    # Read again: timing took a while, and something else may have been recorded meanwhile.
    target = path.resolve()  # the file that a link points to is replaced, not the link
    record_break_even(Profile.load(target), entry).save(target)
    effect = "takes the dense path nowhere because of it"
    if entry.dense_below:
        effect = f"takes the dense path for fewer than {entry.dense_below} patch tokens on this machine"
    click.echo(f"recorded in {path}: patch(profile=...) {effect} (dense_below=0 switches that off).")
