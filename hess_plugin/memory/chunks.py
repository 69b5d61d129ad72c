"""Running a module that treats the entries of its tensors alone on some of them at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from .forwards import Forward, log

CHUNK = 2**23
"""Numbers in the first tensor of a chunk: 8192 tokens of 1024 channels, which still fill a GPU."""


_PLAIN = (type(None), bool, int, float, complex, str)
_WITHOUT_TENSORS = (*_PLAIN, torch.dtype, torch.device, torch.memory_format, torch.Size)


class Chunks:
    """Runs a module in chunks along one axis; a `forwards.Run`.

    Inputs are cut without a copy and outputs written into one tensor each, so that beside them only the intermediate
    results of one chunk are alive. Chunks of a call have two different lengths, so that an output which is as long as
    one of them by coincidence is not taken for one entry each; where there is any doubt the module runs whole.

    Args:
        name: of the module, for what is told.
        axis: along which entries are treated alone.
    """

    def __init__(self, name: str, axis: int) -> None:
        self.name, self.axis = name, axis
        self._whole = False
        self._other_lengths: set[str] = set()

    def __call__(self, module: nn.Module, own: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's own forward on chunks, or on everything where that is one chunk."""
        paths, structure = tree_flatten_with_path((args, kwargs))
        leaves = [leaf for _, leaf in paths]
        first = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > self.axis), None)
        if self._whole or first is None or first.numel() == 0:
            return own(*args, **kwargs)
        length = first.shape[self.axis]
        count = _count(length, first.numel())
        if self._coincides(paths, length) or count <= 1:
            return own(*args, **kwargs)
        if not all(isinstance(leaf, (Tensor, *_WITHOUT_TENSORS)) for leaf in leaves):
            return self._run_whole("is given an object that may hold tensors", own, args, kwargs)
        output = None
        for start, stop in _bounds(length, count):
            part = [_cut(leaf, self.axis, start, stop, length) for leaf in leaves]
            part_args, part_kwargs = tree_unflatten(part, structure)
            made = own(*part_args, **part_kwargs)
            if output is None:
                output = _Joined.of(made, self.axis, stop, length)
            if output is None or not output.write(made, start, stop):
                return self._run_whole("does not return one entry for each of its inputs", own, args, kwargs)
            del made
        assert output is not None
        return output.result()

    def _coincides(self, paths: list[tuple[Any, Any]], length: int) -> bool:
        """Whether a tensor is as long as the first one, and was not in another call: it has no entry for each."""
        found = False
        for path, leaf in paths:
            if not isinstance(leaf, Tensor) or leaf.dim() <= self.axis:
                continue
            if leaf.shape[self.axis] == length:
                found = found or keystr(path) in self._other_lengths
            elif leaf.shape[self.axis] != 1:  # one entry for all is right at any length
                self._other_lengths.add(keystr(path))
        return found

    def _run_whole(self, why: str, own: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's own forward on everything, now and from now on."""
        self._whole = True
        log.warning("%s %s; it runs whole", self.name, why)
        return own(*args, **kwargs)


def _count(length: int, numbers: int) -> int:
    """How many chunks, of two lengths that differ by one: 1 where there are fewer than three entries to tell them."""
    count = math.ceil(length / max(2, CHUNK * length // numbers))
    while 1 < count < length and length % count == 0:
        count += 1
    return count


def _bounds(length: int, count: int) -> list[tuple[int, int]]:
    """Ends of `count` chunks that differ by one entry at most."""
    return [(length * i // count, length * (i + 1) // count) for i in range(count)]


def _cut(leaf: Any, axis: int, start: int, stop: int, length: int) -> Any:
    if not isinstance(leaf, Tensor) or leaf.dim() <= axis or leaf.shape[axis] != length:
        return leaf
    part = leaf.narrow(axis, start, stop - start)
    # Code that views a tensor which it knows to be contiguous must be able to view a part of it.
    return part.contiguous() if leaf.is_contiguous() else part


class _Joined:
    """What the chunks return, put together."""

    def __init__(self, wholes: list[Any], kind: Any, structure: TreeSpec, axis: int) -> None:
        self._wholes, self._kind, self._structure, self._axis = wholes, kind, structure, axis

    @classmethod
    def of(cls, made: Any, axis: int, part: int, length: int) -> _Joined | None:
        """Room for everything, given what the first chunk of `part` entries returned; None if it is not that long.

        None too for anything that cannot be compared with what another chunk returns, such as an array.
        """
        kind, leaves, structure = _flatten(made)
        wholes = []
        for leaf in leaves:
            if type(leaf) in _PLAIN:
                wholes.append(leaf)
                continue
            if not isinstance(leaf, Tensor) or leaf.dim() <= axis or leaf.shape[axis] != part:
                return None
            wholes.append(leaf.new_empty((*leaf.shape[:axis], length, *leaf.shape[axis + 1 :])))
        return cls(wholes, kind, structure, axis)

    def write(self, made: Any, start: int, stop: int) -> bool:
        """Put what a chunk returned in its place; tell whether it fits."""
        kind, leaves, structure = _flatten(made)
        if kind is not self._kind or structure != self._structure:
            return False
        for whole, leaf in zip(self._wholes, leaves, strict=True):
            if not isinstance(whole, Tensor):
                if type(leaf) is not type(whole) or leaf != whole:
                    return False
                continue
            place = whole.narrow(self._axis, start, stop - start)
            if leaf.shape != place.shape or leaf.dtype != whole.dtype:
                return False
            place.copy_(leaf)
        return True

    def result(self) -> Any:
        """What the module returns for all entries."""
        made = tree_unflatten(self._wholes, self._structure)
        return made if self._kind is None else self._kind(made)


def _flatten(made: Any) -> tuple[Any, list[Any], TreeSpec]:
    """Leaves of an output; a subclass of dict, such as addict's, would count as one leaf."""
    kind = type(made) if isinstance(made, dict) and type(made) is not dict else None
    leaves, structure = tree_flatten(made if kind is None else dict(made))
    return kind, leaves, structure


def mixes_entries(module: nn.Module) -> bool:
    """Tell whether a module has a layer that takes statistics over its batch outside of training, too."""
    batch_norm = torch.nn.modules.batchnorm._BatchNorm
    return any(isinstance(part, batch_norm) and part.running_mean is None for part in module.modules())
