"""`hess-patch sites` and `hess-patch plugins`: what is known of models."""

from __future__ import annotations

import json
from typing import Any

import click

from .options import adapter_of, load, model_options


@click.command(short_help="List the sites that an adapter finds in a model.")
@model_options
def sites(model: str, weights: str | None, **options: Any) -> None:
    """List the global-attention sites that an adapter finds in a model."""
    loaded = load(model, weights or ("random" if model != "demo" else None), options)
    adapter = adapter_of(loaded, options)
    found = adapter.sites(loaded)
    family = adapter.family(loaded)
    framing, size = family.framing, family.framing.resolution or "their own"
    click.echo(
        f"adapter {adapter.name} claims {type(loaded).__name__}: {len(found)} sites, image sides multiples of "
        f"{framing.multiple} (framing {framing.mode}, size {size}), camera weight {family.camera_weight:g} "
        f"({family.source})"
    )
    width = max(len(site.name) for site in found)
    click.echo(f"{'site':{width}}  heads  head dim  layout module")
    for site in found:
        click.echo(f"{site.name:{width}}  {site.num_heads:5d}  {site.head_dim:8d}  {site.layout_module or '(model)'}")


@click.command(short_help="Print adapters and their hooks, as JSON.")
def plugins() -> None:
    """Print installed adapters and the hooks each implements, as JSON."""
    from hess_plugin.plugins import describe_plugins

    click.echo(json.dumps(describe_plugins(), indent=2))
