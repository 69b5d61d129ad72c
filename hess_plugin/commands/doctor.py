"""`hess-patch doctor`: what sparse attention is computed with here, and why."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from hess_plugin.terminal import waiting

from .options import COUNT, block_options, device_of, device_option

if TYPE_CHECKING:
    from hess_plugin.diagnosis import Diagnosis

_DTYPES = ("float32", "bfloat16", "float16", "float64")


@click.command(short_help="Tell which attention backend runs here, and why.")
@device_option
@click.option(
    "--dtype", type=click.Choice(_DTYPES), help="Type of the attention; bfloat16 on a GPU, float32 elsewhere."
)
@click.option("--head-dim", type=COUNT, default=64, show_default=True, help="Width of a head.")
@block_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for a bug report.")
def doctor(device: str, dtype: str | None, head_dim: int, block_q: int, block_k: int, as_json: bool) -> None:
    """Tell which attention backend runs on this machine, and why.

    Tests every backend against plain torch on a small problem, and says what would be faster. Ends with exit code 1 if
    no backend can run, or one computes wrong results.
    """
    import torch

    from hess_plugin.diagnosis import diagnose
    from hess_plugin_cuda import Problem

    where = device_of(device)
    kind = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    with waiting("testing backends"):
        found = diagnose(Problem(where, getattr(torch, kind), head_dim, block_q, block_k))
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else _text(found))
    if not found.healthy:
        raise SystemExit(1)


def _text(found: Diagnosis) -> str:
    rows: list[tuple[str, Any]] = [
        ("device", found.device),
        ("versions", ", ".join(f"{name} {version}" for name, version in found.versions.items())),
        ("attention", found.problem),
    ]
    for backend in found.backends:
        rows.append((f"  {backend.name}", backend.state + (f": {backend.reason}" if backend.reason else "")))
    if found.unusable:
        rows.append(("problem", found.unusable))
    rows.append(("dense", f"{', '.join(found.dense)} (best first)"))
    rows += [("faster" if not i else "", line) for i, line in enumerate(found.advice or ("nothing known",))]
    return "\n".join(f"{name:12} {value}" for name, value in rows)
