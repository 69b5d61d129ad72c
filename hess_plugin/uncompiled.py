"""Objects that ``torch.compile`` calls without looking into them, at no cost to those who do not compile."""

from __future__ import annotations

import sys
from typing import Any

import torch


class Uncompiled:
    """Base of callables whose `run` is kept out of compiled graphs: one graph break at each call.

    ``torch.compiler.disable`` imports the compiler, which takes seconds. So it is applied by the first call that finds
    the compiler loaded, once for each class.
    """

    __slots__ = ()
    reason = ""
    """Why, for those who ask the compiler about its graph breaks."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do `run`, where the compiler does not look."""
        if "torch._dynamo" not in sys.modules:
            return self.run(*args, **kwargs)
        _keep_out(type(self))
        return self(*args, **kwargs)  # no longer this method

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What a call does."""
        raise NotImplementedError


def _keep_out(kind: type[Uncompiled]) -> None:
    setattr(kind, "__call__", torch.compiler.disable(kind.run, reason=kind.reason))  # noqa: B010 (of a class)


def is_traced() -> bool:
    """Tell whether what runs is being recorded, by ``torch.jit.trace`` or ``torch.export``, to be run again."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def has_values(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor holds numbers: not on the meta device, nor a stand-in, as when memory is estimated."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return not tensor.is_meta and (fake is None or not isinstance(tensor, fake.FakeTensor))
