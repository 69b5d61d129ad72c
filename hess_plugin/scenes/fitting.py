"""Scenes at the size a model takes, resized when they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from hess_plugin.scenes.scene import Scene


class FittedScenes(Sequence[Scene]):
    """Another sequence of scenes, each fitted to a model's image size (`Scene.fitted`) when it is asked for."""

    def __init__(self, scenes: Sequence[Scene], multiple: int, longest: int | None = None) -> None:
        """Remember how to fit.

        Args:
            scenes: the scenes.
            multiple: image sides become multiples of this.
            longest: largest image side in pixels; None keeps each scene's own.
        """
        self._scenes, self._multiple, self._longest = scenes, multiple, longest

    def __len__(self) -> int:
        """Number of scenes."""
        return len(self._scenes)

    @overload
    def __getitem__(self, index: int) -> Scene: ...
    @overload
    def __getitem__(self, index: slice) -> FittedScenes: ...
    def __getitem__(self, index: int | slice) -> Scene | FittedScenes:
        """Read and fit one scene, or narrow to some of them."""
        if isinstance(index, slice):
            return FittedScenes(self._scenes[index], self._multiple, self._longest)
        return self._scenes[index].fitted(self._multiple, self._longest)
