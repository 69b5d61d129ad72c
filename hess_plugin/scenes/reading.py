"""`read_scenes("folder:DIR")`: scenes by format name, loaded one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

from hess_plugin.exceptions import SceneError
from hess_plugin.scenes.choice import choose
from hess_plugin.scenes.folder import find_folders, read_folder
from hess_plugin.scenes.scene import Scene


@dataclass(frozen=True)
class SceneFormat:
    """How scenes of one format are found and read.

    Attributes:
        find: all scenes under a folder, without loading them, in a fixed order.
        read: one scene, from what `find` gave, with `max_views` and `seed` as in `read_folder`.
        describe: the name of one scene, from what `find` gave.
    """

    find: Callable[[Path], list[Path]]
    read: Callable[..., Scene]
    describe: Callable[[Path], str]


FORMATS: dict[str, SceneFormat] = {
    "folder": SceneFormat(find_folders, read_folder, lambda path: path.resolve().name),
}


class LazyScenes(Sequence[Scene]):
    """Scenes that are read when they are asked for and not kept: one in memory at a time."""

    def __init__(self, form: SceneFormat, sources: Sequence[Path], views: int | None, seed: int) -> None:
        """Remember where the scenes are; nothing is read."""
        self._format, self._sources, self._views, self._seed = form, list(sources), views, seed

    @property
    def names(self) -> list[str]:
        """The scenes' names, without reading them."""
        return [self._format.describe(source) for source in self._sources]

    def __len__(self) -> int:
        """Number of scenes."""
        return len(self._sources)

    @overload
    def __getitem__(self, index: int) -> Scene: ...
    @overload
    def __getitem__(self, index: slice) -> LazyScenes: ...
    def __getitem__(self, index: int | slice) -> Scene | LazyScenes:
        """Read one scene, or narrow to some of them without reading."""
        if isinstance(index, slice):
            return LazyScenes(self._format, self._sources[index], self._views, self._seed)
        source = self._sources[index]
        scene = self._format.read(source, max_views=self._views, seed=self._seed)
        # One name a scene, the unique one of `names`: a folder may call itself something else, or like another.
        name = self._format.describe(source)
        return scene if scene.name == name else replace(scene, name=name)


def read_scenes(spec: str, *, scenes: int | None = None, views: int | None = None, seed: int = 0) -> LazyScenes:
    """The scenes that `spec` names, loaded lazily.

    Args:
        spec: `"format:folder"`, for example `"folder:/data/scenes"`.
        scenes: at most so many scenes, drawn at random with `seed`, in their own order; None = all.
        views: at most so many views of each, drawn at random with `seed`, in recorded order; None = all.
        seed: the same seed chooses the same scenes and views.

    Raises:
        SceneError: when the format is not known, the folder holds no scene or nothing is asked for; later, on
            access, when a scene is malformed.
    """
    name, colon, where = spec.partition(":")
    known = ", ".join(sorted(FORMATS))
    if name not in FORMATS:
        raise SceneError(f"Scenes {spec!r} have no known format; write FORMAT:FOLDER with one of: {known}.")
    if not colon or not where:
        raise SceneError(f"Scenes {spec!r} name no folder; write {name}:FOLDER.")
    choose(1, views, seed)  # a wrong number of views is told now, not after the first hours of a run
    found = FORMATS[name].find(Path(where).expanduser())
    chosen = [found[i] for i in choose(len(found), scenes, seed)]
    return LazyScenes(FORMATS[name], chosen, views, seed)
