"""The part of a projection's gradient that comes through patch tokens alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hess_plugin.adapting import Adapter
from hess_plugin.sites import PROJECTIONS, Site


class _Tap(torch.autograd.Function):
    """Hand on a projection's output; in the backward pass also give its weight's twin the patch tokens' gradient.

    The weight's own gradient is left as the module computes it. The twin's is not the difference of two gradients:
    where no patch token has one, as for the camera error at the last layer of VGGT, it is exactly 0.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, tokens: Tensor, twin: Tensor, special: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, special)
        ctx.dtype = twin.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        tokens, special = ctx.saved_tensors
        (gradient,) = gradients
        through = gradient.index_fill(1, special, 0).flatten(0, -2)
        own = through.mT @ tokens.to(through.dtype).flatten(0, -2)
        return gradient, None, own.to(ctx.dtype), None


class Taps:
    """Twins of the sites' projection weights, whose gradient counts patch tokens only.

    A special token's query is always computed densely, so its share of the gradient says nothing about what
    sparsification does.
    """

    def __init__(self) -> None:
        self.twins: dict[int, Tensor] = {}
        """By ``id`` of a projection's weight: a leaf on the same memory that requires grad."""
        self._special: dict[int, Tensor] = {}
        self._reached: set[int] = set()

    def twin(self, weight: nn.Parameter) -> Tensor:
        """Make or find the twin of a weight."""
        return self.twins.setdefault(id(weight), weight.detach().requires_grad_(True))

    def complete(self) -> bool:
        """Whether every twin has been reached."""
        return self._reached == set(self.twins)

    def see(self, tokens: int, special: Tensor) -> None:
        """Note where the special tokens of sequences of this length are."""
        self._special[tokens] = special

    def hook(self, weight: nn.Parameter, tokens: Any, output: Any) -> Any:
        """Tap one call of the module that applies a weight, if it is a linear map of one known sequence."""
        if not (isinstance(tokens, Tensor) and isinstance(output, Tensor) and tokens.ndim == output.ndim == 3):
            return None
        special = self._special.get(tokens.shape[1])
        if special is None or (output.shape[-1], tokens.shape[-1]) != tuple(weight.shape):
            return None
        self._reached.add(id(weight))
        if not torch.is_grad_enabled():
            return None
        return _Tap.apply(output, tokens, self.twin(weight), special.to(output.device))


@contextlib.contextmanager
def taps(adapter: Adapter, model: nn.Module, sites: Sequence[Site]) -> Iterator[Taps]:
    """Tap the projections of all sites until the context ends.

    A projection that is not a submodule's ``weight`` called on the sequence cannot be tapped; `Taps.complete`
    tells.
    """
    found = Taps()
    with contextlib.ExitStack() as undo:
        for name in dict.fromkeys(site.layout_module for site in sites):
            undo.callback(_watch(adapter, model, name, found).remove)
        for site in sites:
            for path in dict.fromkeys(site.projections[letter].parameter for letter in PROJECTIONS):
                undo.callback(_tap(site.module, path, found).remove)
        yield found


def _watch(adapter: Adapter, model: nn.Module, name: str, found: Taps) -> RemovableHandle:
    """Learn where the special tokens are before every forward of the module that receives the images."""

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        layout = adapter.token_layout(model, args, kwargs)
        found.see(layout.tokens, layout.patches_first()[layout.patch_tokens :])

    return model.get_submodule(name).register_forward_pre_hook(watch, with_kwargs=True)


def _tap(module: nn.Module, path: str, found: Taps) -> RemovableHandle:
    """Tap the submodule that applies the weight at `path`."""
    weight = module.get_parameter(path)
    found.twin(weight)

    def tap(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return found.hook(weight, args[0] if args else None, output)

    return module.get_submodule(path.rpartition(".")[0]).register_forward_hook(tap)
