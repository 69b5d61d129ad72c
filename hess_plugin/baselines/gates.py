"""A gate on every head: a scalar that multiplies what the head's attention gives to the output projection."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hess_plugin.adapting import Adapter
from hess_plugin.calibration.fisher import check_error
from hess_plugin.calibration.measuring import Measurer, Protocol
from hess_plugin.calibration.patch_rows import Taps
from hess_plugin.exceptions import CalibrationError, PatchError
from hess_plugin.interception import SDPA
from hess_plugin.scoring import ERROR_NAMES
from hess_plugin.sites import Site


@contextlib.contextmanager
def gating(adapter: Adapter, sites: Sequence[Site]) -> Iterator[list[Tensor]]:
    """Put a gate on every head of the sites until the context ends.

    Gates of 1 leave every output as it is, bit for bit.

    Args:
        adapter: of the model.
        sites: the L sites, not patched.

    Yields:
        A leaf a site, float64 ``[H]``, all ones, that requires grad; its values may be changed in place.

    Raises:
        PatchError: now, if a site is patched; when called, if attention has another number of heads.
    """
    with contextlib.ExitStack() as undo, torch.inference_mode(False):
        gates = []
        for site in sites:
            ones = torch.ones(site.num_heads, dtype=torch.float64, device=site.weight().device)
            gates.append(ones.requires_grad_(True))
            undo.callback(adapter.replace_attention(site, _gated(site.name, gates[-1])).remove)
        yield gates


def _gated(name: str, gate: Tensor) -> Callable[..., Tensor]:
    def attend(*args: Any, **kwargs: Any) -> Tensor:
        output = SDPA(*args, **kwargs)
        if output.ndim != 4 or output.shape[1] != len(gate):
            raise PatchError(
                f"attention of {name} gave {list(output.shape)}, wanted [B, {len(gate)}, N, d]; check the number of "
                "heads that its adapter tells."
            )
        return output * gate.to(output.dtype)[:, None, None]

    return attend


class GateMeasurer(Measurer):
    """Measures as a calibration does, but differentiates the errors by gates instead of projections.

    What it measures are gradients with their sign, float64 ``[L, H]`` by ``camera`` and ``points``, NaN for an error
    that the scene does not have.
    """

    def __init__(
        self, adapter: Adapter, model: nn.Module, sites: Sequence[Site], protocol: Protocol, gates: Sequence[Tensor]
    ) -> None:
        super().__init__(adapter, model, sites, protocol, Taps())
        self._gates = list(gates)

    def _traces(self, present: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
        shape = (len(self._gates), len(self._gates[0]))
        found = {kind: torch.full(shape, torch.nan, dtype=torch.float64) for kind in ERROR_NAMES}
        for index, (kind, error) in enumerate(present):
            check_error(error)
            last = index == len(present) - 1
            rows = torch.autograd.grad(error, self._gates, retain_graph=not last, allow_unused=True)
            gradient = torch.stack([torch.zeros(shape[1]).double() if row is None else row.cpu() for row in rows])
            if not bool(torch.isfinite(gradient).all()):
                raise CalibrationError(
                    f"the gradient of the {kind} error by the gates is not finite; measure in float32, or bfloat16 not "
                    "float16."
                )
            found[kind] = gradient
        return found
