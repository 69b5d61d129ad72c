"""Running a model in a fraction of the memory that its graph would take, with the same gradients."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from hess_plugin.adapting import Family
from hess_plugin.exceptions import AdapterError
from hess_plugin.memory.lean import family_module
from hess_plugin.sites import Site


@contextlib.contextmanager
def lean(model: nn.Module, family: Family, sites: Sequence[Site], frames: int) -> Iterator[None]:
    """Keep only what goes into each block and each head, and compute the rest again in the backward pass.

    Blocks are recomputed one at a time. Heads that work frame by frame are run one frame at a time, forward and
    backward, so that the tokens they share collect the gradient of all frames before it enters the last block:
    the two-stage backward. Heads that the prediction does not use are left out. Every module is given back as
    it was.

    Args:
        model: in eval mode; dropout would be drawn anew in the recomputation.
        family: names the blocks and heads.
        sites: their parents are the blocks where the family names none.
        frames: views of the scene, axis 1 of what the heads are called with.

    Raises:
        AdapterError: the family names a module that the model does not have.
    """
    with contextlib.ExitStack() as undo:
        for name in _blocks(model, family, sites):
            _replace_forward(family_module(model, name), _recomputed, undo)
        for name in family.frame_heads:
            _replace_forward(family_module(model, name), functools.partial(_one_by_one, name=name, frames=frames), undo)
        for name in family.unused_heads:
            _leave_out(model, name, undo)
        yield


def _blocks(model: nn.Module, family: Family, sites: Sequence[Site]) -> list[str]:
    """Names of the modules to recompute: the children of the family's lists, else the parents of the sites."""
    if not family.blocks:
        return list(dict.fromkeys(name for site in sites if (name := site.name.rpartition(".")[0])))
    return [f"{name}.{child}" for name in family.blocks for child, _ in family_module(model, name).named_children()]


def _replace_forward(
    module: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]], undo: contextlib.ExitStack
) -> None:
    """Wrap the forward of this one module: hooks, state and class stay as they are."""
    own = module.__dict__.get("forward")  # some tools put a forward on the instance, which is then the one to wrap
    wrapped = wrap(module.forward)
    module.forward = types.MethodType(lambda _, *args, **kwargs: wrapped(*args, **kwargs), module)

    def restore() -> None:
        if own is None:
            del module.forward
        else:
            module.forward = own

    undo.callback(restore)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Nothing is drawn at random in eval mode, so no generator state needs to be kept.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def _one_by_one(forward: Callable[..., Any], name: str, frames: int) -> Callable[..., Any]:
    """Run a head that treats frames alone on one frame after another and join its outputs along axis 1."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        if not any(_has_frames(leaf, frames) for leaf in leaves):
            raise AdapterError(
                f"{name} is named in Family.frame_heads and is called without a tensor [B, {frames}, ...]; name only "
                "heads that are given all frames along axis 1."
            )
        # One split for all frames: slicing would give every frame a gradient as large as that of all together.
        parts = [leaf.split(1, dim=1) if _has_frames(leaf, frames) else [leaf] * frames for leaf in leaves]

        kinds: list[type[dict[str, Any]]] = []

        def one(*frame: Any) -> Any:
            inside_args, inside_kwargs = tree_unflatten(list(frame), structure)
            output = forward(*inside_args, **inside_kwargs)
            if not isinstance(output, dict):
                return output
            kinds.append(type(output))  # a subclass, such as addict's, would count as one leaf
            return dict(output)

        outputs = [
            tree_flatten(checkpoint(one, *frame, use_reentrant=False, preserve_rng_state=False))
            for frame in zip(*parts, strict=True)
        ]
        joined = [torch.cat(leaf, dim=1) for leaf in zip(*(leaves for leaves, _ in outputs), strict=True)]
        result = tree_unflatten(joined, outputs[0][1])
        return kinds[0](result) if kinds else result

    return run


def _has_frames(leaf: object, frames: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim >= 3 and leaf.shape[1] == frames


def _leave_out(model: nn.Module, name: str, undo: contextlib.ExitStack) -> None:
    """Set a head to None: upstream forwards then skip it."""
    head = family_module(model, name)
    parent, _, attribute = name.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, attribute, None)  # the key stays where it was among the owner's modules
    undo.callback(setattr, owner, attribute, head)
