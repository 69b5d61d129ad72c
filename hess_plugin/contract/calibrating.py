"""Checks that the model can be calibrated."""

from __future__ import annotations

import torch

from hess_plugin.calibration.calibrator import calibrate
from hess_plugin.calibration.fisher import head_traces, only_sites_require_grad
from hess_plugin.calibration.measuring import MEMORY, Protocol, measuring
from hess_plugin.profiles import ERROR_NAMES

from .case import ANY_DISTANCE, Case
from .undoing import changes, state_at_rest, state_of


def gradient_everywhere(case: Case) -> str | None:
    """The errors have a gradient at every site."""
    sites = case.sites()
    with only_sites_require_grad(case.model, sites) as weights:
        errors = case.adapter.compute_errors(case.model, case.scene, ANY_DISTANCE)
        found = {name: e for name in ERROR_NAMES if (e := getattr(errors, name)) is not None}
        if not found:
            return "neither error was computed; give a scene with cameras and depth"
        traces = [head_traces(error, sites, weights, retain_graph=True)["q"] for error in found.values()]
    total = torch.stack(traces).sum((0, 2))
    silent = [site.name for site, value in zip(sites, total.tolist(), strict=True) if value == 0.0]
    return f"no gradient reaches {silent[0]}; hess_predict must not detach" if silent else None


def lean_is_exact(case: Case) -> str | None:
    """Measuring in little memory gives the same traces and leaves no trace of its own."""
    before, sites, traces = state_at_rest(case), case.sites(), []
    for memory in MEMORY:
        with measuring(case.adapter, case.model, sites, Protocol(eps=ANY_DISTANCE, memory=memory)) as measurer:
            traces.append(measurer.measure(case.scene).traces)
    changed = changes(before, state_of(case.model))
    if changed:
        return f"{changed[0]} was left changed; report it with the model's code"
    for name, first in traces[0].items():
        worst = (first - traces[1][name]).abs().max().item() / max(first.max().item(), 1e-300)
        if not worst <= 1e-3 and not bool(first.isnan().all()):
            return (
                f"traces {name} differ by {worst:.1e} of the largest; blocks must be modules that draw nothing at "
                "random, frame_heads must treat frames alone"
            )
    return None


def profile_works(case: Case) -> str | None:
    """A calibration gives a profile that patches the model."""
    profile = calibrate(
        case.model,
        [case.scene],
        camera_weight=0.5,
        eps=ANY_DISTANCE,
        adapter=case.adapter.name,
        manager=case.adapter.manager,
    )
    with case.patched(profile=profile) as handle:
        case.predict()
    return None if handle.report().sparsity else "nothing was dropped; give a scene with more patches or smaller blocks"
