"""Presets: what they stand for, what goes before them, and that commands know them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from hess_plugin import PatchError, Profile, ProfileError, patch
from hess_plugin.block_order import BLOCK_ORDERS
from hess_plugin.commands import options
from hess_plugin.demo.model import load_demo_model
from hess_plugin.plugins import resolve_adapter
from hess_plugin.presets import DEFAULT, KEY, PRESETS, Preset, find_preset, preset_name
from hess_plugin.profiles import weights_fingerprint
from hess_plugin.settings import Settings, make_settings
from hess_plugin.sparsity import SELECTORS


@pytest.fixture(scope="module")
def profile() -> Profile:
    """Random traces and harm curves of the demo model."""
    sites = resolve_adapter(load_demo_model()).sites(load_demo_model())
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    layers, heads = len(sites), sites[0].num_heads
    return Profile(
        adapter="vggt",
        sites=tuple(site.key for site in sites),
        num_heads=heads,
        scenes=("a", "b"),
        traces={f"{e}.{p}": draw(2, layers, heads) for e in ("camera", "points") for p in ("q", "k", "v")},
        camera_weight=0.5,
        fingerprint=weights_fingerprint(sites),
        harm={
            **{e: draw(2, layers, heads, 3).sort(-1, descending=True).values for e in ("camera", "points")},
            "shares": torch.tensor([[0.1, 0.3, 0.6]] * 2, dtype=torch.float64),
        },
    )


def made(profile: Profile | None, **given: Any) -> Settings:
    return make_settings(profile=profile, **given)


def test_the_default_is_the_method_as_published() -> None:
    settings = made(None)
    assert (settings.selector, settings.pool_q, settings.pool_k, settings.block_order) == ("mass", None, None, "raster")
    assert settings.allocation == "uniform" and settings.selection == "mass"


def test_accurate_chooses_by_what_blocks_change(profile: Profile) -> None:
    preset = PRESETS["accurate"]
    settings = made(profile, preset="accurate")
    assert settings.selector == preset.selector == "restore"
    assert settings.pool_q == 128 // preset.parts_q
    assert settings.allocation == "harm"
    assert made(dataclasses.replace(profile, harm={}), preset="accurate").allocation == "hess"
    assert made(profile, preset="accurate", cdf_threshold=0.7).allocation == "hess"
    assert made(None, preset="accurate").allocation == "uniform"


def test_what_is_given_goes_before_the_preset(profile: Profile) -> None:
    settings = made(profile, preset="accurate", allocation="equal", block_order="tiles")
    assert (settings.allocation, settings.block_order, settings.selector) == ("equal", "tiles", "restore")
    assert made(profile, preset="accurate", pool_q=32).pool_q == 32
    # Another selector is another method: the preset's pieces do not go with it unasked.
    assert made(profile, preset="accurate", selector="mass").pool_q is None


def test_without_usable_curves_budgets_go_by_score(profile: Profile) -> None:
    none = {name: torch.full_like(curves, torch.nan) for name, curves in profile.harm.items()}
    found = dataclasses.replace(profile, harm=none, metadata={KEY: "accurate"})
    assert found.has_harm and made(found).allocation == "hess"
    of_points = dataclasses.replace(profile, harm={**profile.harm, "camera": none["camera"]}, camera_weight=1.0)
    assert made(of_points, preset="accurate").allocation == "hess"
    assert made(dataclasses.replace(of_points, camera_weight=0.5), preset="accurate").allocation == "harm"


@pytest.mark.parametrize("block", [1, 2, 3, 5, 128])
def test_pieces_divide_blocks_of_every_size(block: int) -> None:
    for preset in (*PRESETS.values(), Preset("restore", 4, 6)):
        for name, size in preset.selection(block, block).items():
            assert not name.startswith("pool") or size is None or block % size == 0
    assert made(None, preset="accurate", block_q=block, block_k=block).block_q == block


def test_a_profile_remembers_its_preset(profile: Profile) -> None:
    assert preset_name(None) == preset_name(profile) == DEFAULT
    own = dataclasses.replace(profile, metadata={KEY: "accurate"})
    assert made(own).selector == "restore"
    assert made(own, preset="hess").selector == "mass"
    model = load_demo_model()
    with patch(model, profile=own, sparsity=0.5, block_q=8, block_k=8) as handle:
        assert handle.report().settings["selector"] == "restore"
        assert handle.report().allocation == "harm"


def test_unknown_presets_are_refused(profile: Profile) -> None:
    with pytest.raises(PatchError, match="preset is 'best', wanted one of hess, balanced, accurate"):
        find_preset("best", None)
    with pytest.raises(PatchError, match=r"preset is \['hess'\], wanted one of"):
        find_preset(["hess"], None)  # type: ignore[arg-type]
    assert preset_name(dataclasses.replace(profile, metadata={KEY: None})) == DEFAULT
    with pytest.raises(ProfileError, match=r"calibrated for the preset .later..*upgrade"):
        find_preset(None, dataclasses.replace(profile, metadata={KEY: "later"}))


@pytest.mark.parametrize("size", [0, -8, 8.0, None])
def test_a_wrong_block_size_is_told_as_ever(size: Any) -> None:
    with pytest.raises(PatchError, match="block_q is"):
        made(None, preset="accurate", block_q=size)


@pytest.mark.parametrize("given", [{"pool_q": 5}, {"pool_k": 48}, {"pool_q": 0}, {"pool_k": 2.0}, {"pool_q": True}])
def test_pieces_have_to_divide_their_block(given: dict[str, Any]) -> None:
    with pytest.raises(PatchError, match=r"pool_[qk] is .*, wanted a divisor of the (128|64) tokens"):
        made(None, **given)


def test_commands_offer_what_there_is() -> None:
    assert tuple(PRESETS) == options.PRESETS
    assert tuple(SELECTORS) == options.SELECTORS
    assert tuple(BLOCK_ORDERS) == options.BLOCK_ORDERS
