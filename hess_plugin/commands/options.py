"""Options that several commands share, and what they stand for: a model, its scenes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hess_plugin.terminal import waiting, warn_random

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hess_plugin.adapting import Adapter
    from hess_plugin.framing import Framing

FILE = click.Path(path_type=Path)
OUTPUT = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
COUNT = click.IntRange(min=1)


def options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Make one decorator of several options, shown in this order."""

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


MODELS = ("vggt", "pi3", "pi3x", "da3-small", "da3-base", "da3-large", "da3-giant", "vggt-omega", "mapanything", "demo")
"""What the adapters of this package load; for a shell that completes names, where importing them takes too long."""


def _models(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    return [name for name in MODELS if name.startswith(begun)]


device_option = click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...; auto takes a GPU if any."
)
model_options = options(
    click.option(
        "--model",
        required=True,
        metavar="NAME",
        shell_complete=_models,
        help="Model to load: vggt, pi3, pi3x, da3-large, vggt-omega, demo, ... (`hess-patch plugins` lists adapters).",
    ),
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
    device_option,
    click.option("--adapter", metavar="NAME", help="Adapter to use, where more than one claims the model."),
)
autocast_option = click.option(
    "--autocast",
    type=click.Choice(["auto", "none", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Type of the forward; auto is bfloat16 on a GPU that has it, none elsewhere.",
)
block_options = options(
    click.option("--block-q", type=COUNT, default=128, show_default=True, help="Patch queries in a block."),
    click.option("--block-k", type=COUNT, default=64, show_default=True, help="Patch keys in a block."),
)
PRESETS = ("hess", "balanced", "accurate")
SELECTORS = ("mass", "drift", "restore")
BLOCK_ORDERS = ("raster", "hilbert", "tiles")
_SELECTION = ("preset", "selector", "pool_q", "pool_k", "block_order")
selection_options = options(
    click.option(
        "--preset",
        type=click.Choice(PRESETS),
        help="Settings that go well together: hess, the method as published; balanced and accurate, which keep more "
        "accuracy for more time to choose blocks. The profile's own by default, else hess.",
    ),
    click.option("--selector", type=click.Choice(SELECTORS), help="Rule that chooses blocks; the preset's by default."),
    click.option(
        "--pool-q", type=COUNT, help="Patch queries pooled together to choose blocks; the preset's by default."
    ),
    click.option("--pool-k", type=COUNT, help="Patch keys pooled together likewise."),
    click.option(
        "--block-order",
        type=click.Choice(BLOCK_ORDERS),
        help="Order in which the patches of a frame fill blocks; the preset's by default.",
    ),
)
attention_options = options(
    block_options,
    selection_options,
    click.option(
        "--memory",
        type=click.Choice(["plain", "lean"]),
        default="plain",
        show_default=True,
        help="lean runs heads and attention of the patched model in chunks: less memory, the same outputs to rounding.",
    ),
)
scene_options = options(
    click.option(
        "--data",
        required=True,
        multiple=True,
        metavar="FORMAT:PATH",
        help="Scenes, for example folder:/data/scenes or co3d:/data/co3d; several allowed.",
    ),
    click.option("--scenes", type=COUNT, help="Use this many scenes; all by default."),
    click.option("--views", type=COUNT, help="Use this many views of each scene; all by default."),
    click.option("--seed", type=int, default=0, show_default=True, help="Chooses scenes and views."),
)
data_options = options(
    scene_options,
    click.option("--resolution", type=click.IntRange(min=14), help="Image size in pixels; the model's own by default."),
    click.option(
        "--framing",
        type=click.Choice(["longest", "area", "crop", "pad"]),
        help="How images get there: whole by their longest side or area, cropped, padded; the model's way by default.",
    ),
)


def selection_of(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `hess_plugin.patch` that say how blocks are chosen: those that were given."""
    return {name: options[name] for name in _SELECTION if options[name] is not None}


def data_facts(options: dict[str, Any]) -> dict[str, Any]:
    """What to record of the data options, beside a result."""
    facts = {name: options[name] for name in ("views", "seed", "resolution", "framing")}
    return {"data": " ".join(options["data"]), **facts}


def model_and_scenes(name: str, weights: str | None, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Load the model and find its scenes, fitted to the model's image size; also the plugin manager used."""
    from hess_plugin.plugins import get_plugin_manager
    from hess_plugin.scenes.reading import read_scenes

    # Scenes first: a wrong path is told before a model of a billion weights is read.
    with waiting("looking for scenes"):
        found = read_scenes(options["data"], scenes=options["scenes"], views=options["views"], seed=options["seed"])
    if options["scenes"] is not None and len(found) < options["scenes"]:
        click.echo(f"Warning: {options['scenes']} scenes asked for, {len(found)} found.", err=True)
    model = load(name, weights, options)
    manager = get_plugin_manager()
    return model, found.framed(framing_of(model, options, manager)), manager


def framing_of(model: nn.Module, options: dict[str, Any], manager: Any) -> Framing:
    """The size of images: the model's own, but for what the options say."""
    framing = adapter_of(model, options, manager).family(model).framing
    given = {"resolution": options["resolution"], "mode": options["framing"]}
    return replace(framing, **{name: value for name, value in given.items() if value is not None})


def adapter_of(model: nn.Module, options: dict[str, Any], manager: Any = None) -> Adapter:
    """The adapter that --adapter names, or the one that claims the model."""
    from hess_plugin.plugins import require_claim, resolve_adapter

    name = options["adapter"]
    return resolve_adapter(model, None, manager) if name is None else require_claim(model, name, manager)


def load(name: str, weights: str | None, options: dict[str, Any]) -> nn.Module:
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
    chosen = device_of(options["device"])
    with waiting(f"loading {name}"):
        model = load_model(name, weights, device=chosen, dtype=torch.float32)
    if weights == "random":
        warn_random()
    return model


def autocast_of(choice: str, model: nn.Module) -> torch.dtype | None:
    """The type that --autocast chooses for a model's forward; None for the model's own."""
    import torch

    if choice == "auto":
        on_gpu = next(model.parameters()).device.type == "cuda"
        choice = "bfloat16" if on_gpu and torch.cuda.is_bf16_supported() else "none"
    return torch.bfloat16 if choice == "bfloat16" else None


def device_of(given: str) -> torch.device:
    """The device meant by --device, which has to be there."""
    import torch

    name = _own_device(given)
    try:
        chosen = torch.device(name)
        torch.ones(1, device=chosen).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0].partition(". ")[0].rstrip(".")  # torch may go on for a page
        raise click.UsageError(f"--device {name} cannot be used here ({why}); give cpu, or leave it out.") from error
    return chosen


def _own_device(given: str) -> str:
    """The device meant by --device: of several processes that torchrun started on a machine, each takes a GPU."""
    import torch

    from hess_plugin.calibration.launch import launch

    if given == "auto":
        given = "cuda" if torch.cuda.is_available() else "cpu"
    number = launch().local_rank
    return f"cuda:{number}" if given == "cuda" and number is not None else given
