"""Checks of what the hooks answer: claim, family, sites, token layout, prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hess_plugin.plugins import resolve_adapter
from hess_plugin.predictions import Prediction
from hess_plugin.sites import PROJECTIONS, TokenLayout

from .case import Case, finite


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


class Announced:
    """Notes the layouts that the adapter announces while the context is open, by layout module."""

    def __init__(self, case: Case, model: nn.Module) -> None:
        self.layouts: dict[str, list[TokenLayout]] = {}
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

        return note
