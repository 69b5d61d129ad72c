"""The lists of CO3D: which sequences and frames a subset has, and what is known of a sequence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hess_plugin.exceptions import SceneError
from hess_plugin.scenes.formats.co3d_records import read_records

SetList = dict[str, dict[int, str]]
"""By sequence and frame number the image file, relative to the dataset's folder."""


def read_set_list(category: Path, subset: str, split: str) -> tuple[Path, SetList]:
    """The file of a set list and what one split of it, or ``all`` of them, asks for.

    Raises:
        SceneError: when the category has no such list, the list no such split, or the file is malformed.
    """
    lists = category / "set_lists"
    path = lists / f"set_lists_{subset}.json"
    if not path.is_file():
        others = sorted(file.stem.removeprefix("set_lists_") for file in lists.glob("set_lists_*.json"))
        has = f"it has: {', '.join(others)}" if others else "it has none"
        raise SceneError(f"CO3D category {category} has no set list {subset!r}, {has}; choose one with subset=.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SceneError(f"CO3D file {path} is not JSON ({error}); download it again.") from error
    if not isinstance(record, dict):
        raise SceneError(f"CO3D file {path} is a {type(record).__name__}, lists by split were wanted.")
    if split != "all" and split not in record:
        raise SceneError(f"CO3D file {path} has no split {split!r}; it has: {', '.join(record)}, and all of them: all.")
    wanted: SetList = {}
    for name in sorted(record) if split == "all" else [split]:
        _add(wanted, path, name, record[name])
    return path, wanted


def _add(wanted: SetList, path: Path, split: str, entries: object) -> None:
    if not isinstance(entries, list):
        raise SceneError(f"CO3D file {path}: {split} is not a list of frames.")
    for entry in entries:
        if not isinstance(entry, list) or [type(value) for value in entry] != [str, int, str]:
            raise SceneError(f"CO3D file {path}: {split} has {entry!r}, [sequence, frame, image] was wanted.")
        wanted.setdefault(entry[0], {})[entry[1]] = entry[2]


def read_sequences(path: Path) -> dict[str, dict[str, Any]]:
    """What is used of a sequence_annotations.jgz, by sequence.

    Raises:
        SceneError: when the file is missing, damaged or has a record without a name.
    """
    used = ("viewpoint_quality_score", "point_cloud")
    return {sequence_name(path, record): {key: record.get(key) for key in used} for record, _ in read_records(path)}


def sequence_name(path: Path, record: Mapping[str, Any]) -> str:
    """The sequence that a record of `path` is of; SceneError when it names none."""
    name = record.get("sequence_name")
    if not isinstance(name, str):
        raise SceneError(f"CO3D file {path}: sequence_name of a record is {name!r}, a name was wanted.")
    return name


def viewpoint_quality(path: Path, known: Mapping[str, Mapping[str, Any]], name: str) -> float:
    """How good a sequence's cameras are, of `read_sequences(path)`; NaN, above no bound, where it was not rated.

    Raises:
        SceneError: when the sequence is not known or its score is no number.
    """
    if name not in known:
        raise SceneError(f"CO3D file {path} has no sequence {name}, the set lists name it; download the two again.")
    score = known[name]["viewpoint_quality_score"]
    if score is None:
        return math.nan
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise SceneError(f"CO3D file {path}: viewpoint_quality_score of {name} is {score!r}, a number was wanted.")
    return float(score)
