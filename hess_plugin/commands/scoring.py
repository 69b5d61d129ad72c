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
        type=click.Choice(["q", "k", "v", "output"]),
        default="q",
        show_default=True,
        help="Whose traces: W_Q is the method, W_K and W_V are published ablations, output is the gradient by the "
        "heads' outputs (measured with --harm).",
    ),
    click.option(
        "--normalisation",
        type=click.Choice(["sum", "scene", "raw", "linear", "softmax", "log"]),
        default="sum",
        show_default=True,
        help="How the errors are made comparable: sum is the method, scene gives all scenes the same weight, the "
        "others are published ablations.",
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
