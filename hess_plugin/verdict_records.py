"""A verification as JSON types: written, and read back with every field checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

from .exceptions import ProfileError
from .scoring import Scoring
from .verification import Difference, Verification


def to_dict(verification: Verification) -> dict[str, Any]:
    """Return a verification as JSON types, with what follows from its numbers spelt out for readers of the file."""
    record = {field.name: getattr(verification, field.name) for field in fields(verification)}
    differences = {}
    for metric, difference in verification.differences.items():
        low, high = verification.interval(metric)
        values = {**asdict(difference), "low": low, "high": high, "level": verification.level}
        differences[metric] = {name: _known(value) for name, value in values.items()}
    return record | {
        "measured": dict(verification.measured),
        "scoring": asdict(verification.scoring),
        "views": list(verification.views),
        "means": {arm: {m: _known(v) for m, v in means.items()} for arm, means in verification.means.items()},
        "differences": differences,
        "versions": dict(verification.versions),
        "outcome": verification.outcome,
        "text": verification.text,
    }


def from_dict(record: object) -> Verification:
    """Read what `to_dict` returned.

    Raises:
        ProfileError: a field is missing or damaged.
    """
    values: dict[str, Any] = {}
    name = "type"
    try:
        if not isinstance(record, dict):
            raise TypeError(f"{type(record).__name__}, wanted a table")
        for name, read in _READERS.items():
            if name in record or name not in _LATER:  # where it is missing it has its default
                values[name] = read(record[name])
        name = "numbers"
        # Outcome and text are there for other readers: here they follow from the numbers, by the rule of today.
        found = Verification(**values)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, ProfileError) as error:
        raise ProfileError(
            f"a verdict in the profile is damaged ({name}: {error}); run `hess-patch verify` again, which replaces it, "
            "or patch with verdict='ignore'."
        ) from error
    return found


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value  # JSON has no NaN


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r}, wanted a number")
    return float(value)


def _optional(value: object) -> float:
    return math.nan if value is None else _number(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r}, wanted text")
    return value


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r}, wanted a whole number")
    return value


def _difference(value: Mapping[str, Any]) -> Difference:
    return Difference(_optional(value["mean"]), _optional(value["error"]), _whole(value["scenes"]))


_READERS: dict[str, Callable[[Any], Any]] = {
    "sparsity": _number,
    "measured": lambda value: {arm: _number(share) for arm, share in value.items()},
    "scoring": lambda value: Scoring(**value),
    "block_q": _whole,
    "block_k": _whole,
    "scenes": _whole,
    "views": lambda value: tuple(_whole(count) for count in value),
    "data": _text,
    "means": lambda value: {arm: {m: _optional(v) for m, v in means.items()} for arm, means in value.items()},
    "differences": lambda value: {metric: _difference(each) for metric, each in value.items()},
    "traces": _text,
    "fingerprint": _text,
    "machine": _text,
    "versions": lambda value: {name: _text(version) for name, version in value.items()},
    "date": _text,
    "allocation": _text,
    "selection": _text,
    "harm": lambda value: None if value is None else _text(value),
}
_LATER = ("allocation", "selection", "harm")
"""Not in the records of the first versions, which knew budgets by score alone, and blocks chosen by mass."""
