"""The handles of a model that was changed: what gives it back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict
from types import TracebackType
from typing import TypeVar

from .attention import SiteAttention
from .place import Place
from .report import PatchReport
from .scoring import Scoring

Self = TypeVar("Self", bound="Handle")


class Handle:
    """Gives a model back exactly as it was: by `remove`, any number of times, or as a context manager."""

    def __init__(self) -> None:
        self._undo = contextlib.ExitStack()
        self._active = True

    @property
    def active(self) -> bool:
        """Whether the model is still changed by this handle."""
        return self._active

    def remove(self) -> None:
        """Undo the change; a second call does nothing."""
        self._active = False
        self._undo.close()

    def release(self, undo: Callable[[], None]) -> None:
        """Keep the model in memory no longer; the change stays.

        Args:
            undo: called by `remove` instead; must not keep the model in memory.
        """
        self._undo.pop_all()
        self._undo.callback(undo)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class Patch(Handle):
    """The handle of one patched model: a context manager, a report and the undo.

    Made by `patch`. `remove` gives the model back exactly as it was; it may be called any number of times.

    Attributes:
        measures: what ``memory="lean"`` changed, in words; empty without.
    """

    measures: tuple[str, ...] = ()

    def __init__(
        self,
        attentions: list[SiteAttention],
        place: Place,
        scoring: Scoring | None,
        stepped_aside: str | None = None,
    ) -> None:
        super().__init__()
        self._tallies = [attention.tally for attention in attentions]
        self._place = place
        self._scoring = scoring
        self._stepped_aside = stepped_aside

    def report(self) -> PatchReport:
        """Report measured sparsity by site and head, the backend and seconds, since `patch`."""
        settings = {k: v for k, v in asdict(self._place.settings).items() if k not in ("backend", "allocation")}
        settings |= {} if self._scoring is None else asdict(self._scoring)
        settings |= {} if self._stepped_aside is None else {"stepped_aside": self._stepped_aside}
        sites = tuple(tally.report() for tally in self._tallies)
        return PatchReport(sites, self._place.backend, self._place.settings.allocation, settings, self.measures)

    def was_called(self) -> bool:
        """Whether any site was reached since `patch`, or since `reset`."""
        return any(site.calls or site.unfit_calls for site in self.report().sites)

    def reset(self) -> None:
        """Forget, in a forked process, what its parent counted."""
        for tally in self._tallies:
            tally.reset()

    def __repr__(self) -> str:
        state = "active" if self._active else "removed"
        return f"<Patch of {len(self._tallies)} sites, allocation {self._place.settings.allocation}, {state}>"
