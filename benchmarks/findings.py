"""Judges the paper's findings by sweeps: which hold on the model that was swept, with paired differences.

    python benchmarks/findings.py SWEEP [SWEEP ...] --swap NAME OWN OTHER --write benchmarks/results/findings.md

SWEEP are folders of `hess-patch sweep ... --ablations` with the default arms. --swap, which may be repeated, names a
scene family and two sweeps on its scenes, with the profile of the family itself and with one of another family.

Every difference is paired by scene, mean ± standard error. A finding "holds" in a row where the difference is on its
side by more than 3 standard errors, "fails" where it is on the other side by more than 3, and is "open" in between: so
many differences are looked at that two standard errors would be exceeded by chance alone.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hess_plugin.evaluation.statistics import paired
from hess_plugin.evaluation.sweep import Cell
from hess_plugin.evaluation.sweep_folder import SweepFolder
from hess_plugin.files import write_bytes
from hess_plugin.profiles import Profile
from hess_plugin.scoring import head_scores

SURE = 3.0
SLACK = 0.0025
METRICS = (("auc30", "AUC@30", 100.0, 2, 1), ("point_error", "point error x 1000", 1000.0, 2, -1))
"""Field, heading, factor, decimals, and the sign of better."""


@dataclass(frozen=True)
class Claim:
    """A finding of the paper as a comparison: `better` beats `worse` in rows between two sparsities."""

    title: str
    better: str
    worse: Sequence[str]
    above: float = 0.0
    up_to: float = 1.0


CLAIMS = (
    Claim("HeSS beats uniform budgets above sparsity .5", "hess", ("uniform", "equal"), above=0.5),
    Claim("... and at or below .5", "hess", ("uniform", "equal"), up_to=0.5),
    Claim("Reversed HeSS collapses", "uniform", ("reverse",)),
    Claim("The right heads, not unequal budgets: shuffled scores are worse", "hess", ("random",)),
    Claim("... and worse than uniform budgets", "uniform", ("random",)),
    Claim("Not in the paper: the CDF rule's own count for each row beats an even one", "uniform", ("equal",)),
    Claim("Both errors are needed (the profile's lambda beats 0 and 1)", "hess", ("hess camera 0", "hess camera 1")),
    Claim("W_Q is best", "hess", ("hess W_K", "hess W_V")),
    Claim("Capping is needed", "hess", ("uncapped",)),
    Claim("Sum normalisation is best", "hess", ("hess raw", "hess linear", "hess softmax", "hess log")),
    Claim("Pruning whole heads is far worse", "uniform", ("michel", "kwon", "kwon-tuned")),
)


def main() -> None:
    """Print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", type=Path)
    parser.add_argument("--swap", nargs=3, action="append", default=[], metavar=("NAME", "OWN", "OTHER"))
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    parts = ["# Findings of the paper on the swept model", "", __doc__.split("\n\n")[-1].replace("\n", " ").strip(), ""]
    for path in args.sweeps:
        folder = SweepFolder.load(path)
        parts += [_head(folder), "", *heads(Profile.load(path / "profile.hess")), ""]
        for claim in CLAIMS:
            parts += [*judged(claim, folder.cells()), ""]
    if args.swap:
        parts += ["## Profiles of another family of scenes", ""]
        for name, own, other in args.swap:
            parts += [*swapped(name, SweepFolder.load(Path(own)), SweepFolder.load(Path(other))), ""]
    text = "\n".join(parts)
    print(text)
    if args.write:
        write_bytes(args.write, text.encode())


def _head(folder: SweepFolder) -> str:
    plan, about = folder.plan, folder.about
    return (
        f"## {plan['model']}, {len(plan['scenes'])} scenes of {plan['data']}\n\nBlocks {plan['block_q']} x "
        f"{plan['block_k']}, at most {plan['max_points']} points of a cloud, aligned by {plan['alignment_asked']}; "
        f"{about['machine']}, hess-plugin {about['hess_plugin']}, {about['date']}.\nCommand: `{about['command']}`"
    )


