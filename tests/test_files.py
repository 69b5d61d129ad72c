"""A file is replaced whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hess_plugin.files import atomic_path, write_bytes


def test_a_new_file_appears_with_its_folders_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "profile.hess"
    write_bytes(target, b"new")
    assert target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]


def test_an_old_file_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "profile.hess"
    write_bytes(target, b"a long old content")
    write_bytes(str(target), b"new")
    assert target.read_bytes() == b"new" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existed", [True, False])
def test_an_exception_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, error: type[BaseException], existed: bool
) -> None:
    target = tmp_path / "profile.hess"
    if existed:
        target.write_bytes(b"old")
    with pytest.raises(error), atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([b"old"] if existed else [])


def test_the_old_file_stays_readable_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "picture.png"
    target.write_bytes(b"old")
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"new")
        assert target.read_bytes() == b"old"
        assert temporary.parent == target.parent and temporary.suffix == ".png"
        assert temporary.name.startswith(".")
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("mask, wanted", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_has_the_rights_of_any_other_new_file(tmp_path: Path, mask: int, wanted: int) -> None:
    before = os.umask(mask)
    try:
        write_bytes(tmp_path / "a", b"")
        assert os.umask(mask) == mask  # left as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == wanted


def test_a_target_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_bytes(tmp_path / "folder", b"x")
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError):
        write_bytes(tmp_path / "file" / "profile.hess", b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_bytes() == b"old" and not list((tmp_path / "folder").iterdir())


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.hess") as one, atomic_path(tmp_path / "a.hess") as two:
        assert one != two
        one.write_bytes(b"1")
        two.write_bytes(b"2")
    assert (tmp_path / "a.hess").read_bytes() == b"1" and len(list(tmp_path.iterdir())) == 1


def test_names_with_unusual_characters(tmp_path: Path) -> None:
    for name in ("with space.hess", "ünï.hess", "noending", ".hidden", "two.dots.hess", "%s{}.hess"):
        write_bytes(tmp_path / name, name.encode())
        assert (tmp_path / name).read_bytes() == name.encode()
    assert len(list(tmp_path.iterdir())) == 6
