"""Which numbers of views to time: doubled, then halved in between until the break-even is found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hess_plugin.break_even import BreakEven, Timing, smallest_paying

from .timing import TooLarge

Measure = Callable[[int], Timing]


@dataclass(frozen=True)
class Sizes:
    """The sizes that were timed.

    Attributes:
        timings: by increasing number of views.
        stopped: why larger sizes were not tried; None if all were.
    """

    timings: tuple[Timing, ...]
    stopped: str | None

    @property
    def contradicting(self) -> list[Timing]:
        """Sizes that pay below one that does not: by chance, or because longer is not always better here."""
        smallest = smallest_paying(self.timings)
        return [one for one in self.timings if one.pays and (smallest is None or one.views < smallest.views)]


def doubled(smallest: int, largest: int) -> list[int]:
    """Numbers of views from `smallest` up, each twice the one before, and `largest` itself."""
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= 2
    return [*sizes, largest]


def time_sizes(measure: Measure, sizes: Iterable[int]) -> Sizes:
    """Time sizes by increasing number of views, up to the first that is too large.

    Raises:
        TooLarge: the first one is.
    """
    timings: list[Timing] = []
    for views in sorted(set(sizes)):
        try:
            timings.append(measure(views))
        except TooLarge as error:
            if not timings:
                raise TooLarge(f"{error}, so nothing could be timed; give fewer views or more time.") from error
            return Sizes(tuple(timings), str(error))
    return Sizes(tuple(timings), None)


def find_break_even(measure: Measure, smallest: int, largest: int) -> Sizes:
    """Find the number of views from which patching pays.

    Every doubled size is timed, since one that pays says nothing of larger ones; then the gap below the smallest
    size from which all pay is halved until it is closed. Whatever chance does to a timing, the answer, which is
    `smallest_paying` of the result, is never a size above which a timed one did not pay; chance can make it too large.

    Args:
        measure: times one number of views.
        smallest: views to begin with.
        largest: views to end with.

    Raises:
        TooLarge: not even the smallest size can be timed.
    """
    coarse = time_sizes(measure, doubled(smallest, largest))
    found = {timing.views: timing for timing in coarse.timings}
    stopped = coarse.stopped
    pays = smallest_paying(coarse.timings)
    below = [views for views in found if pays is not None and views < pays.views]
    if pays is None or not below:
        return coarse
    low, high = max(below), pays.views
    while high - low > 1:
        middle = (low + high) // 2
        try:
            found[middle] = measure(middle)
        except TooLarge:
            break  # a larger size went through before: the machine is short of time or memory just now
        low, high = (low, middle) if found[middle].pays else (middle, high)
    return Sizes(tuple(found[views] for views in sorted(found)), stopped)


def timing_table(timings: Sequence[Timing]) -> str:
    """Format timings as plain text, one size a line; memory only where it was measured."""
    memory = any(one.dense_bytes is not None for one in timings)
    rows = [["views", "patch tokens", "sparsity", "dense, s", "patched, s", "ratio", "interval", "pays"]]
    rows[0] += ["dense, GB", "patched, GB"] if memory else []
    for one in timings:
        cells = [str(one.views), str(one.tokens), f"{one.sparsity:.3f}", f"{one.dense:.4g}", f"{one.patched:.4g}"]
        cells += [f"{one.ratio:.3f}", f"{one.low:.3f} to {one.high:.3f}", "yes" if one.pays else "no"]
        if memory:
            cells += [f"{(used or 0) / 1e9:.2f}" for used in (one.dense_bytes, one.patched_bytes)]
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def conclusion(entry: BreakEven, sizes: Sizes) -> str:
    """Tell the break-even in a sentence, and in a second one where sizes contradict each other."""
    smallest, largest = entry.smallest, entry.largest
    if smallest is None:
        text = (
            f"Patching does not pay here up to {largest.views} views ({largest.tokens} patch tokens), the largest size "
            "tried; of larger ones nothing is known."
        )
    elif entry.dense_below == 0:
        text = (
            f"Patching pays here at every size tried, from {smallest.views} views ({smallest.tokens} patch tokens) to "
            f"{largest.views}."
        )
    else:
        text = (
            f"Patching pays here from {smallest.views} views ({smallest.tokens} patch tokens) on, tried up to "
            f"{largest.views}."
        )
    if sizes.contradicting:
        odd = ", ".join(str(one.views) for one in sizes.contradicting)
        text += f" It also paid at {odd} views but not at a larger size, so more --repeats may move the answer."
    return text
