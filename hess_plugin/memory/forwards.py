"""Replacing the forward of one module for inference in little memory, and giving it back."""

from __future__ import annotations

import copy
import functools
import logging
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hess_plugin.interception import alive, forward_place, is_own_forward
from hess_plugin.pickling import Unpicklable, own_forward

Forward = Callable[..., Any]
Run = Callable[[nn.Module, Forward, tuple[Any, ...], dict[str, Any]], Any]

log = logging.getLogger(__name__)


class LeanForward(Unpicklable):
    """What a module calls instead of its own forward; a copy of the module has one of its own, which runs the copy.

    While gradients are recorded or the module is in training mode it is the module's own forward: recording keeps
    what would be saved, and whatever is drawn at random would be drawn otherwise.
    """

    __slots__ = ("_module", "active", "before", "run")

    def __init__(self, module: nn.Module, run: Run, before: Any) -> None:
        self._module = weakref.ref(module)  # of which this is a part
        self.run, self.before = run, before
        self.active = True  # False where another tool still holds this object after it was removed

    @property
    def module(self) -> nn.Module:
        """The module whose forward this is."""
        return alive(self._module)

    @property
    def __wrapped__(self) -> Forward:
        """The forward that is replaced, by which `inspect` finds the signature."""
        return types.MethodType(type(self.module).forward, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        own = functools.partial(type(self.module).forward, self.module)
        if not self.active or self.module.training or torch.is_grad_enabled():
            return own(*args, **kwargs)
        return self.run(self.module, own, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> LeanForward:
        twin = LeanForward(copy.deepcopy(self.module, memo), self.run, copy.deepcopy(self.before, memo))
        twin.active, twin.left_out = self.active, getattr(self, "left_out", False)
        return twin

    def without(self) -> tuple[Any, ...]:
        """The forward of the module's class."""
        return own_forward(self.module)


def replace_forward(module: nn.Module, run: Run) -> Callable[[], None] | None:
    """Let a module call `run(module, own forward, args, kwargs)`.

    Args:
        module: left alone if its forward was replaced already, by whomever.
        run: holds no module: a copy of the model shares it.

    Returns:
        The undo, or None where the module was left alone.
    """
    place = forward_place(module)
    before = vars(module).get(place)
    if before is not None and not is_own_forward(module, before):
        return None
    forward = LeanForward(module, run, before)
    vars(module)[place] = forward

    def undo() -> None:
        forward.active = False
        if any(value is forward for value in vars(module).values()):
            restore_lean(module)

    return undo


def restore_lean(module: nn.Module) -> None:
    """Undo `replace_forward` on one module, also on a copy of it."""
    for place, forward in [(p, v) for p, v in vars(module).items() if isinstance(v, LeanForward)]:
        forward.active = False
        if place == "forward" and forward.before is None:
            del vars(module)[place]
        else:  # in the hands of a tool that will put it back as the forward
            vars(module)[place] = forward.before or types.MethodType(type(module).forward, module)
