"""The annotation files of CO3D: long JSON lists of records in gzip files, read one record at a time."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hess_plugin.exceptions import SceneError

_PIECE = 1 << 20  # characters read at a time
_LONGEST = 1 << 24  # characters of one record; a longer one is a file that is broken there
_FIRST, _NEXT = re.compile(r"\s*\[\s*(?=\{)"), re.compile(r"\s*,\s*(?=\{)")
_EMPTY, _END = re.compile(r"\s*\[\s*\]\s*"), re.compile(r"\s*\]\s*")


def read_records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The records of a file, each with the text it was read from, which takes a third of its memory.

    The frame annotations of one category are hundreds of megabytes of JSON, several times that as Python objects:
    no more than a piece of the file is held at a time.

    Raises:
        SceneError: when the file is missing, cut short or not a JSON list of records.
    """
    if not path.is_file():
        raise SceneError(f"CO3D file {path} does not exist; download it again.")
    try:
        yield from _records(path)
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise SceneError(f"CO3D file {path} is cut short or not gzip ({error}); download it again.") from error


def _records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    decode = json.JSONDecoder().raw_decode
    text, at, count = "", 0, 0
    with gzip.open(path, "rt", encoding="utf-8") as file:
        while True:
            if (start := (_NEXT if count else _FIRST).match(text, at)) is not None:
                try:
                    record, stop = decode(text, start.end())
                except ValueError:
                    pass  # cut by the end of the piece, or broken: more text will tell
                else:
                    yield record, text[start.end() : stop]
                    at, count = stop, count + 1
                    continue
            piece = file.read(_PIECE)
            if not piece and (_END if count else _EMPTY).fullmatch(text, at) is not None:
                return
            if not piece or len(text) - at > _LONGEST:
                raise SceneError(
                    f"CO3D file {path} is not a JSON list of records (broken after {count}); download it again."
                )
            text, at = text[at:] + piece, 0
