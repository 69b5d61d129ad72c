"""Checks of what the hooks answer: claim, family, sites, token layout, prediction."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hess_plugin.adapting import Family, JoinedLayers
from hess_plugin.exceptions import AdapterError
from hess_plugin.plugins import resolve_adapter
from hess_plugin.predictions import Prediction
from hess_plugin.registration.registry import one_line
from hess_plugin.sites import PROJECTIONS, TokenLayout

from .case import CannotTell, Case, finite


def claimed_once(case: Case) -> str | None:
    """Exactly one adapter claims the model, and it is this one."""
    found = resolve_adapter(case.model, None, case.adapter.manager)
    if found.name == case.adapter.name:
        return None
    return f"{found.name!r} claims it, not {case.adapter.name!r}; make hess_claim_model look at more attributes"


def in_eval_mode(case: Case) -> str | None:
    """No part of the model is in training mode."""
    training = [name or "the model" for name, module in case.model.named_modules() if module.training]
    return f"{training[0]} is in training mode; call model.eval() (hess_load_model has to)" if training else None


def family_fits(case: Case) -> str | None:
    """The family's numbers are usable, the modules it names exist, and the scene has a size it allows."""
    family = case.adapter.family(case.model)
    if not 0 <= family.camera_weight <= 1:
        return f"Family(camera_weight={family.camera_weight!r}) is out of range; give a share, 0 to 1"
    modules = dict(case.model.named_modules())
    for field in ("blocks", "frame_heads", "unused_heads"):
        names = getattr(family, field)
        if isinstance(names, str):
            return f"Family({field}={names!r}) is a string; give a tuple of names: ({names!r},)"
        missing = [name for name in names if name not in modules]
        if missing:
            return f"Family({field}=...) names {missing[0]!r}, which the model does not have; see model.named_modules()"
    return _separable_problem(family, modules) or _layers_problem(family, modules)


def _separable_problem(family: Family, modules: Mapping[str, nn.Module]) -> str | None:
    for entry in family.separable:
        if not isinstance(entry, tuple) or len(entry) != 2 or type(entry[1]) is not int or entry[1] < 0:
            return f"Family(separable=...) holds {entry!r}; give pairs of a name and an axis, 0 or 1: ('head', 1)"
        if entry[0] not in modules:
            return f"Family(separable=...) names {entry[0]!r}, which the model does not have; see model.named_modules()"
    return None


def _layers_problem(family: Family, modules: Mapping[str, nn.Module]) -> str | None:
    layers = family.joined_layers
    if layers is None:
        return None
    if not isinstance(layers, JoinedLayers) or len(layers.blocks) != 2:
        return f"Family(joined_layers={layers!r}) does not fit; give a JoinedLayers with two lists of blocks"
    missing = [name for name in (layers.module, *layers.blocks) if name not in modules]
    if missing:
        return (
            f"Family(joined_layers=...) names {missing[0]!r}, which the model does not have; see model.named_modules()"
        )
    counts = [len(list(modules[name].children())) for name in layers.blocks]
    if counts[0] != counts[1]:
        return f"Family(joined_layers=...) joins {counts[0]} blocks with {counts[1]}; name two lists of equal length"
    wrong = [index for index in layers.read if index not in range(counts[0])]
    if wrong:
        return f"Family(joined_layers=...) reads layer {wrong[0]!r} of {counts[0]}; count from 0, without negative ones"
    return None


def sites_fit(case: Case) -> str | None:
    """Sites are modules of the model, and each projection has the rows of all heads."""
    for site in case.sites():
        missing = [letter for letter in PROJECTIONS if letter not in site.projections]
        if missing:
            return f"{site.name} has no projection {missing[0]!r}; give Site(projections=...) q, k and v"
        for letter in PROJECTIONS:
            rows, wanted = site.head_rows(site.weight(letter), letter).shape[:2], (site.num_heads, site.head_dim)
            if tuple(rows) != wanted:
                return (
                    f"{site.name} projection {letter} has rows {list(rows)}, wanted heads x width {list(wanted)}; "
                    "correct num_heads, head_dim or the projection's start"
                )
    return None


def prediction_fits(case: Case) -> str | None:
    """A prediction has finite cameras, points and confidence of every view, in float32."""
    prediction, views = case.predict(), case.scene.views
    if prediction.c2w.shape[0] != views:
        return f"{prediction.c2w.shape[0]} poses for {views} views; drop the batch axis in hess_predict: output[...][0]"
    for name in ("c2w", "points", "confidence"):
        if getattr(prediction, name).dtype not in (torch.float32, torch.float64):
            return f"{name} is {getattr(prediction, name).dtype}; return {name}.float() from hess_predict"
    if not isinstance(prediction.min_confidence, int | float):
        return f"min_confidence is a {type(prediction.min_confidence).__name__}; give a number"
    if not finite(prediction):
        return "it holds a value that is not finite; initialise the tiny model's weights"
    return _poses_fit(prediction) or _grid_fits(prediction, case)


