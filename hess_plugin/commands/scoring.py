"""Options that choose how a score is made of a profile's traces; the same for every command that makes one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .options import options

if TYPE_CHECKING:
    from hess_plugin.scoring import Scoring

SCORE = ("camera_weight", "projection", "normalisation", "rows")

# The choices are spelt out here because importing hess_plugin.scoring would import torch for every --help.
score_options = options(
    click.option("--camera-weight", type=click.FloatRange(0, 1), help="Lambda of the score; the profile's by default."),
    click.option(
        "--projection",
        type=click.Choice(["q", "k", "v"]),
        default="q",
        show_default=True,
        help="Whose traces: W_Q is the method, the others are published ablations.",
    ),
    click.option(
        "--normalisation",
        type=click.Choice(["sum", "raw", "linear", "softmax", "log"]),
        default="sum",
        show_default=True,
        help="How the errors are made comparable: sum is the method, the others are published ablations.",
    ),
    click.option(
        "--rows",
        type=click.Choice(["all", "patch"]),
        default="all",
        show_default=True,
        help="Gradient through every token's row (the method) or through patch tokens' rows alone.",
    ),
)


def scoring_of(options: dict[str, Any]) -> Scoring:
    """Make the scoring that the options name."""
    from hess_plugin.scoring import Scoring

    return Scoring(**{name: options[name] for name in SCORE})
