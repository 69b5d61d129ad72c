"""Checks of what a patched model computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hess_plugin.handle import Patch
from hess_plugin.predictions import Prediction

from .case import CannotTell, Case, difference, finite

_ROUNDING = 1e-4  # of the largest number, through all layers, in float32


def dense_is_exact(case: Case) -> str | None:
    """At sparsity 0 every site is reached and nothing changes."""
    plain = case.predict()
    with case.patched(0.0) as handle:
        patched = case.predict()
    for site in handle.report().sites:
        if not site.calls:
            return f"{site.name} was not reached; hess_replace_attention has to call attend, else leave the site out"
        if site.calls != site.dense_calls:
            return f"{site.name} did not take the dense path"
    return _dense_difference(case, plain, patched)


def _dense_difference(case: Case, plain: Prediction, patched: Prediction) -> str | None:
    """Bit for bit; but to rounding where the adapter replaces spelled-out attention, which rounds in its own way."""
    problem = difference(plain, patched)
    if problem is None or not any(case.replaced_by_adapter(site) for site in case.sites()):
        return problem
    for name in ("c2w", "points"):
        a, b = getattr(plain, name), getattr(patched, name)
        if not (a - b).abs().max() <= _ROUNDING * a.abs().max():
            return (
                f"{problem}, more than rounding; the forward given to intercept has to compute what the module's does"
            )
    return None


def reference_agrees(case: Case) -> str | None:
    """The chosen backend and the plain reference predict the same points."""
    outputs = []
    for backend in ("reference", "auto"):
        with case.patched(backend=backend):
            outputs.append(case.predict())
    scale = outputs[0].points.abs().max().item()
    worst = (outputs[0].points - outputs[1].points).abs().max().item()
    if worst <= 1e-3 * max(scale, 1e-6):
        return None
    return f"points of two backends differ by {worst:.2e} of {scale:.2e}; report it with your versions and hardware"


def sparsity_is_measured(case: Case) -> str | None:
    """A sparse forward drops something, at every site, and stays finite."""
    with case.patched() as handle:
        prediction = case.predict()
    report = handle.report()
    if not report.sparsity:
        return f"measured sparsity is {report.sparsity}; give a scene with more patches or smaller blocks"
    dense = [site.name for site in report.sites if not site.sparsity]
    if dense:
        return f"{dense[0]} dropped nothing; is its attention over all frames?"
    return None if finite(prediction) else "the prediction is not finite; does the model take any attention output?"


def sizes_follow_each_other(case: Case) -> str | None:
    """One patch serves forwards of several sizes, each as if it were the first."""
    inputs = [case.scene.images, *case.other_sizes(), case.scene.images[:-1], case.scene.images]
    alone = []
    for images in inputs:
        with case.patched():
            alone.append(case.predict_at(images))
    with case.patched():
        for images, wanted in zip(inputs, alone, strict=True):
            problem = difference(wanted, case.predict_at(images))
            if problem is not None:
                return (
                    f"after forwards of other sizes, {_size(images)}: {problem}; hess_token_layout must read the "
                    "arguments of this call and keep nothing"
                )
    return None


def _size(images: Tensor) -> str:
    return " x ".join(str(side) for side in (images.shape[0], *images.shape[-2:]))


def batches_are_independent(case: Case) -> str | None:
    """Two scenes in a batch: the announced layout still fits, and each gets what it gets alone."""
    sites = case.sites()
    module = case.model.get_submodule(sites[0].layout_module)
    call: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []
    hook = module.register_forward_pre_hook(lambda m, args, kwargs: call.append((args, kwargs)), with_kwargs=True)
    try:
        case.predict()
    finally:
        hook.remove()
    args, kwargs = call[0]
    if not any(_is_batch(value, case.scene.views) for value in (*args, *kwargs.values())):
        raise CannotTell("the model takes one scene at a time: no argument [1, views, ...] to make two of")
    flipped = _paired(args, kwargs, case.scene.views)
    with torch.no_grad():
        one = _tensors(module(*args, **kwargs))
        try:
            two = _tensors(module(*flipped[0], **flipped[1]))
        except Exception as error:
            raise CannotTell(f"the unpatched model takes no batch of two ({type(error).__name__})") from error
        with case.patched() as handle:
            sparse = _tensors(module(*flipped[0], **flipped[1]))
            alone = _tensors(module(*args, **kwargs))
    return _batch_problem(handle, one, two, alone, sparse)


def _batch_problem(
    handle: Patch, one: list[Tensor], two: list[Tensor], alone: list[Tensor], sparse: list[Tensor]
) -> str | None:
    if not handle.report().sparsity:
        return "nothing was dropped; hess_token_layout must not count the batch among the frames"
    compared = False
    for dense_one, dense_two, a, b in zip(one, two, alone, sparse, strict=True):
        if a.shape[:1] != (1,) or b.shape[:1] != (2,) or not a.is_floating_point():
            continue
        compared = True
        # Sums are taken in another order in a batch; the dense model says by how much that shows.
        noise = (dense_two[:1] - dense_one).abs().max().item()
        worst = (b[:1] - a).abs().max().item()
        if not worst <= 1e-3 * max(1e-6, a.abs().max().item()) + 10 * noise:
            return f"the first scene of a batch of two differs by {worst:.2e} from the same scene alone"
    if not compared:
        raise CannotTell("the model returns nothing that has an axis for the scenes of a batch")
    return None


def _is_batch(value: Any, views: int) -> bool:
    return isinstance(value, Tensor) and value.ndim >= 3 and tuple(value.shape[:2]) == (1, views)


def _paired(args: tuple[Any, ...], kwargs: Mapping[str, Any], views: int) -> tuple[list[Any], dict[str, Any]]:
    """The same arguments with a second scene: the first one's views in reverse order."""

    def pair(value: Any) -> Any:
        return torch.cat([value, value.flip(1)]) if _is_batch(value, views) else value

    return [pair(value) for value in args], {name: pair(value) for name, value in kwargs.items()}


def _tensors(output: Any) -> list[Tensor]:
    """The tensors of an output, in order, however they are nested."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [tensor for item in output for tensor in _tensors(item)]
    return []


def half_precision_runs(case: Case) -> str | None:
    """Under bfloat16 autocast a patch at sparsity 0 changes nothing, and a sparse one runs."""
    device = case.scene.images.device.type
    with torch.autocast(device, torch.bfloat16):
        try:
            plain = case.predict()
        except (RuntimeError, NotImplementedError, TypeError) as error:  # some heads refuse a dtype themselves
            text = " ".join(str(error).split())[:100]
            raise CannotTell(f"the unpatched model does not run in bfloat16 on this device ({text})") from error
        with case.patched(0.0):
            dense = case.predict()
        with case.patched() as handle:
            sparse = case.predict()
    own = any(case.replaced_by_adapter(site) for site in case.sites())
    problem = None if own else difference(plain, dense)  # spelled-out attention rounds in its own way
    if problem is not None:
        return f"at sparsity 0, {problem}"
    if not handle.report().sparsity:
        return "nothing was dropped"
    return None if finite(dense) and finite(sparse) else "the patched prediction is not finite"
