"""The demo's synthetic rooms by the name of their split, rendered as they are read: ``rooms:test,count=64``."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from hess_plugin.exceptions import SceneError
from hess_plugin.scenes.sources import SceneSource, View

OPTIONS = {"count": "rooms of the split, 64 by default", "size": "images of each, 16 by default"}
_HELD_OUT = ("calibration", "test", "validation", "hall-calibration", "hall-test")


def find_sources(split: Path, count: str = "64", size: str = "16") -> list[SceneSource]:
    """The first rooms of a split, the ones that the demo takes.

    Args:
        split: ``calibration``, ``test`` or ``validation``; ``hall-calibration`` and ``hall-test`` are larger, plainer
            rooms, which the demo model was not trained on.
        count: number of rooms.
        size: number of images of each.

    Raises:
        SceneError: no such split, or a number out of range.
    """
    # The demo builds on scenes, not the other way round; only its renderer is taken, when it is asked for.
    from hess_plugin.demo.rooms import seeds

    if str(split) not in _HELD_OUT:
        raise SceneError(f"Rooms {str(split)!r} were asked for; the splits are: {', '.join(_HELD_OUT)}.")
    rooms, images = _count("count", count, 1_000_000), _count("size", size, 256)
    return [
        SceneSource(f"room-{seed}", Path(f"room-{seed}"), functools.partial(_views, seed, images))
        for seed in seeds(str(split), rooms)
    ]


def _count(name: str, text: str, most: int) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise SceneError(f"Option {name}={text} of rooms was given, a whole number from 1 to {most} was wanted.")
    return int(text)


def _views(seed: int, images: int) -> list[View]:
    from hess_plugin.demo.rooms import kind_of, render_room

    room = render_room(seed, images, kind=kind_of(seed))
    pictures = torch.from_numpy(room.images).permute(0, 3, 1, 2).float() / 255
    c2w, intrinsics = (torch.from_numpy(part).double() for part in (room.c2w, room.intrinsics))
    depth = torch.from_numpy(room.depth)
    return [
        View(
            f"room-{seed} image {i}",
            functools.partial(pictures.__getitem__, i),
            c2w[i],
            intrinsics[i],
            functools.partial(depth.__getitem__, i),
        )
        for i in range(images)
    ]
