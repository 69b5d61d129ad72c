"""Checking a JSON object that was read back, field by field."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from .exceptions import ProfileError

Check = tuple[Callable[[Any], bool], str]
"""Whether a value is right, and what is wanted, in words."""


def checked(data: object, wanted: Mapping[str, Check], where: str = "") -> dict[str, Any]:
    """Check the fields of one JSON object.

    Args:
        data: what was read.
        wanted: what every field has to be.
        where: put before the names of fields, for example ``timings[0].``.

    Returns:
        The wanted fields; others, perhaps of a later version, are left out.

    Raises:
        ProfileError: names the first field that is missing or wrong.
    """
    if not isinstance(data, dict):
        raise ProfileError(f"{where.rstrip('.') or 'it'} is {data!r}, wanted a table.")
    for name, (is_right, kind) in wanted.items():
        if name not in data:
            raise ProfileError(f"{where}{name} is missing.")
        if not is_right(data[name]):
            raise ProfileError(f"{where}{name} is {data[name]!r}, wanted {kind}.")
    return {name: data[name] for name in wanted}


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_table_of_texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in [*value, *value.values()])


TEXT: Check = (_is_text, "text")
TEXT_OR_NULL: Check = (lambda value: value is None or _is_text(value), "text or null")
COUNT: Check = (_is_count, "a whole number of at least 1")
COUNT_OR_NULL: Check = (lambda value: value is None or _is_count(value), "a whole number of at least 1, or null")
POSITIVE: Check = (lambda value: _is_number(value) and 0.0 < value < math.inf, "a positive number")
SHARE: Check = (lambda value: _is_number(value) and 0.0 <= value < 1.0, "a number from 0 to below 1")
LIST: Check = (lambda value: isinstance(value, list), "a list")
TEXTS: Check = (_is_table_of_texts, "a table of texts")
