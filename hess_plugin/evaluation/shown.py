"""How metrics and arms are shown: headings, units, decimals, colours; the same in every picture and table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Shown:
    """One metric as it is shown.

    Attributes:
        heading: of a column.
        meaning: what it is, in a sentence without its full stop.
        factor: from the measured number to the one that is shown.
        decimals: of the number that is shown.
        better: 1 where larger is better, -1 where smaller is, 0 where it is no merit.
        unit: of the number that is shown; empty for a length, whose unit depends on the scene, and for a share.
    """

    heading: str
    meaning: str
    factor: float = 1.0
    decimals: int = 4
    better: int = -1
    unit: str = ""

    def number(self, value: float, signed: bool = False) -> str:
        """A measured number as it is shown, without unit."""
        # Adding 0 takes the sign off what is rounded to nothing.
        return f"{round(value * self.factor, self.decimals) + 0.0:{'+' if signed else ''}.{self.decimals}f}"

    def label(self, more: str = "") -> str:
        """Label of an axis: heading, `more`, and below it unit and which direction is better."""
        better = {1: "higher is better", -1: "lower is better", 0: ""}[self.better]
        return f"{self.heading}{more}\n{', '.join(part for part in (self.unit, better) if part)}"


_AUC = (
    "area under the accuracy curve of relative poses up to so many degrees, over all pairs of views, from 0 to 100; "
    "the error of a pair is the larger of rotation and translation direction"
)


SHOWN = {
    "sparsity": Shown("sparsity", "dropped share of patch-block pairs, measured, 0 is dense", better=0),
    **{f"auc{degrees}": Shown(f"AUC@{degrees}", _AUC, 100.0, 1, 1, "points") for degrees in (30, 15, 5, 3)},
    "ate": Shown("ATE", "root mean square distance of camera centres after their own best similarity"),
    "centre_error": Shown(
        "centre error", "root mean square distance of camera centres under the alignment that the clouds have"
    ),
    "point_error": Shown("point error", "mean distance of predicted to true points of the same pixels"),
    "accuracy": Shown("accuracy", "mean distance from predicted points to the nearest true one"),
    "completeness": Shown("completeness", "mean distance from true points to the nearest predicted one"),
    "chamfer": Shown("Chamfer", "mean of accuracy and completeness"),
    "f1": Shown(
        "F1",
        "harmonic mean of the shares of predicted and of true points that have one of the other cloud within the "
        "threshold",
        decimals=3,
        better=1,
    ),
    "seconds": Shown("seconds", "wall time of one forward", decimals=3),
}
"""By metric, in the order of columns."""


@dataclass(frozen=True)
class Look:
    """How the line of one arm is drawn."""

    colour: str
    marker: str
    line: str = "-"


# The colours of Okabe and Ito, which people with any colour vision can tell apart; markers tell them apart in grey.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F"
DENSE = Look(BLACK, "", "--")
_KNOWN = {
    "dense": DENSE,
    "uniform": Look(BLUE, "o"),
    "hess": Look(VERMILION, "s"),
    "harm": Look(GREEN, "d"),
    "reverse": Look(GREEN, "v"),
    # Dashed over a solid line: where two arms do the same, both are seen.
    "equal": Look(SKY, "D", "--"),
    "uncapped": Look(ORANGE, "^", "--"),
    "random": Look(GREY, "X"),
    "michel": Look(PURPLE, "P", ":"),
    "kwon": Look("#8C510A", "p", ":"),
    "kwon-tuned": Look("#8C510A", "*", "-."),
}
_COLOURS, _MARKERS = (ORANGE, SKY, GREEN, PURPLE, BLACK, GREY, "#8C510A"), "<>^Dhp*XP"


def looks(arms: Iterable[str]) -> dict[str, Look]:
    """One look for each arm: its own for those that are always called the same, the others in turn."""
    names = list(dict.fromkeys(arms))
    others = [name for name in names if name not in _KNOWN]
    turns = {
        name: Look(_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)], "-" if i < len(_COLOURS) else "--")
        for i, name in enumerate(others)
    }
    return {name: _KNOWN.get(name) or turns[name] for name in names}
