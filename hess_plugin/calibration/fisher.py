"""Sensitivity of every head to one error: the trace of its empirical Fisher information."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from hess_plugin.exceptions import CalibrationError
from hess_plugin.sites import PROJECTIONS, Site


@contextlib.contextmanager
def only_sites_require_grad(model: nn.Module, sites: Sequence[Site]) -> Iterator[list[nn.Parameter]]:
    """Let gradient flow to the sites' projections alone, in eval mode; restore every flag and mode after.

    Frozen weights elsewhere mean that no graph is built before the first site.

    Yields:
        The distinct projection weights, in site order.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    weights = list({id(w): w for site in sites for w in (site.weight(p) for p in PROJECTIONS)}.values())
    try:
        model.eval()
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield weights
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, training in modes:
            module.training = training


def head_traces(
    error: Tensor,
    sites: Sequence[Site],
    weights: Sequence[nn.Parameter],
    *,
    retain_graph: bool,
    twins: Mapping[int, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Square and sum the gradient of one error over the rows of each head (HeSS, eq. 5 and 6, one scene).

    Args:
        error: 0-d, with a graph to the sites' projections.
        sites: the L sites.
        weights: what `only_sites_require_grad` yields.
        retain_graph: keep the graph for another error of the same forward.
        twins: of the weights, as `patch_rows.Taps` makes them: traces through patch tokens alone, too.

    Returns:
        float64 ``[L, H]`` by projection (``q``, ``k``, ``v``), with twins also ``q.patch``, ``k.patch``,
        ``v.patch``.

    Raises:
        CalibrationError: the error or a gradient is not finite, or the error has no graph.
    """
    check_error(error)
    leaves = [*weights, *([] if twins is None else [twins[id(weight)] for weight in weights])]
    gradients = torch.autograd.grad(error, leaves, retain_graph=retain_graph, allow_unused=True)
    traces = {}
    for suffix, start in (("", 0), (".patch", len(weights)))[: 1 if twins is None else 2]:
        by_weight = {id(w): g for w, g in zip(weights, gradients[start : start + len(weights)], strict=True)}
        for letter in PROJECTIONS:
            traces[f"{letter}{suffix}"] = _trace(by_weight, sites, letter)
    return traces


def check_error(error: Tensor) -> None:
    """Check that an error can be differentiated.

    Raises:
        CalibrationError: it is not finite, or has no graph.
    """
    if not bool(torch.isfinite(error)):
        raise CalibrationError(f"the error is {error.item()}, wanted a finite number; check images and prediction.")
    if not error.requires_grad:
        raise CalibrationError(
            "the error has no gradient with respect to the model; its hess_predict must not run under no_grad."
        )


def _trace(by_weight: Mapping[int, Tensor | None], sites: Sequence[Site], projection: str) -> Tensor:
    rows = []
    for site in sites:
        gradient = by_weight[id(site.weight(projection))]
        if gradient is None:
            rows.append(torch.zeros(site.num_heads, dtype=torch.float64))
        else:
            rows.append(site.head_rows(gradient, projection).double().square().sum((1, 2)).cpu())
    trace = torch.stack(rows)
    if not bool(torch.isfinite(trace).all()):
        raise CalibrationError(
            f"the gradient of W_{projection.upper()} is not finite; calibrate in float32, or bfloat16 not float16."
        )
    return trace
