"""Where a patched model runs: the backend of that device, and the size below which the dense path is faster there."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import torch

import hess_plugin_cuda

from .break_even import Conditions
from .exceptions import AdapterError, PatchError
from .profiles import Profile
from .recorded_break_evens import recorded_limit
from .settings import Settings
from .sites import Site


class Place:
    """What depends on the device: found out when a model is patched, and again where its inputs then lie.

    Models are built on the CPU and moved afterwards, so what held when they were patched need not hold when they run.

    Attributes:
        settings: of the patch, `dense_below` as it is on the device.
        backend: name of the attention backend there; that of the settings as long as weights are on no device.

    Args:
        settings: of the patch.
        profile: whose recorded break-evens make the limit; None for that of the settings.
    """

    def __init__(self, settings: Settings, profile: Profile | None) -> None:
        self.settings, self.backend = settings, settings.backend
        self._profile, self._dtype = profile, torch.float32

    def settle(self, site: Site, device: torch.device | None = None) -> Settings:
        """Find out about a device, and return the settings that hold there.

        Args:
            site: one of the model.
            device: of its inputs; that of its weights by default.

        Raises:
            PatchError: the backend asked for does not exist or cannot run there.
        """
        patching = device is None
        if device is None:
            weight = site.tensor()
            device, self._dtype = weight.device, weight.dtype
        else:
            # Another tool may have replaced the weight since, and the original of a copy may be gone.
            with contextlib.suppress(AdapterError, ReferenceError):
                self._dtype = site.tensor().dtype
        if device.type == "meta" and self.settings.backend in ("auto", *hess_plugin_cuda.available_backends()):
            return self.settings  # weights are still to come
        try:
            problem = self._problem(site, device)
            if patching and device.type == "cuda" and problem.dtype == torch.float32:
                # The forward asks again by its own type, most likely autocast's: what float32 gets is compiled by torch
                # when it is tried.
                problem = self._problem(site, device, torch.bfloat16)
            self.backend = hess_plugin_cuda.resolve_backend(self.settings.backend, problem)
        except (ValueError, RuntimeError) as error:
            if patching and self._may_run_later(site):
                return self.settings
            raise PatchError(str(error)) from error
        if self._profile is not None:
            limit = self._limit(self._profile, device)
            self.settings = replace(self.settings, dense_below=limit)
        return self.settings

    def _problem(self, site: Site, device: torch.device, dtype: torch.dtype | None = None) -> hess_plugin_cuda.Problem:
        """What attention is asked for where a site runs, in the type that autocast makes of its weights'."""
        kind = device.type
        if dtype is None:
            low = torch.is_autocast_enabled(kind) and self._dtype != torch.float64
            dtype = torch.get_autocast_dtype(kind) if low else self._dtype
        return hess_plugin_cuda.Problem(device, dtype, site.head_dim, self.settings.block_q, self.settings.block_k)

    def _may_run_later(self, site: Site) -> bool:
        """Whether the backend asked for runs on the graphics card, to which a model is moved once it is built."""
        if not torch.cuda.is_available():
            return False
        device = torch.device("cuda", torch.cuda.current_device())
        problems = [self._problem(site, device, dtype) for dtype in (self._dtype, torch.bfloat16, torch.float16)]
        return any(self.settings.backend in hess_plugin_cuda.available_backends(problem) for problem in problems)

    def _limit(self, profile: Profile, device: torch.device) -> int:
        """Patch tokens below which the dense path was found to be the faster one; 0 where nothing is known."""
        kind, settings = device.type, self.settings
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        conditions = Conditions.of(
            device,
            self._dtype,
            self.backend,
            settings.block_q,
            settings.block_k,
            autocast=autocast,
            selection=settings.selection,
        )
        return recorded_limit(profile, conditions, settings.sparsity)
