"""Answering the one attention call of a module, leaving its forward, its class and its state alone."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .exceptions import PatchError
from .sites import Site

SDPA = torch.nn.functional.scaled_dot_product_attention
_MARK = "_hess_plugin_intercepted"
LAYOUT_MARK = "_hess_plugin_layout"
"""Attribute of the pre-hooks by which a patch reads token layouts."""


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


class Interception:
    """The undo of one intercepted module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._forward = module.__dict__["forward"]

    def remove(self) -> None:
        """Give the module its own forward back; does nothing if that was done already, by whomever."""
        # A later patch of the same module is not this one's to undo.
        if self._module.__dict__.get("forward") is self._forward:
            restore(self._module)


def intercept(site: Site, attend: Callable[..., Tensor]) -> Interception:
    """Bind a forward to the site's module that runs its own forward with the attention call answered.

    Args:
        site: the site; its module's class forward must call ``scaled_dot_product_attention`` once.
        attend: called as ``attend(query, key, value, ...)``, with that function's signature.

    Raises:
        PatchError: now, if the module's forward is already replaced; when called, if the number of attention
            calls was not one.
    """
    module, name = site.module, site.name
    if "forward" in module.__dict__:
        owner = "hess_plugin" if is_intercepted(module) else "another tool"
        raise PatchError(f"{name}.forward is already replaced by {owner}; undo that before patching.")
    if getattr(module, "fused_attn", True) is False:
        raise PatchError(f"{name} has fused_attn=False and spells attention out; set {name}.fused_attn = True first.")

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # `type(self).forward`, not a captured bound method: after copy.deepcopy the latter would still
        # run the original module.
        with _AnswerAttention(attend) as mode:
            output = type(self).forward(self, *args, **kwargs)
        if mode.calls != 1:
            raise PatchError(
                f"{name} ({type(self).__name__}) called scaled_dot_product_attention {mode.calls} times in one "
                "forward, wanted exactly one; its adapter must implement hess_replace_attention."
            )
        return output

    setattr(forward, _MARK, True)
    module.forward = types.MethodType(forward, module)
    return Interception(module)


def is_intercepted(module: nn.Module) -> bool:
    """Tell whether `intercept` replaced this module's forward (also true for a deepcopy of such a module)."""
    forward = module.__dict__.get("forward")
    return hasattr(getattr(forward, "__func__", None), _MARK)


def is_patched(model: nn.Module) -> bool:
    """Tell whether a model carries a patch, also one whose adapter replaced attention in its own way."""
    return any(
        is_intercepted(module) or any(hasattr(hook, LAYOUT_MARK) for hook in module._forward_pre_hooks.values())
        for module in model.modules()
    )


def restore(module: nn.Module) -> bool:
    """Undo `intercept` on one module, wherever it was patched; tell whether there was anything to undo."""
    if is_intercepted(module):
        del module.__dict__["forward"]
        return True
    return False
