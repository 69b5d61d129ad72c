"""Where the heads of each site go: its output projection and the residual stream that takes up the result.

Adapters tell neither, so both are found by values, in one forward: the projection is the linear layer that is fed the
heads side by side; the residual stream after a site is the input of the first module of its block that differs from
the block's own input by the projection's output, times a gain for each channel (a layer scale).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hess_plugin.adapting import Adapter
from hess_plugin.exceptions import CalibrationError
from hess_plugin.interception import SDPA
from hess_plugin.sites import Site

Predict = Callable[[Tensor], object]
_MISFIT = 0.05  # rounding of a bfloat16 stream stays below, another tensor's difference is of order 1


@dataclass(frozen=True, eq=False)
class Joint:
    """How the heads of one site enter the residual stream: ``z = x + gain * projection(heads)``.

    Attributes:
        projection: fed the heads side by side, ``[B, N, H d]``.
        block: the module whose first input is x, or None where no residual stream was found.
        after: the module whose first input is z, or None.
        gain: float64 ``[C]``; ones where no residual stream was found.
    """

    projection: nn.Linear
    block: nn.Module | None
    after: nn.Module | None
    gain: Tensor

    def original(self, predict: Predict, images: Tensor) -> Tensor:
        """Run a model to z, or without a residual stream to the projection's output, ``[B, N, C]`` float64."""
        seen: list[Tensor] = []
        with contextlib.ExitStack() as undo:
            if self.after is None:
                undo.callback(self.projection.register_forward_hook(_keep(seen, lambda _, out: out, end=True)).remove)
            else:
                hook = self.after.register_forward_pre_hook(_keep(seen, lambda args: args[0], end=True))
                undo.callback(hook.remove)
            _run(predict, images)
        return seen[0].double()

    def entering(self, predict: Predict, images: Tensor) -> tuple[Tensor, Tensor | float]:
        """Run a model to the projection: what it is fed, ``[B, N, H d]``, and x, ``[B, N, C]``, or 0."""
        stream: list[Tensor] = []
        heads: list[Tensor] = []
        with contextlib.ExitStack() as undo:
            if self.block is not None:
                hook = self.block.register_forward_pre_hook(_keep(stream, lambda args: args[0], end=False))
                undo.callback(hook.remove)
            undo.callback(self.projection.register_forward_hook(_keep(heads, lambda args, _: args[0], end=True)).remove)
            _run(predict, images)
        return heads[0], stream[0].double() if stream else 0.0


class _Enough(Exception):
    """Ends a forward once what was wanted of it is known."""


def _keep(seen: list[Tensor], choose: Callable[..., Tensor], end: bool) -> Callable[..., None]:
    def hook(_: nn.Module, *values: Any) -> None:
        seen.append(choose(*values))
        if end:
            raise _Enough

    return hook


def _run(predict: Predict, images: Tensor) -> None:
    with contextlib.suppress(_Enough):
        predict(images)


class _Finder:
    """Watches one site during one forward."""

    def __init__(self, site: Site, block: nn.Module | None) -> None:
        self.site, self.block = site, block
        self.heads: Tensor | None = None
        self.projection: nn.Linear | None = None
        self.stream: Tensor | None = None
        self.output: Tensor | None = None
        self.after: nn.Module | None = None
        self.gain: Tensor | None = None

    def install(self, adapter: Adapter, undo: contextlib.ExitStack) -> None:
        undo.callback(adapter.replace_attention(self.site, self._attend).remove)
        inside = set(self.site.module.modules())
        for module in inside:
            if isinstance(module, nn.Linear):
                undo.callback(module.register_forward_hook(self._project).remove)
        if self.block is not None:
            undo.callback(self.block.register_forward_pre_hook(self._enter).remove)
            undo.callback(self.block.register_forward_hook(self._leave).remove)
            for module in set(self.block.modules()) - inside - {self.block}:
                undo.callback(module.register_forward_pre_hook(self._pass).remove)

    def _attend(self, *args: Any, **kwargs: Any) -> Tensor:
        self.heads = SDPA(*args, **kwargs)
        return self.heads

    def _enter(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            self.stream = args[0]

    def _leave(self, *_: Any) -> None:
        self.stream = self.output = None  # those of all sites together would be as much as a graph

    def _project(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.heads is None or self.projection is not None or not isinstance(module, nn.Linear):
            return
        joined = self.heads.transpose(1, 2).flatten(2)
        if args[0].shape == joined.shape and torch.equal(args[0], joined):
            self.projection, self.output, self.heads = module, output, None

    def _pass(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x, y, z = self.stream, self.output, args[0] if args else None
        if self.after is not None or x is None or y is None or not isinstance(z, Tensor):
            return
        if not x.shape == y.shape == z.shape:
            return
        gained, own = (z.double() - x.double()).flatten(0, -2), y.double().flatten(0, -2)
        power = own.square().sum(0)
        gain = torch.where(power > 0, (gained * own).sum(0) / power, 0.0)
        size = float(gained.norm())
        if size > 0 and float((gained - gain * own).norm()) <= _MISFIT * size:
            self.after, self.gain = module, gain


def joints(adapter: Adapter, model: nn.Module, sites: Sequence[Site], predict: Predict, images: Tensor) -> list[Joint]:
    """Find where the heads of each site go.

    Args:
        adapter: of the model.
        model: not patched.
        sites: the L sites.
        predict: runs the model on images.
        images: to run it on once.

    Raises:
        CalibrationError: a site has no linear layer that is fed its heads.
    """
    parents = [site.name.rpartition(".")[0] for site in sites]
    finders = [
        _Finder(site, model.get_submodule(parent) if parent else None)
        for site, parent in zip(sites, parents, strict=True)
    ]
    with contextlib.ExitStack() as undo:
        for finder in finders:
            finder.install(adapter, undo)
        predict(images)
    return [_joint(finder) for finder in finders]


def _joint(finder: _Finder) -> Joint:
    if finder.projection is None:
        raise CalibrationError(
            f"{finder.site.name} has no torch.nn.Linear that is fed the output of its heads, which tuning masks needs; "
            "take the untuned mask for this model."
        )
    if finder.after is None or finder.gain is None:
        weight = finder.projection.weight
        return Joint(finder.projection, None, None, torch.ones(len(weight), dtype=torch.float64, device=weight.device))
    return Joint(finder.projection, finder.block, finder.after, finder.gain)
