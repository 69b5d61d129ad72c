"""What a kernel is compiled to: the record with which `benchmarks/kernel_resources.py` compiles it without a GPU.

A package of Triton kernels offers `compiled_configurations() -> list[CompiledConfiguration]`: every kernel in every
configuration that its launchers use on some architecture. This module imports neither torch nor triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ARCHITECTURES = (80, 89, 90, 100, 120)
"""Compute capabilities that the table covers, as Triton writes them: A100, RTX 40, H100 and H200, B200, RTX 50."""


@dataclass(frozen=True)
class CompiledConfiguration:
    """One kernel with everything that its compilation depends on.

    Attributes:
        name: row of the table, the same on every architecture, for instance "forward bf16 d64 128x(2x64)".
        kernel: the function decorated with `triton.jit`.
        signature: type of each argument that is not a constant, as Triton writes it ("*bf16", "*i64", "i32",
            "i64", "fp32"), in any order.
        constants: value of each `tl.constexpr` argument, and of arguments given as None.
        aligned: arguments that the launcher guarantees to be multiples of 16 (addresses: of 16 bytes), for which
            Triton then knows it as well.
        warps: warps of a program.
        stages: stages of the software pipeline.
        architectures: where this configuration is used.
        options: further compiler options, such as `{"maxnreg": 128}`.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...]
    warps: int
    stages: int
    architectures: tuple[int, ...] = ARCHITECTURES
    options: Mapping[str, Any] = field(default_factory=dict)
