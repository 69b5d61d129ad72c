"""Which steps, warps and stages a kernel gets: small tables, nothing is tried out at run time.

Chosen by compiling for each architecture and reading what came out; `benchmarks/results/kernel_resources.md` is what
these choices give. Larger steps cost less around the products, until registers spill; with heads of up to 64 numbers
Hopper then holds two programs of 8 warps at once, 128 registers to a thread, so that one computes exponentials while
the other multiplies: both take a tile about the same time.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Configuration:
    """How a kernel is compiled.

    Attributes:
        step: tokens of the walked side that are read at once, at most a block of it.
        group: such steps that are computed at once, 1 or 2.
        warps: warps of a program.
        stages: stages of the software pipeline.
        options: further compiler options.
    """

    step: int
    group: int
    warps: int
    stages: int
    options: dict[str, int] = field(default_factory=dict)


def forward_configuration(capability: int, width: int, rows: int, block: int) -> Configuration:
    """For `forward_kernel`.

    Args:
        capability: compute capability, 90 for 9.0.
        width: of a head.
        rows: queries of a tile.
        block: keys of a block.
    """
    narrow = width <= 64
    if _has_wide_products(capability, rows):
        options = {}
        if narrow and capability < 100:
            # Two programs of 8 warps on an SM, or three of 4, each thread of which has more to copy.
            options = {"maxnreg": 128 if rows == 128 else 168}
        return _configuration(block, 64, rows // 16, 3 if narrow else 2, options)
    at_once = 64 if narrow else 32 if rows == 128 else 16
    return _configuration(block, at_once, rows // 16, 3 if narrow else 2)


def query_configuration(capability: int, width: int, rows: int, block: int) -> Configuration:
    """For `query_kernel`, which takes no groups; see `forward_configuration`."""
    narrow = width <= 64
    if _has_wide_products(capability, rows):
        return _single(block, 32 if narrow else 64, rows // 16, {"maxnreg": 128} if narrow else {})
    return _single(block, 32 if narrow else 16, rows // 16)


def key_configuration(capability: int, width: int, rows: int, block: int) -> Configuration:
    """For `key_kernel`, whose tiles have keys as rows and whose blocks are of queries; it takes no groups."""
    wide = _has_wide_products(capability, rows)
    if wide and width <= 64:
        return _single(block, 64, rows // 16)
    return _single(block, 32 if wide or width <= 64 or rows < 128 else 16, min(8, rows // 8))


def _has_wide_products(capability: int, rows: int) -> bool:
    """Whether a tile is multiplied by the instructions of Hopper and of large Blackwells, whose operands are shared."""
    return 90 <= capability < 120 and rows >= 64


def _configuration(
    block: int, at_once: int, warps: int, stages: int, options: dict[str, int] | None = None
) -> Configuration:
    return Configuration(min(block, at_once), 2 if block < at_once else 1, warps, stages, options or {})


def _single(block: int, at_once: int, warps: int, options: dict[str, int] | None = None) -> Configuration:
    return Configuration(min(block, at_once), 1, warps, 2, options or {})