def heads(profile: Profile) -> list[str]:
    """How unequal the heads of each layer are."""
    scores = head_scores(profile)
    effective = (-(scores * scores.clamp(min=1e-300).log()).sum(1)).exp()
    ratio = scores.amax(1) / scores.amin(1)
    return [
        "### Heads differ in sensitivity",
        "",
        "| layer | largest / smallest score | effective heads (exp of entropy) |",
        "|---|---|---|",
        *(
            f"| {layer} | {r:.1f} | {e:.2f} of {profile.num_heads} |"
            for layer, (r, e) in enumerate(zip(ratio.tolist(), effective.tolist(), strict=True))
        ),
    ]


def judged(claim: Claim, cells: Sequence[Cell]) -> list[str]:
    """One claim: a line for each row and each arm that it says is worse."""
    by_key = {(cell.row.label, cell.arm.name): cell for cell in cells}
    headings = ["row", "sparsity", "difference", *(part for _, heading, *_ in METRICS for part in (heading, ""))]
    lines = [f"### {claim.title}", "", f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    tally: dict[str, int] = {}
    for row in dict.fromkeys(cell.row.label for cell in cells if not cell.arm.dense):
        better = by_key.get((row, claim.better))
        # A row of .5 is measured as .4999 or .5001.
        if better is None or not claim.above + SLACK < better.sparsity <= claim.up_to + SLACK:
            continue
        for worse in (by_key[row, name] for name in claim.worse if (row, name) in by_key):
            what = f"{claim.better} - {worse.arm.name}" + ("" if worse.matched else f" (at {worse.sparsity:.3f})")
            lines.append(
                f"| {row} | {better.sparsity:.3f} | {what} | {' | '.join(_judged_row(better, worse, tally))} |"
            )
    counts = ", ".join(f"{tally.get(word, 0)} {word}" for word in ("hold", "open", "fail"))
    return [*lines, "", f"Differences that {counts}." if tally else "Not swept."]


def _judged_row(better: Cell, worse: Cell, tally: dict[str, int]) -> list[str]:
    difference, cells = paired(better.measurements, worse.measurements), []
    for metric, _, factor, decimals, sign in METRICS:
        mean, error = difference.mean[metric] * factor, difference.error[metric] * factor
        word = _word(sign * mean, error)
        tally[word] = tally.get(word, 0) + 1
        cells += [f"{mean:+.{decimals}f} ± {error:.{decimals}f}", word]
    return cells


def _word(gain: float, error: float) -> str:
    if math.isnan(gain) or math.isnan(error) or abs(gain) <= SURE * error:  # one scene has no error
        return "open"
    return "hold" if gain > 0 else "fail"


def swapped(name: str, own: SweepFolder, other: SweepFolder) -> list[str]:
    """The profile of another family against that of the scenes' own, and both against uniform."""
    lines = [
        f"### {name}: {own.plan['data']}",
        "",
        f"Own profile: `{own.about['command']}`; the other: `{other.about['command']}`",
        "",
        "| row | metric | own - uniform | other - uniform | other - own |",
        "|---|---|---|---|---|",
    ]
    cells = [{(c.row.label, c.arm.name): c for c in folder.cells()} for folder in (own, other)]
    for row in dict.fromkeys(row for row, arm in cells[0] if arm == "hess"):
        mine, theirs = (found[row, "hess"] for found in cells)
        uniform = [found[row, "uniform"] for found in cells]
        pairs = [(mine, uniform[0]), (theirs, uniform[1]), (theirs, mine)]
        for metric, heading, factor, decimals, _ in METRICS:
            differences = [paired(a.measurements, b.measurements) for a, b in pairs]
            shown = [
                f"{d.mean[metric] * factor:+.{decimals}f} ± {d.error[metric] * factor:.{decimals}f}"
                for d in differences
            ]
            lines.append(f"| {row} | {heading} | {' | '.join(shown)} |")
    return lines


if __name__ == "__main__":
    main()
