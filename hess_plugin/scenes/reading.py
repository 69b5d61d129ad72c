"""`read_scenes("co3d:/data/co3d")`: scenes by format name, loaded one at a time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

from hess_plugin.exceptions import SceneError
from hess_plugin.framing import Framing
from hess_plugin.scenes.choice import choose
from hess_plugin.scenes.formats import co3d, colmap, eth3d, mvsnet, photos, rooms, seven_scenes, tum
from hess_plugin.scenes.formats.folder import find_sources as find_folder_sources
from hess_plugin.scenes.image_set import ImageSet
from hess_plugin.scenes.scene import Scene
from hess_plugin.scenes.sources import SceneSource

_OPTION = re.compile(r",(\w+)=([^,]*)$")


@dataclass(frozen=True)
class SceneFormat:
    """One format in which scenes are recorded.

    Attributes:
        find: all scenes under a folder, without opening an image, in a fixed order; called with the folder and
            the options of the spec as keyword arguments.
        layout: what the folder holds, for messages and the README.
        options: names that ``FORMAT:FOLDER,name=value`` may set, and what they mean.
        truth: whether its scenes have true cameras.
        folder: whether what follows the name is a folder, which must exist.
    """

    find: Callable[..., Sequence[SceneSource]]
    layout: str
    options: dict[str, str]
    truth: bool = True
    folder: bool = True


FORMATS: dict[str, SceneFormat] = {
    "folder": SceneFormat(find_folder_sources, "folders with cameras.json, images/, depth/, points.ply", {}),
    "co3d": SceneFormat(co3d.find_sources, "CO3Dv2 categories with frame_annotations.jgz", co3d.OPTIONS),
    "images": SceneFormat(photos.find_sources, "images, or folders of images", {}, truth=False),
    "colmap": SceneFormat(colmap.find_sources, "images/ and a COLMAP model in sparse/", colmap.OPTIONS),
    "eth3d": SceneFormat(eth3d.find_sources, "ETH3D scenes with dslr_calibration_jpg/", eth3d.OPTIONS),
    "dtu": SceneFormat(mvsnet.find_sources, "MVSNet's layout: images/ and cams/, or Rectified/", mvsnet.OPTIONS),
    "7scenes": SceneFormat(seven_scenes.find_sources, "7-Scenes sequences seq-01/, ...", seven_scenes.OPTIONS),
    "tum": SceneFormat(tum.find_sources, "TUM RGB-D scenes with rgb.txt and groundtruth.txt", tum.OPTIONS),
    "rooms": SceneFormat(rooms.find_sources, "the demo's rooms; a split, no folder", rooms.OPTIONS, folder=False),
}


class LazyScenes(Sequence[Scene | ImageSet]):
    """Scenes that are read when they are asked for and not kept: one in memory at a time."""

    def __init__(self, sources: Sequence[SceneSource], views: int | None, seed: int, framing: Framing | None) -> None:
        """Remember where the scenes are; nothing is read."""
        self._sources, self._views, self._seed, self._framing = list(sources), views, seed, framing

    @property
    def names(self) -> list[str]:
        """The scenes' names, without reading them."""
        return [source.name for source in self._sources]

    def framed(self, framing: Framing) -> LazyScenes:
        """The same scenes at the size a model takes."""
        return LazyScenes(self._sources, self._views, self._seed, framing)

    def __len__(self) -> int:
        """Number of scenes."""
        return len(self._sources)

    @overload
    def __getitem__(self, index: int) -> Scene | ImageSet: ...
    @overload
    def __getitem__(self, index: slice) -> LazyScenes: ...
    def __getitem__(self, index: int | slice) -> Scene | ImageSet | LazyScenes:
        """Read one scene, or narrow to some of them without reading."""
        if isinstance(index, slice):
            return LazyScenes(self._sources[index], self._views, self._seed, self._framing)
        return self._sources[index].read(max_views=self._views, seed=self._seed, framing=self._framing)


def read_scenes(
    specs: str | Sequence[str],
    *,
    scenes: int | None = None,
    views: int | None = None,
    seed: int = 0,
    framing: Framing | None = None,
) -> LazyScenes:
    """The scenes that one or several specs name, loaded lazily.

    Args:
        specs: ``"FORMAT:FOLDER"``, for example ``"folder:/data/scenes"``; some formats take options,
            ``"FORMAT:FOLDER,name=value"``. Several specs make one sequence.
        scenes: at most so many scenes of all that the specs name, drawn at random with `seed`, in their own
            order; None = all.
        views: at most so many views of each, drawn at random with `seed`, in recorded order; None = all.
        seed: the same seed chooses the same scenes and views.
        framing: size the scenes are brought to as they are read; None keeps their own.

    Raises:
        SceneError: when a format or option is not known, a folder holds no scene or nothing is asked for; later,
            on access, when a scene is malformed.
    """
    specs = [specs] if isinstance(specs, str) else list(specs)
    choose(1, views, seed)  # a wrong number of views is told now, not after the first hours of a run
    found = _distinct([(spec, source) for spec in specs for source in _find(spec)])
    chosen = [found[i] for i in choose(len(found), scenes, seed)]
    return LazyScenes(chosen, views, seed, framing)


def with_and_without_truth(specs: Sequence[str]) -> bool:
    """Whether some of the specs name scenes with true cameras and others scenes without; nothing is read."""
    formats = [FORMATS.get(spec.partition(":")[0]) for spec in specs]
    return len({form.truth for form in formats if form is not None}) > 1


def _find(spec: str) -> Sequence[SceneSource]:
    name, colon, where = spec.partition(":")
    known = ", ".join(sorted(FORMATS))
    if name not in FORMATS:
        raise SceneError(f"Scenes {spec!r} have no known format; write FORMAT:FOLDER with one of: {known}.")
    form, options = FORMATS[name], {}
    while (match := _OPTION.search(where)) is not None and not Path(where).expanduser().exists():
        options[match[1]] = match[2]
        where = where[: match.start()]
    if not colon or not where:
        raise SceneError(f"Scenes {spec!r} name no folder; write {name}:FOLDER.")
    wrong = sorted(set(options) - set(form.options))
    if wrong:
        allowed = ", ".join(form.options) or "none"
        raise SceneError(f"Scenes {spec!r} set {wrong[0]!r}; the options of {name} are: {allowed}.")
    folder = Path(where).expanduser()
    if form.folder and not folder.exists():
        raise SceneError(f"Scene folder {folder} does not exist; give a folder that holds {form.layout}.")
    return form.find(folder, **options)


def _distinct(found: Sequence[tuple[str, SceneSource]]) -> list[SceneSource]:
    """One name a scene: those that several specs share get their spec in front."""
    count = Counter(source.name for _, source in found)
    result = [
        source if count[source.name] == 1 else replace(source, name=f"{spec.partition(',')[0]}/{source.name}")
        for spec, source in found
    ]
    twice = [name for name, number in Counter(source.name for source in result).items() if number > 1]
    if twice:
        raise SceneError(f"Scene {twice[0]} is given twice; name every folder once.")
    return result
