"""Checks of what a hook answered: the type, told in one sentence."""

from __future__ import annotations

from typing import Any, TypeVar

from .exceptions import AdapterError

T = TypeVar("T")


def checked(adapter: str, hook: str, answer: Any, kind: type[T], wanted: str | None = None) -> T:
    """Return the answer if it is of the kind wanted.

    Args:
        adapter: what messages call the adapter.
        hook: that was called.
        answer: what it returned.
        kind: class wanted.
        wanted: the kind in words; by default a class of `hess_plugin`.

    Raises:
        AdapterError: it is of another kind.
    """
    if not isinstance(answer, kind):
        raise wrong_answer(adapter, hook, answer, wanted or f"a hess_plugin.{kind.__name__}")
    return answer


def checked_list(adapter: str, hook: str, answer: Any, kind: type[T]) -> list[T]:
    """Return the answer as a list if it is one, or a tuple, of the kind wanted.

    Raises:
        AdapterError: it is something else, or an item is.
    """
    wanted = f"a list of hess_plugin.{kind.__name__}"
    if not isinstance(answer, list | tuple):
        raise wrong_answer(adapter, hook, answer, wanted)
    strange = [item for item in answer if not isinstance(item, kind)]
    if strange:
        raise wrong_answer(adapter, hook, strange[0], wanted, within="a list with ")
    return list(answer)


def wrong_answer(adapter: str, hook: str, answer: Any, wanted: str, within: str = "") -> AdapterError:
    """Make the error of an answer of the wrong type."""
    return AdapterError(f"{adapter} answered {hook} with {within}{_kind(answer)}, wanted {wanted}; repair the hook.")


def _kind(answer: Any) -> str:
    name = type(answer).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
