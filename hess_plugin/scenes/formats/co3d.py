"""CO3D version 2, as it is downloaded.

    <category>/frame_annotations.jgz            camera and files of every frame
    <category>/sequence_annotations.jgz         quality and point cloud of every sequence
    <category>/set_lists/set_lists_<subset>.json    {"train": [[sequence, frame number, image], ...], "val", "test"}
    <category>/<sequence>/{images, depths, depth_masks, masks}/, pointcloud.ply

Sequences are chosen as VGGT's evaluation chooses them: of one split of one subset, those whose cameras are good and
which have enough frames. One scene is one sequence, seen from its frames in that split.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hess_plugin.exceptions import SceneError
from hess_plugin.scenes.clouds import read_cloud
from hess_plugin.scenes.formats.co3d_frames import Frame
from hess_plugin.scenes.formats.co3d_lists import read_sequences, read_set_list, sequence_name, viewpoint_quality
from hess_plugin.scenes.formats.co3d_records import read_records
from hess_plugin.scenes.sources import SceneSource, View

FRAMES = "frame_annotations.jgz"
SEQUENCES = "sequence_annotations.jgz"
FARTHEST = 1e5
"""Sequences with a larger sum over a T were not reconstructed; VGGT's evaluation passes them over, too."""

OPTIONS = {
    "subset": "set list to take sequences from (fewview_dev)",
    "split": "train, val, test or all (test)",
    "category": "categories, joined by + (all)",
    "quality": "viewpoint_quality_score that a sequence must exceed, or any (0.5)",
    "frames": "least number of frames a sequence must have (50)",
    "foreground": "yes keeps depth only where the object is (no)",
}


@dataclass(frozen=True)
class _Rules:
    """Which sequences are taken, and how they are read."""

    subset: str
    split: str
    quality: float | None
    frames: int
    foreground: bool


@dataclass(frozen=True)
class _Sequence:
    """What the annotations say of one sequence."""

    folder: Path
    name: str
    wanted: Mapping[int, str]
    frames: Mapping[int, str]
    list_file: Path
    foreground: bool

    def views(self) -> list[View]:
        """The frames as views, in the order of their numbers."""
        file = self.folder / FRAMES
        result = []
        for number, path in sorted(self.wanted.items()):
            told = f"CO3D file {file}: sequence {self.name}, frame {number}"
            if number not in self.frames:
                raise SceneError(f"{told} is missing, {self.list_file} names it; download the two again.")
            view = Frame(json.loads(self.frames[number]), told, self.folder.parent).view(self.foreground)
            if view.name != str(self.folder.parent / path):
                raise SceneError(f"{told}: image.path leads to {view.name}, {self.list_file} says {path!r}.")
            result.append(view)
        return result


def find_sources(
    root: Path,
    *,
    subset: str = "fewview_dev",
    split: str = "test",
    category: str | None = None,
    quality: str = "0.5",
    frames: str = "50",
    foreground: str = "no",
) -> list[SceneSource]:
    """The sequences of a CO3D folder, named ``category/sequence``; see `OPTIONS` for what the arguments mean.

    The annotations of every category asked for are read once, here; images only when a scene is.

    Args:
        root: the dataset's folder, or that of one category.
        subset: name of a set list.
        split: part of that list, or ``all``.
        category: several are joined by ``+``; None = all that the folder has.
        quality: a number, or ``any``.
        frames: a whole number.
        foreground: ``yes`` or ``no``.

    Raises:
        SceneError: when an option is malformed, an annotation file is missing or damaged, or no sequence is left.
    """
    rules = _Rules(subset, split, _quality(quality), _frames(frames), _yes(foreground))
    out: Counter[str] = Counter()
    sources = [source for folder in _categories(root, category) for source in _category(folder, rules, out)]
    if not sources:
        raise SceneError(
            f"No sequence of {root} is left of split {split} of {subset}: {out['quality']} have a "
            f"viewpoint_quality_score up to {quality}, {out['frames']} fewer than {frames} frames, {out['far']} no "
            "usable cameras; lower quality= or frames=."
        )
    return sources


