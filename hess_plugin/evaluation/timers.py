"""Timers of one number of views: whole forwards, or the attention of one site alone, dense against patched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hess_plugin.adapting import Adapter
from hess_plugin.attention import SiteAttention
from hess_plugin.break_even import Timing
from hess_plugin.exceptions import AdapterError
from hess_plugin.interception import SDPA
from hess_plugin.patching import patch
from hess_plugin.plans import Layouts
from hess_plugin.settings import Settings
from hess_plugin.sites import Site, TokenLayout

from .timing import Stopwatch, twin


class ForwardTimer:
    """Times whole forwards on random images of one size, which cost what any other images cost.

    Args:
        adapter: of the model.
        model: unpatched; a twin of it is patched.
        size: rows and columns of an image, pixels.
        stopwatch: how to time.
        options: arguments of `hess_plugin.patch`.
    """

    def __init__(
        self, adapter: Adapter, model: nn.Module, size: tuple[int, int], stopwatch: Stopwatch, **options: Any
    ) -> None:
        self._adapter, self._model, self._size, self._stopwatch = adapter, model, size, stopwatch
        self._options = {**options, "adapter": adapter.name, "manager": adapter.manager}
        self._twin, self._site = twin(model), adapter.sites(model)[0]

    def __call__(self, views: int) -> Timing:
        """Time one number of views.

        Raises:
            TooLarge: it takes too long or does not fit in memory.
        """
        with (
            self._stopwatch.running(views),
            patch(self._twin, **self._options) as handle,
            announced(self._adapter, self._model, self._site) as layouts,
        ):
            images = random_images(views, self._size, self._stopwatch.device)
            timing = self._stopwatch.compare(
                views,
                lambda: self._adapter.predict(self._model, images),
                lambda: self._adapter.predict(self._twin, images),
            )
        return replace(timing, tokens=layouts[0].patch_tokens, sparsity=handle.report().sparsity or 0.0)


class AttentionTimer:
    """Times the attention of one site alone, selection included, on random q, k and v.

    The site is asked in a forward of two views what it is called with: number and width of heads, dtypes, scale and
    token layout, which other numbers of views repeat.

    Args:
        adapter: of the model.
        model: unpatched.
        site: the site.
        size: rows and columns of an image, pixels.
        stopwatch: how to time.
        settings: of the patched attention.
        scores: of the site's heads ``[H]``, or None for budgets without a profile.

    Raises:
        AdapterError: the site is not called in a forward.
    """

    def __init__(
        self,
        adapter: Adapter,
        model: nn.Module,
        site: Site,
        size: tuple[int, int],
        stopwatch: Stopwatch,
        settings: Settings,
        scores: Tensor | None = None,
    ) -> None:
        self._stopwatch, self._site, self._settings, self._scores = stopwatch, site, settings, scores
        with stopwatch.running(2), stopwatch.under_autocast(), announced(adapter, model, site) as layouts:
            self._like, self._scale = _asked(adapter, model, site, random_images(2, size, stopwatch.device))
        self._layout = layouts[0]

    def __call__(self, views: int) -> Timing:
        """Time one number of views.

        Raises:
            TooLarge: it takes too long or does not fit in memory.
        """
        layout = replace(self._layout, frames=views)
        layouts = Layouts(self._settings.block_order, self._settings.block_k)
        layouts.see(layout)
        attention = SiteAttention(self._site, self._settings, self._scores, layouts, 0)
        with self._stopwatch.running(views):
            generator = torch.Generator(self._stopwatch.device).manual_seed(views)
            shape = (1, self._site.num_heads, layout.tokens, self._site.head_dim)
            q, k, v = (
                torch.randn(shape, generator=generator, device=self._stopwatch.device).to(dtype) for dtype in self._like
            )
            timing = self._stopwatch.compare(
                views, lambda: SDPA(q, k, v, scale=self._scale), lambda: attention(q, k, v, scale=self._scale)
            )
        return replace(timing, tokens=layout.patch_tokens, sparsity=attention.tally.report().sparsity or 0.0)


@contextlib.contextmanager
def announced(adapter: Adapter, model: nn.Module, site: Site) -> Iterator[list[TokenLayout]]:
    """Note the token layouts of a site's forwards; the first one only, so that timed forwards are not slowed."""
    seen: list[TokenLayout] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(adapter.token_layout(model, args, kwargs))
        hook.remove()

    hook = model.get_submodule(site.layout_module).register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def random_images(views: int, size: tuple[int, int], device: torch.device) -> Tensor:
    """Images ``[views, 3, H, W]`` in [0, 1], the same on every call."""
    generator = torch.Generator(device).manual_seed(views)
    return torch.rand((views, 3, *size), generator=generator, device=device)


class _Enough(Exception):
    """The attention call that was waited for has come."""

    def __init__(self, dtypes: tuple[torch.dtype, ...], scale: float | None) -> None:
        super().__init__()
        self.dtypes, self.scale = dtypes, scale


def _asked(
    adapter: Adapter, model: nn.Module, site: Site, images: Tensor
) -> tuple[tuple[torch.dtype, ...], float | None]:
    """Dtypes of q, k and v and the scale that a site calls attention with; the forward is left there."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        raise _Enough((query.dtype, key.dtype, value.dtype), options.get("scale"))

    replacement = adapter.replace_attention(site, attend)
    try:
        adapter.predict(model, images)
    except _Enough as found:
        return found.dtypes, found.scale
    finally:
        replacement.remove()
    raise AdapterError(f"a forward of {type(model).__name__} does not call {site.name}; check the adapter's sites.")
