"""Writing files so that a kill at any moment leaves the old file or the new one, never half of either."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .exceptions import HessError


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on an exception it is deleted.

    Args:
        path: the file to write; its directory is made if missing.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays: matplotlib and others choose the format by it.
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}-", suffix=target.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes the file private; give it the rights any other new file would get.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def check_writable(path: str | Path, suffix: str | None = None) -> None:
    """Check before long work that a file can be written at its end.

    Args:
        path: the file; its directory may be missing yet.
        suffix: ending it must have, for a format that goes by it.

    Raises:
        HessError: it cannot be written there.
    """
    target = Path(path)
    if suffix is not None and target.suffix.lower() != suffix:
        raise HessError(f"{target} was given as output, wanted a name that ends in {suffix}.")
    if target.is_dir():
        raise HessError(f"{target} was given as output and is a directory; give a file name in it.")
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise HessError(f"{target} cannot be written: {parent} is not a directory you may write to; choose another.")
