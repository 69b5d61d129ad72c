"""Pickling models that a patch has changed: refused, or as if they had not been changed."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn

from .exceptions import PatchError


class Unpicklable:
    """What a patch leaves in a model: refuses to be pickled, in a sentence that says what to do instead."""

    __slots__ = ("left_out",)
    left_out: bool
    """Whether a file gets what `without` says instead; unset means that it does not."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        if getattr(self, "left_out", False):
            return self.without()
        raise PatchError(
            "a patched model cannot be pickled (torch.save, a spawned process): take model.state_dict(), which is that "
            "of the unpatched model, or call remove() on its patch first and patch again where it is loaded."
        )

    def without(self) -> tuple[Any, ...]:
        """What pickle is to make in its place, of things that every Python with the model's code has."""
        raise NotImplementedError


def own_forward(module: nn.Module) -> tuple[Any, ...]:
    """Have pickle make the forward of a module's class, bound to it.

    It is part of the module's state, so that the module has no state yet, and no forward of its own, when it is made.
    """
    return getattr, (module, "forward")


def no_hook() -> tuple[Any, ...]:
    """Have pickle make something that takes what a forward pre-hook is called with and returns None."""
    return getattr, (contextlib.nullcontext(), "__exit__")


def leave_out(model: nn.Module) -> None:
    """Let a patched model be pickled, as the unpatched one: for programs that know nothing of the patch."""
    for part in _parts(model):
        part.left_out = True


def is_left_out(model: nn.Module) -> bool:
    """Tell whether a patched model was patched for a program that knows nothing of it."""
    return all(getattr(part, "left_out", False) for part in _parts(model))


def _parts(model: nn.Module) -> list[Unpicklable]:
    """What patches left in a model."""
    values = [v for m in model.modules() for v in (*vars(m).values(), *m._forward_pre_hooks.values())]
    return [value for value in values if isinstance(value, Unpicklable)]
