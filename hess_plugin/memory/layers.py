"""Leaving out the layer outputs that nothing reads, from outside the code that would make them.

The aggregator of VGGT (before May 2026) joins what the two blocks of every layer return and keeps all 24 results: most
of the memory of a long sequence. Its heads read four. The call that joins two tensors is answered with a placeholder
where the layer is not read; a layer is known by what goes into the call, the very memory that its two blocks returned.
"""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hess_plugin.adapting import JoinedLayers

from .forwards import Forward

_JOINS = (torch.cat, torch.concat, torch.concatenate)
_running: contextvars.ContextVar[nn.Module | None] = contextvars.ContextVar("hess_plugin_running", default=None)


def run_model(module: nn.Module, own: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a whole model: only inside of it is known what reads the layers. A `forwards.Run`."""
    before = _running.set(module)
    try:
        return own(*args, **kwargs)
    finally:
        _running.reset(before)


class Unread:
    """Runs the module that joins layers without making those that are not read; a `forwards.Run`.

    Called by the user instead of the whole model, the module gives back every layer. It is for models whose own forward
    hands the list to heads and keeps it to itself: one that returns it would return None for the layers left out.

    Args:
        layers: what the module joins, and what is read.
    """

    def __init__(self, layers: JoinedLayers) -> None:
        self.layers = layers

    def __call__(self, module: nn.Module, own: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's own forward; layers that are not read are None in the list it returns."""
        model = _running.get()
        if model is None or model.get_submodule(self.layers.module) is not module:
            return own(*args, **kwargs)
        outputs = _BlockOutputs()
        blocks = [list(model.get_submodule(name).children()) for name in self.layers.blocks]
        with outputs.noted(blocks), _SkipJoins(outputs, set(self.layers.read)) as skipping:
            result = own(*args, **kwargs)
        for part in result if isinstance(result, tuple) else (result,):
            if isinstance(part, list):
                part[:] = [None if any(one is p for p in skipping.placeholders) else one for one in part]
        return result


class _BlockOutputs:
    """Which memory holds the output of which block, for as long as it does."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int], tuple[weakref.ref[Any], int, int]] = {}

    @contextlib.contextmanager
    def noted(self, blocks: list[list[nn.Module]]) -> Iterator[None]:
        """Note what blocks return while the context lasts."""
        with contextlib.ExitStack() as undo:
            for side, modules in enumerate(blocks):
                for index, block in enumerate(modules):
                    undo.callback(block.register_forward_hook(self._noting(side, index)).remove)
            yield

    def _noting(self, side: int, index: int) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                storage = output.untyped_storage()
                # The address finds it; the reference tells whether it is that memory still.
                self._made[side, storage._cdata] = (weakref.ref(storage), index, output.numel())

        return note

    def layer(self, side: int, tensor: Any) -> int | None:
        """The layer whose block on that side returned this tensor, as a whole; None if none did."""
        if not isinstance(tensor, Tensor):
            return None
        storage = tensor.untyped_storage()
        made = self._made.get((side, storage._cdata))
        if made is None or made[0]() is not storage or made[2] != tensor.numel():
            return None
        return made[1]


class _SkipJoins(TorchFunctionMode):
    """Answers the joining of a layer that is not read with not-a-number, which takes no memory.

    Code that looks at the result on its way into the list still finds its shape; code that reads its values meets a
    number that no prediction survives.
    """

    def __init__(self, outputs: _BlockOutputs, read: set[int]) -> None:
        super().__init__()
        self._outputs, self._read = outputs, read
        self.placeholders: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _JOINS:
            placeholder = self._placeholder(*args, **(kwargs or {}))
            if placeholder is not None:
                return placeholder
        return func(*args, **(kwargs or {}))

    def _placeholder(self, tensors: Any = (), dim: Any = 0, **others: Any) -> Tensor | None:
        if others or not isinstance(tensors, (list, tuple)) or len(tensors) != 2:
            return None
        layer = self._outputs.layer(0, tensors[0])
        if layer is None or layer in self._read or layer != self._outputs.layer(1, tensors[1]):
            return None
        first, second = tensors
        if dim not in (-1, first.dim() - 1) or first.shape[:-1] != second.shape[:-1]:
            return None
        shape = (*first.shape[:-1], first.shape[-1] + second.shape[-1])
        dtype = torch.promote_types(first.dtype, second.dtype)
        placeholder = torch.full((), torch.nan, dtype=dtype, device=first.device).expand(shape)
        self.placeholders.append(placeholder)
        return placeholder
