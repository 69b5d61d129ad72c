"""Plain folders of images, of which nothing else is known.

    <folder>/*.jpg                  one scene, or
    <folder>/<scene>/*.jpg          one scene for each folder in it that has images

Images are taken in the order in which people number them, ``img2`` before ``img10``, and turned upright.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

from hess_plugin.exceptions import SceneError
from hess_plugin.scenes.images import read_image
from hess_plugin.scenes.sources import SceneSource, View

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
LEAST = 2
_DIGITS = re.compile(r"(\d+)")


def find_sources(root: Path) -> list[SceneSource]:
    """The folders of images at `root`: itself, or those in it, each named after its folder.

    Hidden files, files of other kinds and folders without images are passed over.

    Raises:
        SceneError: when there is none, or one has fewer than two images.
    """
    if not root.is_dir():
        raise SceneError(f"Image folder {root} is not a folder; give one that holds images.")
    if find_images(root):
        return [_source(root)]
    folders = [child for child in root.iterdir() if child.is_dir() and not child.name.startswith(".")]
    sources = [
        _source(folder) for folder in sorted(folders, key=lambda path: natural(path.name)) if find_images(folder)
    ]
    if not sources:
        raise SceneError(
            f"Folder {root} holds no images, nor does a folder in it; names that end in "
            f"{', '.join(sorted(SUFFIXES))} are wanted."
        )
    return sources


def find_images(folder: Path) -> list[Path]:
    """The image files of a folder in natural order."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    return sorted((path for path in files if path.is_file()), key=lambda path: natural(path.name))


def natural(name: str) -> tuple[list[str | int], str]:
    """A key that sorts names by the numbers in them, without regard to case; equal only for equal names."""
    # Splitting by a group gives text and digits in turns, so that the same places are compared with the same kind.
    parts: list[str | int] = [int(part) if i % 2 else part for i, part in enumerate(_DIGITS.split(name.casefold()))]
    return parts, name


def _source(folder: Path) -> SceneSource:
    images = find_images(folder)
    if len(images) < LEAST:
        raise SceneError(f"Image folder {folder} has only {images[0].name}; a scene needs at least {LEAST} images.")
    views = functools.partial(_views, images)
    # Not resolve(): links to one folder are two scenes by two names.
    return SceneSource(Path(os.path.abspath(folder)).name, folder, views)


def _views(images: list[Path]) -> list[View]:
    # No camera is known here, so nothing is lost by turning the images the way they were seen.
    return [View(str(path), functools.partial(read_image, path, upright=True)) for path in images]
