"""Which steps, warps and stages a kernel gets: small tables, nothing is tried out at run time.

Chosen by compiling for each architecture and reading what came out; `benchmarks/results/kernel_resources.md` is what
these choices give. An SM should hold two programs, so that one computes exponentials while the other multiplies
matrices: at a head width of 64 both take a tile the same time. Two programs of 8 warps leave 128 registers to a
thread, two of 4 warps 255.
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
    return Configuration(min(block, 64), 2 if block < 64 else 1, max(1, rows // 16), 3)


def query_configuration(capability: int, width: int, rows: int, block: int) -> Configuration:
    """For `query_kernel`; see `forward_configuration`."""
    return Configuration(min(block, 64), 1, max(1, rows // 16), 2)


def key_configuration(capability: int, width: int, rows: int, block: int) -> Configuration:
    """For `key_kernel`, whose tiles have keys as rows and whose blocks are of queries."""
    return Configuration(min(block, 64), 1, max(1, rows // 16), 2)
