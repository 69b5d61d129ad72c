"""Answering the one attention call of a module, leaving its forward, its class and its state alone."""

from __future__ import annotations

import copy
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .exceptions import PatchError
from .pickling import Unpicklable, no_hook, own_forward
from .sites import Site
from .uncompiled import Uncompiled, is_traced

SDPA = torch.nn.functional.scaled_dot_product_attention


class _AnswerAttention(TorchFunctionMode):
    """Hand every ``scaled_dot_product_attention`` inside the context to `attend` and count them.

    A function mode sees the call however the module got hold of the function (``F.scaled_dot...`` or a
    ``from`` import), and is off again while `attend` itself runs.
    """

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is SDPA:
            self.calls += 1
            return self.attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Forward(Uncompiled, Unpicklable):
    """What an intercepted module calls instead of its own forward: that forward, its attention call answered.

    An object and not a closure: a copy of the module needs one that runs the copy. It is a part of the module, so it
    knows it by a weak reference: a model that is dropped must go at once, not when cycles are looked for.
    """

    __slots__ = ("_module", "active", "attend", "before", "name", "spelled")
    reason = "hess_plugin chooses the blocks of this attention by their values"

    def __init__(
        self,
        module: nn.Module,
        name: str,
        attend: Callable[..., Tensor],
        before: Any,
        spelled: Callable[..., Any] | None = None,
    ) -> None:
        self._module = weakref.ref(module)
        self.name, self.attend, self.before, self.spelled = name, attend, before, spelled
        self.active = True  # False where another tool still holds this object after it was removed

    @property
    def module(self) -> nn.Module:
        """The module whose forward this is."""
        return alive(self._module)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The forward that is replaced, by which `inspect` finds the signature."""
        return types.MethodType(type(self.module).forward, self.module)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the module's class with its attention call answered."""
        module = self.module
        if not self.active:
            return type(module).forward(module, *args, **kwargs)
        with _AnswerAttention(self.attend) as mode:
            output = (self.spelled or type(module).forward)(module, *args, **kwargs)
        if mode.calls != 1:
            error = PatchError(
                f"{self.name} ({type(module).__name__}) called scaled_dot_product_attention {mode.calls} times in one "
                "forward, wanted exactly one; its adapter must implement hess_replace_attention."
            )
            if not taken(self.attend, error):
                raise error
            # Without a call the output is the module's own; with several, blocks may have been left out of any.
            return output if mode.calls == 0 else type(module).forward(module, *args, **kwargs)
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> _Forward:
        # `attend` is shared: a copy of a patched model counts in the same report.
        module, before = copy.deepcopy(self.module, memo), copy.deepcopy(self.before, memo)
        twin = _Forward(module, self.name, self.attend, before, self.spelled)
        twin.active, twin.left_out = self.active, getattr(self, "left_out", False)
        return twin

    def without(self) -> tuple[Any, ...]:
        """The forward of the module's class."""
        return own_forward(self.module)


class LayoutHook(Uncompiled, Unpicklable):
    """The pre-hook by which a patch learns the token layout of every forward.

    Args:
        model: which the adapter is asked about.
        see: called as ``see(model, args, kwargs)``; may have an attribute `unfit`, see `taken`.
    """

    __slots__ = ("_model", "see")
    reason = "hess_plugin reads the token layout of a forward"

    def __init__(self, model: nn.Module, see: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], None]) -> None:
        self._model, self.see = weakref.ref(model), see

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note the layout of the forward that starts."""
        if getattr(module, "_is_replica", False):
            self._leave_replica(module)
        elif not is_traced():  # numbers that only a tracer knows must not be kept for later forwards
            try:
                self.see(alive(self._model), args, kwargs)
            except Exception as error:
                if not taken(self.see, error):
                    raise

    def _leave_replica(self, module: nn.Module) -> None:
        error = PatchError(
            "nn.DataParallel runs copies of the model that share the forwards of the original, which a patch "
            "replaces; use DistributedDataParallel, one process a device."
        )
        if not taken(self.see, error):
            raise error
        for part in module.modules():  # their own attributes, and made anew for every forward
            for name in [name for name, value in vars(part).items() if isinstance(value, Unpicklable)]:
                del vars(part)[name]

    def __deepcopy__(self, memo: dict[int, Any]) -> LayoutHook:
        model = self._model()
        twin = LayoutHook(memo.get(id(model), model) if model is not None else nn.Identity(), self.see)
        if hasattr(self, "left_out"):
            twin.left_out = self.left_out
        return twin

    def without(self) -> tuple[Any, ...]:
        """A hook that does nothing: pickle cannot take an entry out of a module's hooks."""
        return no_hook()