def _poses_fit(prediction: Prediction) -> str | None:
    rotation = prediction.c2w[:, :3, :3].double()
    identity = torch.eye(3, dtype=torch.float64, device=rotation.device)
    if not torch.allclose(rotation @ rotation.mT, identity.expand_as(rotation), atol=1e-4):
        return "c2w[:, :3, :3] is not a rotation; return camera-to-world poses with OpenCV axes"
    if bool((torch.linalg.det(rotation) < 0).any()):
        return "c2w[:, :3, :3] mirrors; return camera-to-world poses with OpenCV axes (x right, y down, z forward)"
    last = prediction.c2w[:, 3].double().cpu()
    if not torch.allclose(last, torch.tensor([0.0, 0, 0, 1], dtype=torch.float64).expand_as(last), atol=1e-4):
        return "the last row of c2w is not 0 0 0 1; put rotation and centre into an identity matrix"
    return None


def _grid_fits(prediction: Prediction, case: Case) -> str | None:
    """Tell rows and columns apart on an image that is not square."""
    images = case.other_sizes()[1]
    height, width = images.shape[-2:]
    rows, columns = case.predict_at(images).points.shape[1:3]
    if abs(height / rows - width / columns) > abs(height / columns - width / rows):
        return f"points of {height} x {width} pixels have {rows} rows and {columns} columns; exchange the two axes"
    return None


def layout_fits(case: Case) -> str | None:
    """The announced tokens are as many as every site's attention sees, before it sees them."""
    lengths: dict[str, list[int]] = {}
    twin = case.copy()  # whatever a replacement leaves behind must be found by the check that looks for it
    announced = Announced(case, twin)

    def note(name: str, query: Tensor, key: Tensor, value: Tensor) -> None:
        lengths.setdefault(name, []).append(query.shape[-2])

    with case.watched(twin, note), announced:
        case.predict(twin)
    for site in case.sites():
        if site.name not in lengths:
            return f"{site.name} was not called; leave it out of hess_find_global_attention"
        layouts = announced.layouts.get(site.layout_module, [])
        if not layouts:
            return (
                f"{site.layout_module!r}, the layout module of {site.name}, was not called; name the module whose "
                "forward gets the images"
            )
        layout, seen = layouts[-1], lengths[site.name][-1]
        if layout.tokens != seen:
            return (
                f"{site.name} attends over {seen} tokens, hess_token_layout announced {layout.tokens} ({layout}); "
                "correct it"
            )
        if layout.frames != case.scene.views:
            return f"hess_token_layout announced {layout.frames} frames for {case.scene.views} views; correct frames"
    return None


def layout_by_keyword(case: Case) -> str | None:
    """Called with its arguments by name, a layout module has the same tokens."""
    twin, problem = case.copy(), None
    announced = Announced(case, twin)
    with announced:
        case.predict(twin)
    for name, calls in announced.calls.items():
        args, kwargs = calls[-1]
        named = _by_name(twin.get_submodule(name), args, kwargs)
        if named is None:
            raise CannotTell(f"the forward of {name or 'the model'!r} takes arguments by position alone")
        try:
            layout = case.adapter.token_layout(twin, (), named)
        except AdapterError as error:
            problem = one_line(error)
        else:
            wanted = announced.layouts[name][-1]
            problem = None if layout == wanted else f"hess_token_layout announced {layout} instead of {wanted}"
        if problem is not None:
            first = next(iter(named))
            return f"{problem}; take what may come by name from there: args[0] if args else kwargs[{first!r}]"
    return None


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of a call as keywords; None where the first has no name."""
    try:
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    except (TypeError, ValueError):
        return None
    parameters = list(bound.signature.parameters.values())[1:]
    if not parameters or parameters[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return None
    named: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.name not in bound.arguments:
            continue
        value = bound.arguments[parameter.name]
        if parameter.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL):
            return None
        named |= value if parameter.kind is inspect.Parameter.VAR_KEYWORD else {parameter.name: value}
    return named


class Announced:
    """Notes the layouts that the adapter announces while the context is open, and for what, by layout module."""

    def __init__(self, case: Case, model: nn.Module) -> None:
        self.layouts: dict[str, list[TokenLayout]] = {}
        self.calls: dict[str, list[tuple[tuple[Any, ...], Mapping[str, Any]]]] = {}
        self._case, self._model = case, model
        self._hooks: list[Any] = []

    def __enter__(self) -> Announced:
        for name in dict.fromkeys(site.layout_module for site in self._case.sites()):
            module = self._model.get_submodule(name)
            self._hooks.append(module.register_forward_pre_hook(self._note(name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, name: str) -> Any:
        def note(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            layout = self._case.adapter.token_layout(self._model, args, kwargs)
            self.layouts.setdefault(name, []).append(layout)
            self.calls.setdefault(name, []).append((args, kwargs))

        return note
