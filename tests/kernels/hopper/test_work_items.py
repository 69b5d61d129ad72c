"""The kernel's integer arithmetic, the very header, against a twin that lists keys one by one."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hess_plugin_cuda.sm90.launch import _Arguments

ROOM = 64


def sizes(limit: int) -> st.SearchStrategy[int]:
    """Token counts, often at the edges of blocks."""
    edges = [n + d for n in range(0, limit, 64) for d in (-1, 0, 1) if 0 < n + d <= limit]
    return st.one_of(st.integers(1, limit), st.sampled_from(edges))


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, int], list[list[int]]]:
    """Sizes, and for every row its kept blocks."""
    told = {
        "batch": draw(st.integers(1, 2)),
        "heads": draw(st.integers(1, 3)),
        "patch_queries": draw(sizes(400)),
        "patch_keys": draw(sizes(500)),
    }
    told["queries"] = told["patch_queries"] + draw(st.integers(0, 300))
    told["keys"] = told["patch_keys"] + draw(st.integers(0, 200))
    blocks = -(-told["patch_keys"] // 64)
    rows = told["batch"] * told["heads"] * -(-told["patch_queries"] // 128)
    kept = st.sets(st.integers(0, blocks - 1), min_size=1).map(sorted)
    return told, draw(st.lists(kept, min_size=rows, max_size=rows))


def wanted_keys(told: dict[str, int], kept: list[int] | None) -> list[int]:
    """The keys an item sees, sorted; `kept` is None for special queries."""
    if kept is None:
        return list(range(told["keys"]))
    seen = [key for block in kept for key in range(64 * block, min(64 * block + 64, told["patch_keys"]))]
    return seen + list(range(told["patch_keys"], told["keys"]))


def read_item(library: ctypes.CDLL, arguments: _Arguments, item: int) -> tuple[list[int], NDArray[np.int32]]:
    """What the header says of an item: its six numbers, and first key and valid keys of every entry."""
    told = (ctypes.c_int * (6 + 2 * ROOM))()
    library.emulator_item(ctypes.byref(arguments), item, ROOM, told)
    return list(told[:6]), np.array(told[6:], dtype=np.int32).reshape(ROOM, 2)


@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_every_item_sees_each_of_its_keys_once(shipped: Path, problem: tuple[dict[str, int], list[list[int]]]) -> None:
    told, rows = problem
    library = ctypes.CDLL(str(shipped))
    query_blocks = -(-told["patch_queries"] // 128)
    special_tiles = -(-(told["queries"] - told["patch_queries"]) // 128)
    row_ptr = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    col = np.array([block for row in rows for block in row], dtype=np.int32)
    arguments = _Arguments(
        row_ptr=row_ptr.ctypes.data,
        col=col.ctypes.data,
        query_blocks=query_blocks,
        special_tiles=special_tiles,
        **{name: told[name] for name in ("heads", "queries", "patch_queries", "keys", "patch_keys")},
    )
    written = []
    for item in range(told["batch"] * told["heads"] * (query_blocks + special_tiles)):
        (pair, first_query, query_count, tiles, clean, entries), listed = read_item(library, arguments, item)
        tile = item % (query_blocks + special_tiles)
        assert pair == item // (query_blocks + special_tiles)
        assert 1 <= query_count <= 128
        written += [pair * told["queries"] + query for query in range(first_query, first_query + query_count)]
        kept = rows[pair * query_blocks + tile] if tile < query_blocks else None
        seen = [first + n for first, valid in listed[:entries].tolist() for n in range(valid)]
        assert sorted(seen) == wanted_keys(told, kept)
        # Past the last entry nothing counts, and loads are out of bounds.
        assert (listed[entries:] == (told["keys"], 0)).all()
        assert tiles == -(-entries // 2)
        assert (listed[: 2 * clean, 1] == 64).all()
        assert tiles - clean <= 2, "a consumer keeps the masks of two tiles"
        assert (listed[::2, 1][:tiles] > 0).all(), "a tile without a key has no largest score"
    assert sorted(written) == list(range(told["batch"] * told["heads"] * told["queries"]))


def test_the_launcher_packs_what_the_kernel_reads(shipped: Path) -> None:
    assert ctypes.CDLL(str(shipped)).emulator_problem_bytes() == ctypes.sizeof(_Arguments)
