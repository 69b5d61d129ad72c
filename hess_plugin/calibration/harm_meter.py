"""Measuring harm: gradients by attention outputs on the way back, sparse attention beside the dense one once more.

To second order, changing the attention output of head h at patch token t by do_t changes an error e by g_t . do_t, with
g_t = de / do_t. Signs of different tokens are as good as random, so what counts is the mean square: harm is the mean
over patch tokens of do_t' G do_t, with G the mean of g_t g_t'. Nothing of the model but its attention calls is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hess_plugin.adapting import Adapter
from hess_plugin.exceptions import PatchError
from hess_plugin.plans import Layouts
from hess_plugin.scoring import ERROR_NAMES
from hess_plugin.sites import Site

from .harm import HarmSettings
from .harm_site import SiteMeter


class HarmMeter:
    """Harm curves of one scene after the other; made by `harm_meter`.

    Args:
        sites: the L sites.
        settings: how to measure.
    """

    def __init__(self, sites: Sequence[Site], settings: HarmSettings) -> None:
        self.settings = settings
        self.layouts = Layouts(settings.block_order, settings.block_k)
        self.sites = [SiteMeter(site, self) for site in sites]
        self.error: str | None = None
        self.counts: list[int] | None = None
        self.columns = 0

    @contextlib.contextmanager
    def collecting(self, error: str) -> Iterator[None]:
        """Take the gradients of the backward passes inside as those of one error, from none."""
        self.error = error
        for site in self.sites:
            site.begin(error)
        try:
            yield
        finally:
            self.error = None

    def output_traces(self, error: str) -> Tensor:
        """Squared gradient by each head's attention output, summed over patch tokens: float64 ``[L, H]``.

        Args:
            error: whose gradients were collected.
        """
        return torch.stack([site.output_trace(error) for site in self.sites])

    @torch.no_grad()
    def measure(self, errors: Sequence[str], predict: Callable[[], Any]) -> tuple[dict[str, Tensor], str]:
        """Measure the curves of one scene by one more forward.

        Args:
            errors: whose gradients were collected.
            predict: runs the forward.

        Returns:
            Tensors by ``harm.camera`` and ``harm.points``, float64 ``[L, H, K]``, NaN for an error that is not among
            `errors`, and ``harm.shares``, ``[K]``; and in words at what they were measured. All is NaN where the scene
            has too few blocks to leave any out.

        Raises:
            CalibrationError: a gradient or a curve is not finite.
            PatchError: attention is not plain self-attention, or sites have different numbers of blocks.
        """
        for site in self.sites:
            site.settle(errors)
        self.counts, self.columns = [], 0
        try:
            predict()
            return self._curves(errors), self._words()
        finally:
            self.counts = None
            for site in self.sites:
                site.forget()

    def kept(self, columns: int, name: str) -> list[int]:
        """Blocks a row for each share, of so many; empty where there are too few.

        Raises:
            PatchError: another site had another number.
        """
        if self.columns not in (0, columns):
            raise PatchError(
                f"{name} has {columns} key blocks and another site {self.columns}, which no budget over the whole "
                "model fits; calibrate without harm curves."
            )
        self.columns = columns
        self.counts = self.settings.counts(columns) if columns > self.settings.minimum else []
        return self.counts

    def _curves(self, errors: Sequence[str]) -> dict[str, Tensor]:
        points, measured = len(self.settings.shares), bool(self.counts)
        shares = torch.full((points,), torch.nan, dtype=torch.float64)
        if measured:
            shares = torch.tensor(self.counts, dtype=torch.float64) / self.columns
        curves = {"harm.shares": shares}
        for error in ERROR_NAMES:
            rows = [site.curve(error, points, measured and error in errors) for site in self.sites]
            curves[f"harm.{error}"] = torch.stack(rows)
        return curves

    def _words(self) -> str:
        if self.counts:
            return f"measured keeping {self.counts[0]} to {self.counts[-1]} of {self.columns} key blocks a row"
        return f"no curves: there are {self.columns} key blocks, and every row keeps {self.settings.minimum}"


@contextlib.contextmanager
def harm_meter(
    adapter: Adapter, model: nn.Module, sites: Sequence[Site], settings: HarmSettings | None
) -> Iterator[HarmMeter | None]:
    """Watch the attention calls of all sites until the context ends; every output stays what it is, bit for bit.

    Args:
        adapter: of the model.
        model: unpatched.
        sites: the L sites.
        settings: how to measure; None for no meter.
    """
    if settings is None:
        yield None
        return
    meter = HarmMeter(sites, settings)

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        meter.layouts.see(adapter.token_layout(model, args, kwargs))

    with contextlib.ExitStack() as undo:
        for site, watched in zip(sites, meter.sites, strict=True):
            undo.callback(adapter.replace_attention(site, watched.attend).remove)
        for name in dict.fromkeys(site.layout_module for site in sites):
            hook = model.get_submodule(name).register_forward_pre_hook(see, with_kwargs=True)
            undo.callback(hook.remove)
        yield meter
