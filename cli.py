"""The command line `hess-patch`: parse, call one function, print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hess_plugin import __version__
from hess_plugin.files import check_writable
from hess_plugin.terminal import Group, progress_bars, warn_random

if TYPE_CHECKING:
    from torch import nn

_FILE = click.Path(path_type=Path)
_OUTPUT = click.Path(dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)
_COUNT = click.IntRange(min=1)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hess-patch")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def main(verbose: bool) -> None:
    """Make VGGT-family models fast: calibrate once, patch, run, undo."""


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Make one decorator of several options, shown in this order."""

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


model_options = _options(
    click.option("--model", required=True, metavar="NAME", help="Model to load: vggt, pi3, pi3x, demo, ..."),
    click.option(
        "--weights",
        metavar="PATH|HUB_ID|random",
        help="A .safetensors or .pt file, a hub id, or `random` (tests the machinery; the result means nothing).",
    ),
    click.option(
        "--repo",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Checkout of the model's code, if it is not importable already.",
    ),
    click.option(
        "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...; auto takes a GPU if any."
    ),
    click.option("--adapter", metavar="NAME", help="Adapter to use, where more than one claims the model."),
)
data_options = _options(
    click.option("--data", required=True, metavar="FORMAT:PATH", help="Scenes, for example folder:/data/scenes."),
    click.option("--scenes", type=_COUNT, help="Use this many scenes; all by default."),
    click.option("--views", type=_COUNT, help="Use this many views of each scene; all by default."),
    click.option("--seed", type=int, default=0, show_default=True, help="Chooses scenes and views."),
    click.option(
        "--resolution", type=click.IntRange(min=14), help="Longest image side in pixels; the images' own by default."
    ),
)
_DATA = ("data", "views", "seed", "resolution")


@main.command()
@model_options
@data_options
@click.option("-o", "--output", required=True, type=_OUTPUT, help="Profile to write.")
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
def calibrate(output: Path, model: str, weights: str | None, **options: Any) -> None:
    """Measure every head's sensitivity on scenes with ground truth and write a profile.

    A killed calibration goes on where it stopped: run the same command again.
    """
    check_writable(output)
    import torch

    import hess_plugin
    from hess_plugin.evaluation.tables import profile_summary

    loaded, found, manager = _model_and_scenes(model, weights, options)
    try:
        with progress_bars() as note:
            profile = hess_plugin.calibrate(
                loaded,
                found,
                output=output,
                camera_weight=options["camera_weight"],
                eps=options["eps"],
                autocast=torch.bfloat16 if options["autocast"] == "bfloat16" else None,
                metadata={"model": model, "weights": weights or "shipped", **{name: options[name] for name in _DATA}},
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


@main.command()
@model_options
@data_options
@click.option("--profile", type=_FILE, help="Profile for the arms that divide budgets by score.")
@click.option("--any-weights", is_flag=True, help="Accept a profile that was calibrated on other weights.")
@click.option("--sparsity", type=float, multiple=True, default=(0.73,), show_default=True, help="Several allowed.")
@click.option(
    "--arm",
    "arms",
    multiple=True,
    metavar="ALLOCATION",
    help="uniform, equal, hess, reverse, uncapped or random, several allowed; uniform, with a profile also hess.",
)
@click.option("--block-q", type=_COUNT, default=128, show_default=True, help="Patch queries in a block.")
@click.option("--block-k", type=_COUNT, default=64, show_default=True, help="Patch keys in a block.")
@click.option("-o", "--output", type=_OUTPUT, help="CSV of every measurement, to write.")
def evaluate(model: str, weights: str | None, profile: Path | None, output: Path | None, **options: Any) -> None:
    """Measure cameras and points, unpatched and patched, on scenes with ground truth."""
    if output is not None:
        check_writable(output, ".csv")
    from hess_plugin.evaluation.comparison import Arm, compare, summarise, write_csv
    from hess_plugin.evaluation.tables import comparison_table
    from hess_plugin.machine import describe_machine
    from hess_plugin.profiles import Profile

    score = None if profile is None else Profile.load(profile)
    names = options["arms"] or (("uniform",) if score is None else ("uniform", "hess"))
    wanted = [Arm(name, s, name) for s in options["sparsity"] if s != 0.0 for name in names]
    arms = list(dict.fromkeys([Arm("dense"), *wanted]))
    loaded, found, manager = _model_and_scenes(model, weights, options)
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
        )
    click.echo(comparison_table(summarise(rows)))
    click.echo(f"\nscenes: {len(found)}; mean ± standard error; AUC in points; {describe_machine()}.")
    if output is not None:
        facts = {name: options[name] for name in _DATA} | blocks
        write_csv(
            output, rows, {"model": model, "weights": weights or "shipped", **facts, "machine": describe_machine()}
        )
        click.echo(f"wrote {output}")
    if weights == "random":
        warn_random()


