"""From which number of tokens on patching pays on a machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from .exceptions import ProfileError
from .json_fields import COUNT, COUNT_OR_NULL, LIST, POSITIVE, SHARE, TEXT, TEXT_OR_NULL, TEXTS, Check, checked

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Timing:
    """One number of views, dense and patched side by side.

    Attributes:
        views: images of the forward.
        tokens: patch tokens of all views together, which is what decides.
        sparsity: measured in the patched calls; 0 where there are too few blocks to drop any.
        dense: median seconds of the unpatched call.
        patched: median seconds of the patched call, selection included.
        ratio: median over repeats of patched / dense seconds of the same repeat.
        low: lower end of the sign test's interval of that median.
        high: its upper end.
        repeats: pairs of calls behind it.
        dense_bytes: most memory alive during a dense call, on a GPU; else None.
        patched_bytes: the same of a patched call.
    """

    views: int
    tokens: int
    sparsity: float
    dense: float
    patched: float
    ratio: float
    low: float
    high: float
    repeats: int
    dense_bytes: int | None = None
    patched_bytes: int | None = None

    @property
    def pays(self) -> bool:
        """Whether patching is faster beyond chance: blocks were dropped and the whole interval lies below 1."""
        return self.sparsity > 0.0 and self.high < 1.0


@dataclass(frozen=True)
class Conditions:
    """What a break-even depends on, besides the model and the sparsity; one of other conditions is not used.

    Attributes:
        machine: `hess_plugin.machine.machine_key` of the device.
        dtype: of the weights, for example ``float32``.
        autocast: type of the autocast around the forward, or None.
        backend: name of the attention backend, resolved.
        block_q: patch queries in a block.
        block_k: patch keys in a block.
        selection: how blocks were chosen, `Settings.selection`.
    """

    machine: str
    dtype: str
    autocast: str | None
    backend: str
    block_q: int
    block_k: int
    selection: str = "mass"

    @classmethod
    def of(
        cls,
        device: torch.device,
        dtype: torch.dtype,
        backend: str,
        block_q: int,
        block_k: int,
        autocast: torch.dtype | None = None,
        selection: str = "mass",
    ) -> Conditions:
        """Name the conditions of a model on a device."""
        from .machine import machine_key

        under = None if autocast is None else _name(autocast)
        return cls(machine_key(device), _name(dtype), under, backend, block_q, block_k, selection)

    @property
    def blocks(self) -> str:
        """Size of the blocks and, unless as published, how they are chosen, in words."""
        chosen = "" if self.selection == "mass" else f" chosen by {self.selection}"
        return f"blocks {self.block_q} x {self.block_k}{chosen}"


@dataclass(frozen=True)
class BreakEven:
    """What one search for the break-even found.

    Attributes:
        conditions: what it holds for.
        sparsity: asked for.
        allocation: how the budgets were divided while timing.
        height: rows of an image, pixels.
        width: columns of an image, pixels.
        timings: every size tried, by increasing tokens.
        versions: of what decides the time.
        date: ISO date.

    Raises:
        ProfileError: no timings, or not by increasing tokens.
    """

    conditions: Conditions
    sparsity: float
    allocation: str
    height: int
    width: int
    timings: tuple[Timing, ...]
    versions: Mapping[str, str]
    date: str

    def __post_init__(self) -> None:
        tokens = [timing.tokens for timing in self.timings]
        if not tokens or tokens != sorted(set(tokens)):
            raise ProfileError(f"a break-even needs timings of increasing sizes; patch tokens of these are {tokens}.")

    @property
    def smallest(self) -> Timing | None:
        """The smallest size such that it and every larger one tried pays; None if the largest does not."""
        return smallest_paying(self.timings)

    @property
    def largest(self) -> Timing:
        """The largest size tried."""
        return self.timings[-1]

    @property
    def dense_below(self) -> int:
        """Patch tokens below which the dense path is the faster one, as far as that is known; 0 if it nowhere is.

        Where patching never paid that is everything up to the largest size tried; of larger ones nothing is known.
        Likewise nothing is known below the smallest size tried, if that one pays.
        """
        smallest = self.smallest
        if smallest is None:
            return self.largest.tokens + 1
        return 0 if smallest is self.timings[0] else smallest.tokens

    def describe(self) -> str:
        """Tell everything on one line."""
        c, smallest = self.conditions, self.smallest
        found = f"never up to {_size(self.largest)}"
        if smallest is not None:
            found = f"from {_size(smallest)} on, tried {self.timings[0].views} to {self.largest.views} views"
        return (
            f"{found}, of {self.height} x {self.width} px; {c.machine}, {c.dtype}, autocast {c.autocast or 'none'}, "
            f"backend {c.backend}, sparsity {self.sparsity:g} ({self.allocation}), {c.blocks}, {self.date}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON types: what is stored, with the answer beside the timings it follows from."""
        data = asdict(self)
        smallest = self.smallest
        return {
            **data.pop("conditions"),
            **data,
            "timings": list(data["timings"]),
            "versions": dict(self.versions),
            "tokens": None if smallest is None else smallest.tokens,
            "views": None if smallest is None else smallest.views,
            "largest_tokens": self.largest.tokens,
        }

    @classmethod
    def from_json(cls, data: object) -> BreakEven:
        """Read what `to_json` gave.

        Raises:
            ProfileError: a field is missing, of another type, out of range, or contradicts the timings.
        """
        if isinstance(data, dict):  # records of before there was a choice
            data = {"selection": "mass", **data}
        record = checked(data, _RECORD, "")
        raw = record["timings"]
        timings = tuple(Timing(**checked(one, _TIMING, f"timings[{i}].")) for i, one in enumerate(raw))
        conditions = Conditions(**{f.name: record[f.name] for f in fields(Conditions)})
        others = {f.name: record[f.name] for f in fields(cls) if f.name not in ("conditions", "timings")}
        found = cls(conditions, timings=timings, **others)
        for name, value in found.to_json().items():
            if name in ("tokens", "views", "largest_tokens") and record[name] != value:
                raise ProfileError(f"{name!r} is {record[name]!r}, but the timings say {value!r}.")
        return found


def smallest_paying(timings: Sequence[Timing]) -> Timing | None:
    """The smallest of the sizes, given in increasing order, such that it and every larger one pays."""
    found = None
    for timing in reversed(timings):
        if not timing.pays:
            break
        found = timing
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(timing: Timing) -> str:
    return f"{timing.views} views ({timing.tokens} patch tokens)"


_TIMING: dict[str, Check] = {
    **dict.fromkeys(("views", "tokens", "repeats"), COUNT),
    **dict.fromkeys(("dense", "patched", "ratio", "low", "high"), POSITIVE),
    **dict.fromkeys(("dense_bytes", "patched_bytes"), COUNT_OR_NULL),
    "sparsity": SHARE,
}
_RECORD: dict[str, Check] = {
    **dict.fromkeys(("machine", "dtype", "backend", "allocation", "selection"), TEXT),
    **dict.fromkeys(("block_q", "block_k", "height", "width", "largest_tokens"), COUNT),
    **dict.fromkeys(("tokens", "views"), COUNT_OR_NULL),
    "autocast": TEXT_OR_NULL,
    "sparsity": SHARE,
    "timings": LIST,
    "versions": TEXTS,
    "date": TEXT,
}