def _categories(root: Path, wanted: str | None) -> list[Path]:
    if not root.is_dir():
        raise SceneError(f"CO3D folder {root} is not a folder; give the dataset's, or that of one category.")
    root = Path(os.path.abspath(root))  # paths in the annotations begin with the category's name, also for `.`
    found = [root] if (root / FRAMES).is_file() else sorted(c for c in root.iterdir() if (c / FRAMES).is_file())
    if not found:
        raise SceneError(f"Folder {root} holds no CO3D category: neither it nor a folder in it has a {FRAMES}.")
    if wanted is None:
        return found
    names = set(wanted.split("+"))
    missing = sorted(names - {folder.name for folder in found})
    if missing:
        has = ", ".join(folder.name for folder in found)
        raise SceneError(f"CO3D folder {root} has no category {missing[0]!r}; it has: {has}.")
    return [folder for folder in found if folder.name in names]


def _category(folder: Path, rules: _Rules, out: Counter[str]) -> list[SceneSource]:
    list_file, wanted = read_set_list(folder, rules.subset, rules.split)
    known = read_sequences(folder / SEQUENCES)
    good = {}
    for name, numbers in wanted.items():
        score = viewpoint_quality(folder / SEQUENCES, known, name)
        if rules.quality is not None and not score > rules.quality:
            out["quality"] += 1
        elif len(numbers) < rules.frames:
            out["frames"] += 1
        else:
            good[name] = numbers
    if not good:
        return []
    frames, far = _frames_of(folder / FRAMES, good)
    out["far"] += len(far)
    sources = []
    for name in sorted(set(good) - far):
        sequence = _Sequence(folder, name, good[name], frames[name], list_file, rules.foreground)
        cloud = _cloud(folder, known[name])
        sources.append(SceneSource(f"{folder.name}/{name}", folder / name, sequence.views, cloud))
    return sources


def _frames_of(path: Path, good: Mapping[str, Mapping[int, str]]) -> tuple[dict[str, dict[int, str]], set[str]]:
    """By sequence the text of the wanted frames' records, and the sequences with a camera out of all range."""
    frames: dict[str, dict[int, str]] = {name: {} for name in good}
    far = set()
    for record, text in read_records(path):
        name, number = sequence_name(path, record), record.get("frame_number")
        if name not in good or not isinstance(number, int) or number not in good[name]:
            continue
        frames[name][number] = text
        if _is_far(record):
            far.add(name)
    return frames, far


def _is_far(record: Mapping[str, Any]) -> bool:
    viewpoint = record.get("viewpoint")
    shift = viewpoint.get("T") if isinstance(viewpoint, dict) else None
    if not isinstance(shift, list) or not all(isinstance(value, int | float) for value in shift):
        return False  # told, with its name, when the scene is read
    return sum(shift) > FARTHEST


def _cloud(folder: Path, record: Mapping[str, Any]) -> functools.partial[Tensor] | None:
    cloud = record["point_cloud"]
    if cloud is None:
        return None
    name = cloud.get("path") if isinstance(cloud, dict) else None
    return functools.partial(_read_points, folder, name)


def _read_points(folder: Path, name: object) -> Tensor:
    if not isinstance(name, str) or not (folder.parent / name).is_file():
        raise SceneError(
            f"CO3D file {folder / SEQUENCES}: point_cloud.path is {name!r}, a file in {folder.parent} was wanted; "
            "download it again."
        )
    return read_cloud(folder.parent / name)


def _quality(value: str) -> float | None:
    try:
        number = None if value == "any" else float(value)
    except ValueError:
        number = math.nan
    if number is not None and math.isnan(number):
        raise SceneError(f"quality is {value!r}, a number or any was wanted.")
    return number


def _frames(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise SceneError(f"frames is {value!r}, a whole number from 1 on was wanted.")
    return int(value)


def _yes(value: str) -> bool:
    if value not in ("yes", "no"):
        raise SceneError(f"foreground is {value!r}, yes or no was wanted.")
    return value == "yes"
