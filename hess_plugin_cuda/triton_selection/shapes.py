"""How the rows of scores lie in memory, and how many threads work on one."""

from __future__ import annotations

from typing import NamedTuple

LONGEST_ROW = 32768
"""Columns of the longest row that is held in registers, 32 for each of 1024 threads; longer ones are read again and
again."""

_PIECE = 2048


class RowShape(NamedTuple):
    """How a program holds a row.

    Attributes:
        size: columns at once, a power of two.
        whole: whether that is all of them.
        warps: of the program.
    """

    size: int
    whole: bool
    warps: int

    @property
    def options(self) -> dict[str, int]:
        """What a launch says of threads.

        With 16 columns for each of 1024 threads the assembler gives some kernels half of the registers, so that two
        programs fit, and spills; asked for all of them it does not. With 32 columns it is the other way round.
        """
        registers = {"maxnreg": 64} if self.size == 512 * self.warps and self.warps == 32 else {}
        return {"num_warps": self.warps, **registers}

    @property
    def tile(self) -> int:
        """Columns at once where a row is read in pieces to do more with each than compare: at most 8 a thread."""
        return min(self.size, 256 * self.warps, _PIECE)


def row_shape(columns: int) -> RowShape:
    """Find how a program holds a row of so many columns."""
    if columns > LONGEST_ROW:
        return RowShape(_PIECE, False, max(1, _PIECE // 256))
    size = max(32, power_of_two(columns))
    return RowShape(size, True, min(32, max(1, size // 512)))


class SwapShape(NamedTuple):
    """How a program that swaps blocks holds a row.

    Attributes:
        size: columns at once, a power of two.
        rest: columns beside them, a power of two or 0: rows of 2139 columns are 2048 and 128, not 4096.
        whole: whether that is all of them.
        warps: of the program.
    """

    size: int
    rest: int
    whole: bool
    warps: int

    @property
    def constants(self) -> dict[str, int]:
        """What a launch says of columns; TILE is read at once where more is done with columns than compare."""
        tile = min(self.size, 512 * self.warps, _PIECE)
        groups = min(self.size, 128 * self.warps)
        return {"SIZE": self.size, "REST": self.rest, "WHOLE": self.whole, "TILE": tile, "GROUPS": groups}

    @property
    def options(self) -> dict[str, int]:
        """What a launch says of threads. For one warp or two the assembler may stop at 128 registers, and spill."""
        return {"num_warps": self.warps, **({"maxnreg": 168} if self.warps <= 2 else {})}


def swap_shape(columns: int) -> SwapShape:
    """Find how a program that swaps blocks holds a row.

    As many columns to a thread as registers allow: a warp alone adds up without waiting for others.
    """
    if columns > LONGEST_ROW:
        return SwapShape(_PIECE, 0, False, max(1, _PIECE // 1024))
    size = max(64, power_of_two(columns + 1) // 2)
    rest = max(32, power_of_two(columns - size)) if columns > size else 0
    if rest == size and size < LONGEST_ROW:
        size, rest = 2 * size, 0
    return SwapShape(size, rest, True, max(1, size // 2048))


def emission_shape(columns: int) -> RowShape:
    """Find how a program reads a row to write its list: in pieces, so that programs hide one another's waiting."""
    return row_shape(min(columns, _PIECE))


def row_stride(columns: int) -> int:
    """From row to row of a chunk of scores: a multiple of 16, so that rows are read 16 bytes at a time."""
    return -(-columns // 16) * 16


def power_of_two(number: int) -> int:
    """The least power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()
