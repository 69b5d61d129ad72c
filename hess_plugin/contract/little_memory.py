"""A check that inference in little memory predicts the same, with everything cut that may be cut."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from hess_plugin import attention
from hess_plugin.adapting import Family
from hess_plugin.exceptions import HessError
from hess_plugin.memory import chunks
from hess_plugin.memory.lean import make_lean
from hess_plugin.predictions import Prediction
from hess_plugin.registration.registry import one_line

from .case import Case, finite

_TOLERANCE = 1e-3  # of the largest number: chunks round in their own way, through all layers
_SEPARABLE = "treats the entries along that axis of its tensors alone"


def lean_predicts_the_same(case: Case) -> str | None:
    """``patch(memory="lean")`` changes no prediction, but for rounding, also where little is worked on at once."""
    plain, family = case.predict(), case.adapter.family(case.model)
    with smallest_pieces():
        problem = _problem(case, plain, family)
        if problem is not None:
            return f"{problem}{_blame(case, plain, family)}"
    # Blocks are chosen by values: what rounds otherwise in a chunk may exchange two, so only heads are grouped here.
    with case.patched():
        plain = case.predict()
    with smallest_pieces(chunk=chunks.CHUNK), case.patched(memory="lean"):
        problem = _difference(plain, case.predict())
    return None if problem is None else f"with heads in groups, {problem}; report it with the model's code"


@contextlib.contextmanager
def smallest_pieces(chunk: int = 1) -> Iterator[None]:
    """Make chunks, and groups of heads, as small as they can be while the context lasts."""
    before = chunks.CHUNK, attention.GROUP
    chunks.CHUNK, attention.GROUP = chunk, 1
    try:
        yield
    finally:
        chunks.CHUNK, attention.GROUP = before


def _problem(case: Case, plain: Prediction, family: Family) -> str | None:
    """What is wrong with the prediction of the dense model in little memory."""
    with contextlib.ExitStack() as undo:
        try:
            make_lean(case.model, family, case.sites(), undo)
            return _difference(plain, case.predict())
        except HessError as error:
            return one_line(error)
        except Exception as error:  # a module that is given a part of what it wants may raise anything
            return f"{type(error).__name__}: {one_line(error)}"


def _blame(case: Case, plain: Prediction, family: Family) -> str:
    """Say which part of the family's description is wrong, by trying one at a time."""
    nothing = replace(family, separable=(), frame_heads=(), joined_layers=None)
    for entry in family.separable:
        if _problem(case, plain, replace(nothing, separable=(entry,))) is not None:
            return f"; Family(separable=...) has {entry!r}, name there only what {_SEPARABLE}"
    for head in family.frame_heads:
        if _problem(case, plain, replace(nothing, frame_heads=(head,))) is not None:
            return f"; Family(frame_heads=...) has {head!r}, name there only heads that treat frames, axis 1, alone"
    if family.joined_layers is not None:
        return f"; Family(joined_layers=...) reads {list(family.joined_layers.read)}, add what else the model reads"
    return f"; Family(separable=...) must name only what {_SEPARABLE}"


def _difference(plain: Prediction, lean: Prediction) -> str | None:
    if not finite(lean):
        return "the prediction is not finite"
    for name in ("c2w", "points", "confidence"):
        wanted, found = getattr(plain, name), getattr(lean, name)
        if wanted.shape != found.shape:
            return f"{name} has shape {list(found.shape)} instead of {list(wanted.shape)}"
        worst, scale = (found - wanted).abs().max().item(), wanted.abs().max().item()
        if not worst <= _TOLERANCE * max(scale, 1e-6):
            return f"{name} differs by {worst:.2e} of {scale:.2e}"
    return None