@main.command()
@click.argument("profile", type=_FILE)
@click.option("--png", type=_OUTPUT, help="Heat map to write; PROFILE.png by default.")
@click.option("--camera-weight", type=click.FloatRange(0, 1), help="Lambda of the score; the profile's by default.")
@click.option("--heads", type=_COUNT, default=8, show_default=True, help="Heads to list at each end.")
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


@main.command()
@model_options
def sites(model: str, weights: str | None, **options: Any) -> None:
    """List the global-attention sites that an adapter finds in a model."""
    from hess_plugin.plugins import resolve_adapter

    loaded = _load(model, weights or ("random" if model != "demo" else None), options)
    adapter = resolve_adapter(loaded, options["adapter"])
    found = adapter.sites(loaded)
    family = adapter.family(loaded)
    click.echo(
        f"adapter {adapter.name} claims {type(loaded).__name__}: {len(found)} sites, image sides multiples of "
        f"{family.image_multiple}, camera weight {family.camera_weight:g} ({family.source})"
    )
    width = max(len(site.name) for site in found)
    click.echo(f"{'site':{width}}  heads  head dim  layout module")
    for site in found:
        click.echo(f"{site.name:{width}}  {site.num_heads:5d}  {site.head_dim:8d}  {site.layout_module or '(model)'}")


@main.command()
def plugins() -> None:
    """Print installed adapters and the hooks each implements, as JSON."""
    from hess_plugin.plugins import describe_plugins

    click.echo(json.dumps(describe_plugins(), indent=2))


@main.command()
@click.option("-o", "--output", default="hess-demo", show_default=True, type=_FOLDER, help="Directory to write.")
@click.option(
    "--calibration-scenes", type=_COUNT, default=32, show_default=True, help="Synthetic rooms to calibrate on."
)
@click.option(
    "--test-scenes", type=click.IntRange(min=2), default=40, show_default=True, help="Other rooms to measure on."
)
@click.option("--views", type=click.IntRange(3, 256), default=16, show_default=True, help="Images of each room.")
def demo(output: Path, calibration_scenes: int, test_scenes: int, views: int) -> None:
    """Calibrate, patch and measure the small shipped model on synthetic rooms; a few minutes on two cores."""
    check_writable(output / "demo.hess")
    from hess_plugin.demo.run import DemoSettings, run_demo
    from hess_plugin.evaluation.tables import comparison_table

    with progress_bars() as note:
        result = run_demo(output, DemoSettings(calibration_scenes, test_scenes, views), note)
    click.echo(comparison_table(result.summaries))
    click.echo(f"\n{result.protocol}\n")
    for path in result.files:
        click.echo(f"wrote {path}")


def _model_and_scenes(name: str, weights: str | None, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Load the model and find its scenes, fitted to the model's image size; also the plugin manager used."""
    from hess_plugin.plugins import get_plugin_manager, resolve_adapter
    from hess_plugin.scenes.fitting import FittedScenes
    from hess_plugin.scenes.reading import read_scenes

    # Scenes first: a wrong path is told before a model of a billion weights is read.
    found = read_scenes(options["data"], scenes=options["scenes"], views=options["views"], seed=options["seed"])
    model = _load(name, weights, options)
    manager = get_plugin_manager()
    multiple = resolve_adapter(model, options["adapter"], manager).family(model).image_multiple
    return model, FittedScenes(found, multiple, options["resolution"]), manager


def _load(name: str, weights: str | None, options: dict[str, Any]) -> nn.Module:
    """Load the model that the options name."""
    import torch

    from hess_plugin.plugins import load_model

    if weights is None:
        if name != "demo":
            raise click.UsageError("--weights is missing: give a file, a hub id, or `random` to test the machinery.")
        weights = "shipped"
    if options["repo"] is not None:
        # The user's own checkout, asked for by name: first on the path, as if run from there.
        sys.path.insert(0, str(options["repo"].resolve()))
    device = options["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.ones(1, device=chosen).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise click.UsageError(f"--device {device} cannot be used here ({str(error).splitlines()[0]}).") from error
    model = load_model(name, weights, device=chosen, dtype=torch.float32)
    if weights == "random":
        warn_random()
    return model


if __name__ == "__main__":
    main(prog_name="hess-patch")
