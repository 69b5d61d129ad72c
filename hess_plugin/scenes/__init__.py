"""Scenes: what they are, how they are read and written."""

from __future__ import annotations

from hess_plugin.framing import Framing
from hess_plugin.scenes.formats.folder import find_folders, read_folder
from hess_plugin.scenes.image_set import ImageSet
from hess_plugin.scenes.reading import FORMATS, LazyScenes, SceneFormat, read_scenes
from hess_plugin.scenes.scene import Scene
from hess_plugin.scenes.sources import SceneSource, View
from hess_plugin.scenes.writing import write_folder

__all__ = [
    "FORMATS",
    "Framing",
    "ImageSet",
    "LazyScenes",
    "Scene",
    "SceneFormat",
    "SceneSource",
    "View",
    "find_folders",
    "read_folder",
    "read_scenes",
    "write_folder",
]
