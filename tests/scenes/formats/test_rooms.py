"""The demo's rooms by name: the scenes that the demo itself takes."""

from __future__ import annotations

import pytest
import torch

from hess_plugin import SceneError
from hess_plugin.demo.rooms import HALLS, ROOMS, kind_of, render_room, seeds
from hess_plugin.demo.scenes import RoomScenes
from hess_plugin.framing import Framing
from hess_plugin.scenes.image_set import require_truth
from hess_plugin.scenes.reading import read_scenes
from hess_plugin.scenes.scene import Scene


@pytest.mark.parametrize("split", ["calibration", "test", "hall-test"])
def test_they_are_the_demos_own(split: str) -> None:
    found, own = read_scenes(f"rooms:{split},count=2,size=3").framed(Framing(10, 60, "crop")), RoomScenes(split, 2, 3)
    assert found.names == own.names
    for i in range(2):
        mine, theirs = found[i], own[i]
        require_truth(mine, "comparing")
        assert isinstance(mine, Scene)
        for name in ("images", "c2w", "intrinsics", "depth"):
            first, second = getattr(mine, name), getattr(theirs, name)
            assert torch.equal(first.to(second.dtype), second), name


def test_halls_are_another_family() -> None:
    first, second = seeds("hall-test", 1)[0], seeds("test", 1)[0]
    assert kind_of(first) is HALLS and kind_of(second) is ROOMS
    near, far = (render_room(seed, 4, kind=kind_of(seed)).depth for seed in (second, first))
    assert far.max() > near.max() and far.mean() > near.mean()


def test_mistakes() -> None:
    for spec, words in (
        ("rooms:kitchen", "'kitchen' were asked for; the splits are: calibration, test"),
        ("rooms:train", "'train' were asked for"),
        ("rooms:test,count=none", "count=none of rooms was given, a whole number from 1"),
        ("rooms:test,count=0", "count=0"),
        ("rooms:test,size=1000", "size=1000"),
        ("rooms:test,colour=red", "set 'colour'"),
        ("rooms:", "name no folder"),
    ):
        with pytest.raises(SceneError, match=words):
            read_scenes(spec)
