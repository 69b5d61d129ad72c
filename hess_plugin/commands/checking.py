"""`hess-patch check`: does an adapter keep the contract?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from hess_plugin.terminal import waiting

from .options import COUNT, adapter_of, load, model_options

if TYPE_CHECKING:
    from hess_plugin.framing import Framing
    from hess_plugin.scenes.scene import Scene

_PATCHES = 6  # multiples a side: enough blocks to drop some, few enough for a laptop
_ANY = 56  # pixels where the family names no multiple: whole patches of 7, 8, 14 and 28


@click.command(short_help="Check that an adapter keeps the contract.")
@model_options
@click.option("--views", type=click.IntRange(min=3), default=4, show_default=True, help="Views of the room.")
@click.option(
    "--size",
    type=COUNT,
    help="Height and width of the images in pixels; by default 6 of the multiples that the adapter's family names.",
)
@click.option("--block", type=COUNT, default=8, show_default=True, help="Patch tokens in a block.")
@click.option(
    "--sparsity",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.5,
    show_default=True,
    help="Share of blocks to drop in the sparse checks.",
)
def check(
    model: str, weights: str | None, views: int, size: int | None, block: int, sparsity: float, **options: Any
) -> None:
    """Check that an adapter keeps the contract, on a small synthetic room.

    Prints a checklist, and ends with exit code 1 if a line failed. Give a small instance of the model if there is
    one: random weights will do, and every check runs the model several times.
    """
    from hess_plugin.plugins import get_plugin_manager
    from hess_plugin.testing import check_adapter

    loaded = load(model, weights or ("random" if model != "demo" else None), options)
    manager = get_plugin_manager()
    adapter = adapter_of(loaded, options, manager)
    scene = _room(views, size, adapter.family(loaded).framing).to(next(loaded.parameters()).device)
    click.echo(
        f"{adapter.called} on {type(loaded).__name__}: {views} views of {scene.height} x {scene.width} pixels, blocks "
        f"of {block}, sparsity {sparsity:g}"
    )
    with waiting("checking"):
        checks = check_adapter(loaded, scene, adapter=adapter.name, manager=manager, block=block, sparsity=sparsity)
    for line in checks:
        click.echo(str(line))
    failed = sum(line.problem is not None for line in checks)
    unknown = sum(line.unknown is not None for line in checks)
    click.echo(f"{len(checks) - failed - unknown} hold, {failed} fail, {unknown} not checked")
    if failed:
        raise SystemExit(1)


def _room(views: int, size: int | None, framing: Framing) -> Scene:
    """Views of one synthetic room, at a size that the model takes."""
    from hess_plugin.demo.rooms import make_scene

    if size is None:
        size = _ANY if framing.multiple == 1 else _PATCHES * framing.multiple
    if size % framing.multiple:
        raise click.UsageError(f"--size {size} is no multiple of {framing.multiple}, as the adapter's family wants.")
    return make_scene(7, views, image_size=size)
