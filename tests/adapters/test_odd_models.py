"""No built-in adapter fails on, or takes, a model that only looks like its own: anybody's may be asked about."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from hess_plugin import UnknownModel, resolve_adapter
from hess_plugin.plugins import BUILT_IN, get_plugin_manager

LOOKED_AT = (
    "model",
    "da3",
    "backbone",
    "cam_dec",
    "aggregator",
    "decoder",
    "register_token",
    "camera_head",
    "encoder",
    "info_sharing",
    "info_sharing_type",
    "scale_token",
    "dense_adaptor",
)
CLAIMING = [name for name in BUILT_IN if hasattr(importlib.import_module(BUILT_IN[name]), "hess_claim_model")]


def raising(name: str, error: type[Exception]) -> nn.Module:
    """A module with everything that is looked at, one of which raises when it is."""

    def fail(self: Any) -> Any:
        raise error("not yet")

    parts: dict[str, Any] = {part: 1 for part in LOOKED_AT if part != name}
    if name in ("encoder", "info_sharing", "scale_token", "dense_adaptor"):
        parts["info_sharing_type"] = "alternating_attention"  # or these would not be looked at
    return type("Odd", (nn.Module,), {**parts, name: property(fail)})()


def vggt_like(blocks: Any) -> nn.Module:
    """What the claim of VGGT looks at, with these global blocks."""
    model, aggregator = nn.Module(), nn.Module()
    for name in ("frame_blocks", "camera_token", "register_token", "patch_start_idx"):
        setattr(aggregator, name, 1)
    aggregator.global_blocks = blocks
    model.aggregator = aggregator
    return model


def block_with(attention: Any) -> nn.ModuleList:
    block = nn.Module()
    block.attn = attention
    return nn.ModuleList([block])


def unreadable() -> nn.Module:
    """An attention whose forward has no signature that can be read, as builtins have none."""
    return type("Builtin", (nn.Module,), {"forward": type("Odd", (), {"__call__": dict.update})()})()


def within(part: str, error: type[Exception]) -> nn.Module:
    model = nn.Module()
    setattr(model, part, raising("global_blocks", error))
    for name in ("frame_blocks", "inter_frame_blocks", "alt_start"):
        setattr(getattr(model, part), name, 1)
    return model


def da3_like(start: Any) -> nn.Module:
    model = nn.Module()
    model.cam_dec, model.backbone = nn.Module(), nn.Module()
    model.backbone.pretrained = nn.Module()
    model.backbone.pretrained.alt_start = start
    return model


def typed(kind: Any) -> nn.Module:
    model = nn.Module()
    for name in ("encoder", "info_sharing", "scale_token", "dense_adaptor"):
        setattr(model, name, 1)
    model.info_sharing_type = kind
    return model


class Undecided:
    """What a comparison answers that is made for each element, as with arrays."""

    def __eq__(self, other: object) -> Any:
        return self

    __ne__ = __eq__
    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise ValueError("the truth value is ambiguous")


ODD: dict[str, Callable[[], nn.Module]] = {
    **{f"{name}-{error.__name__}": lambda n=name, e=error: raising(n, e)  # type: ignore[misc]
       for name in LOOKED_AT for error in (RuntimeError, KeyError, AttributeError)},
    **{f"{part}.global_blocks-{error.__name__}": lambda p=part, e=error: within(p, e)  # type: ignore[misc]
       for part in ("aggregator", "backbone", "model") for error in (RuntimeError, KeyError)},
    "no blocks": lambda: vggt_like(nn.ModuleList()),
    "blocks are none": lambda: vggt_like(None),
    "blocks without attention": lambda: vggt_like(nn.ModuleList([nn.Linear(2, 2)])),
    "attention is none": lambda: vggt_like(block_with(None)),
    "attention without forward": lambda: vggt_like(block_with(3)),
    "attention without signature": lambda: vggt_like(block_with(unreadable())),
    "alternation at no number": lambda: da3_like(Undecided()),
    "kind of sharing is no word": lambda: typed(Undecided()),
}  # fmt: skip


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_odd_models_are_claimed_by_nobody_and_nothing_fails(make: Callable[[], nn.Module]) -> None:
    model = make()
    for name in CLAIMING:
        assert importlib.import_module(BUILT_IN[name]).hess_claim_model(model) is False, name
    with pytest.raises(UnknownModel, match="no adapter claims"):  # and no warning, which would be an error here
        resolve_adapter(model, None, get_plugin_manager(entry_points=False))


def test_every_adapter_of_a_model_is_asked_here() -> None:
    assert CLAIMING == ["vggt", "pi3", "da3", "vggt-omega", "mapanything"]
