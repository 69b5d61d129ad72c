"""``patch(..., memory="lean")``: what is changed in a model so that inference takes less memory.

Outputs stay what they are, to rounding: matrix products of other sizes may be summed in another order, nothing else
differs. What happens inside differs, which only those see who look there: a forward hook within a module that runs in
chunks is called for each chunk, with that piece; and where unread layers are left out, a hook on the module that joins
them finds None in their places, and code of that module that reads them there finds not-a-number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from torch import nn

from hess_plugin.adapting import Family
from hess_plugin.exceptions import AdapterError
from hess_plugin.sites import Site

from .chunks import Chunks, mixes_entries
from .forwards import Run, log, replace_forward, restore_lean
from .layers import Unread, run_model


def make_lean(model: nn.Module, family: Family, sites: Sequence[Site], undo: contextlib.ExitStack) -> tuple[str, ...]:
    """Make the modules of a model run in little memory.

    Args:
        model: the model.
        family: names what may be run in chunks, and what is never read.
        sites: theirs is to change by others: left alone here.
        undo: gets what gives every module back.

    Returns:
        What was done, in words.

    Raises:
        AdapterError: the family names a module that the model does not have.
    """
    taken = {id(site.module) for site in sites}
    chunked = []
    for name, axis in dict([*((head, 1) for head in family.frame_heads), *family.separable]).items():
        module = family_module(model, name)
        if id(module) in taken or mixes_entries(module):
            log.warning("%s is not run in chunks: its entries are not treated alone", name)
        elif _replaced(module, name, Chunks(name, axis), undo):
            chunked.append(name)
    done = [f"attention of {len(sites)} sites in groups of heads"]
    if chunked:
        done.append(f"{len(chunked)} modules in chunks: {_summary(chunked)}")
    layers = family.joined_layers
    if layers is not None:
        count = len(list(family_module(model, layers.blocks[0]).children()))
        if _replaced(family_module(model, layers.module), layers.module, Unread(layers), undo) and _replaced(
            model, "the model", run_model, undo
        ):
            read = ", ".join(str(index) for index in layers.read)
            done.append(f"of {count} layers of {layers.module} only those that are read are made: {read}")
    return tuple(done)


def unmake_lean(model: nn.Module) -> None:
    """Undo `make_lean` on a model whose handle is lost, or on a deepcopy of a lean model."""
    for module in model.modules():
        restore_lean(module)


def _replaced(module: nn.Module, name: str, run: Run, undo: contextlib.ExitStack) -> bool:
    """Replace one forward; say so where another tool's stays."""
    given_back = replace_forward(module, run)
    if given_back is None:
        log.warning("%s keeps the forward that another tool gave it, and the memory that takes", name)
        return False
    undo.callback(given_back)
    return True


def family_module(model: nn.Module, name: str) -> nn.Module:
    """The module of a model that its family names.

    Raises:
        AdapterError: the model does not have it.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise AdapterError(
            f"the adapter's hess_describe_family names {name!r}, which {type(model).__name__} does not have; name "
            "modules as in model.named_modules()."
        ) from error


def _summary(names: Sequence[str]) -> str:
    """Names, those that differ by an index taken together: ``decoder.*``."""
    patterns = [".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names]
    return ", ".join(dict.fromkeys(patterns))
