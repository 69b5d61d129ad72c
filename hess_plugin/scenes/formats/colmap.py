"""COLMAP: images and the model reconstructed from them.

    <scene>/images/             the images, in any subfolders that the model names
    <scene>/sparse/0/           cameras, images and points3D, .bin or .txt; sparse/1 and so on are further scenes
    <scene>/sparse/             or the model without a number

Registered images become views, by name; lens distortion is removed; the triangulated points are the cloud. The root
is one scene or a folder of scenes.
"""

from __future__ import annotations

import functools
from pathlib import Path

from torch import Tensor

from hess_plugin.exceptions import SceneError
from hess_plugin.scenes.formats.colmap_model import has_points, is_model, registered_images, triangulated_points
from hess_plugin.scenes.formats.distortion import Lens, undistort_image
from hess_plugin.scenes.formats.textfiles import read_sized_image, scene_folders
from hess_plugin.scenes.sources import SceneSource, View

OPTIONS = {
    "images": "folder of the images, relative to the scene (images)",
    "model": "folder of the model, relative to the scene (sparse/0, sparse/1, ... or sparse)",
    "track": "number of images a point must be seen in to be in the cloud (2)",
}


def find_sources(root: Path, images: str = "images", model: str = "sparse", track: str = "2") -> list[SceneSource]:
    """The scenes at `root`, each named after its folder, and after its model where there are several.

    Args:
        root: a scene or a folder of scenes.
        images: folder of the images, relative to the scene.
        model: folder of the model, or of several models, relative to the scene.
        track: number of images a point must be seen in to be in the cloud.

    Raises:
        SceneError: when there is no scene, no folder of images, or an option is wrong.
    """
    if not track.isdigit() or int(track) < 1:
        raise SceneError(f"COLMAP's option track is {track!r}, a whole number of images was wanted.")
    sources = []
    for scene in scene_folders(
        root,
        lambda folder: bool(_models(folder / model)),
        f"a COLMAP model in {model} (,model=... behind the folder names another place)",
    ):
        if not (scene / images).is_dir():
            raise SceneError(f"COLMAP scene {scene} has no folder {images}; name the one with its images: images=...")
        models = _models(scene / model)
        for found in models:
            name = scene.resolve().name if len(models) == 1 else f"{scene.resolve().name}/{found.name}"
            points = functools.partial(triangulated_points, found, int(track)) if has_points(found) else None
            sources.append(SceneSource(name, found, functools.partial(_views, found, scene / images), points))
    return sources


def read_undistorted(path: Path, lens: Lens) -> Tensor:
    """The image of a camera without its lens distortion, `[3, H, W]`; SceneError when it is not the camera's size."""
    return undistort_image(read_sized_image(path, lens.height, lens.width, "its COLMAP camera"), lens)


def _models(folder: Path) -> list[Path]:
    if is_model(folder):
        return [folder]
    numbered = [child for child in folder.iterdir() if child.name.isdigit()] if folder.is_dir() else []
    return sorted((child for child in numbered if is_model(child)), key=lambda child: int(child.name))


def _views(model: Path, images: Path) -> list[View]:
    views = []
    for posed in registered_images(model):
        path = images / posed.name
        read = functools.partial(read_undistorted, path, posed.lens)
        views.append(View(str(path), read, posed.c2w, posed.lens.pinhole.intrinsics))
    if not views:
        raise SceneError(f"COLMAP model {model} has no registered image; give a model with cameras.")
    return views
