"""Synthetic rooms as a lazily rendered sequence of scenes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

from .rooms import make_scene, seeds

if TYPE_CHECKING:
    from hess_plugin.scenes.scene import Scene


class RoomScenes(Sequence["Scene"]):
    """The first rooms of one split; each is rendered when it is asked for and not kept."""

    def __init__(self, split: str, count: int, views: int) -> None:
        """Name the rooms.

        Args:
            split: ``validation``, ``calibration``, ``test``, ``hall-calibration`` or ``hall-test``; splits share no
                room.
            count: number of rooms.
            views: images of each.
        """
        self._seeds, self._views = seeds(split, count), views

    @property
    def names(self) -> list[str]:
        """The rooms' names, without rendering them."""
        return [f"room-{seed}" for seed in self._seeds]

    def __len__(self) -> int:
        """Number of rooms."""
        return len(self._seeds)

    @overload
    def __getitem__(self, index: int) -> Scene: ...
    @overload
    def __getitem__(self, index: slice) -> list[Scene]: ...
    def __getitem__(self, index: int | slice) -> Scene | list[Scene]:
        """Render one room, or several."""
        if isinstance(index, slice):
            return [make_scene(seed, self._views) for seed in self._seeds[index]]
        return make_scene(self._seeds[index], self._views)