def taken(answering: Callable[..., Any], error: Exception) -> bool:
    """Tell whether a patch takes note of an error and lets the model go on as if it were not patched.

    Args:
        answering: a function of the patch; its attribute `unfit`, if it has one, is called with the sentence.
        error: that the patch would raise.
    """
    note = getattr(answering, "unfit", None)
    if note is not None:
        note(" ".join(str(error).split()))
    return note is not None


def alive(reference: weakref.ref[nn.Module]) -> nn.Module:
    """The module that is meant.

    Raises:
        PatchError: it was dropped, and something else kept a forward of it.
    """
    module = reference()
    if module is None:
        raise PatchError("this forward is of a patched model that no longer exists; keep the model, or patch it anew.")
    return module


class Interception:
    """The undo of one intercepted module."""

    def __init__(self, module: nn.Module, forward: _Forward) -> None:
        self._module, self._forward = module, forward

    def remove(self) -> None:
        """Give the module its own forward back; does nothing if that was done already, by whomever."""
        self._forward.active = False
        # A later patch of the same module is not this one's to undo.
        if any(value is self._forward for value in vars(self._module).values()):
            restore(self._module)


def intercept(site: Site, attend: Callable[..., Tensor], forward: Callable[..., Any] | None = None) -> Interception:
    """Replace the forward of the site's module by one that runs its own with the attention call answered.

    Args:
        site: the site; its module's class forward must call ``scaled_dot_product_attention`` once.
        attend: called as ``attend(query, key, value, ...)``, with that function's signature.
        forward: runs in place of the class's own as ``forward(module, ...)``, for a module that spells attention out:
            the same, but with one call of ``scaled_dot_product_attention``. A function of a module, so that a copy of
            the patched model can run it.

    Raises:
        PatchError: now, if the module's forward is already replaced; when called, if the number of attention
            calls was not one.
    """
    module, name = site.module, site.name
    place = forward_place(module)
    before = vars(module).get(place)
    if is_intercepted(module) or not (before is None or is_own_forward(module, before)):
        owner = "hess_plugin" if is_intercepted(module) else "another tool"
        raise PatchError(f"{name}.forward is already replaced by {owner}; undo that before patching.")
    if forward is None and getattr(module, "fused_attn", True) is False:
        raise PatchError(f"{name} has fused_attn=False and spells attention out; set {name}.fused_attn = True first.")
    held = _Forward(module, name, attend, before, forward)
    vars(module)[place] = held
    return Interception(module, held)


def forward_place(module: nn.Module) -> str:
    """Where the module keeps the forward to replace: beneath the hook of accelerate, if it has one.

    Accelerate replaces the forward of modules that it moves about, and puts back what it kept when it goes.
    """
    return "_old_forward" if {"_hf_hook", "_old_forward"} <= vars(module).keys() else "forward"


def is_own_forward(module: nn.Module, forward: Any) -> bool:
    """Tell whether this is the class's forward bound to the module, which accelerate leaves behind."""
    return getattr(forward, "__self__", None) is module and forward.__func__ is getattr(type(module), "forward", None)


def is_intercepted(module: nn.Module) -> bool:
    """Tell whether `intercept` replaced this module's forward (also true for a deepcopy of such a module)."""
    return any(isinstance(value, _Forward) for value in vars(module).values())


def is_patched(model: nn.Module) -> bool:
    """Tell whether a model carries a patch, also one whose adapter replaced attention in its own way."""
    return any(
        is_intercepted(module) or any(isinstance(hook, LayoutHook) for hook in module._forward_pre_hooks.values())
        for module in model.modules()
    )


def restore(module: nn.Module) -> bool:
    """Undo `intercept` on one module, wherever it was patched; tell whether there was anything to undo."""
    held = {place: value for place, value in vars(module).items() if isinstance(value, _Forward)}
    for place, forward in held.items():
        forward.active = False  # a tool that wrapped it may hold it elsewhere too
        if place == "forward" and forward.before is None:
            del vars(module)[place]
        else:  # in the hands of a tool that will put it back as the forward
            vars(module)[place] = forward.before or types.MethodType(type(module).forward, module)
    return bool(held)
