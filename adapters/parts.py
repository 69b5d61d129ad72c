"""Looking for parts of a model that may be anybody's: a property of a stranger's class may raise anything."""

from __future__ import annotations

from typing import Any


def has_parts(model: Any, *names: str) -> bool:
    """Whether a model, or a part of one, has all these attributes, also such as are None."""
    try:
        return all(hasattr(model, name) for name in names)
    except Exception:  # hasattr catches AttributeError alone
        return False


def part(model: Any, path: str) -> Any:
    """The part of a model at a dotted path; None where there is none."""
    for name in path.split(".") if path else ():
        try:
            model = getattr(model, name, None)
        except Exception:  # as above
            return None
    return model
