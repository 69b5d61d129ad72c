"""Every configuration in which the attention kernels run, for compiling them without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .compiled import ARCHITECTURES, CompiledConfiguration
from .configurations import Configuration, forward_configuration, key_configuration, query_configuration

# (dtype, head width, query block, key block, architectures). The default blocks at the usual widths everywhere; other
# blocks and widths where tensor cores are driven differently. float16 compiles like bfloat16.
_CASES = (
    ("bf16", 64, 128, 64, ARCHITECTURES),
    ("bf16", 128, 128, 64, ARCHITECTURES),
    ("fp16", 64, 128, 64, (90,)),
    ("bf16", 32, 128, 64, (80, 90)),
    ("bf16", 16, 128, 64, (90,)),
    ("bf16", 64, 64, 64, (80, 90)),
    ("bf16", 64, 128, 128, (80, 90)),
    ("bf16", 64, 32, 32, (80, 90)),
    ("bf16", 64, 16, 16, (90,)),
)
_TYPES = {
    "POINTER": "*i64",
    "COLUMNS": "*i32",
    "ROWS_OF": "*i32",
    "ORDER": "*i32",
    "LSE": "*fp32",
    "DELTA": "*fp32",
    "scale": "fp32",
    "factor": "fp32",
}


def compiled_configurations() -> list[CompiledConfiguration]:
    """Kernels and configurations that `benchmarks/kernel_resources.py` compiles."""
    from .backward_kernels import key_kernel, query_kernel
    from .forward_kernel import forward_kernel

    found: list[CompiledConfiguration] = []
    for case in _CASES:
        found += _forward(forward_kernel, *case)
        found += _backward("gradient of q", query_kernel, query_configuration, *case)
        dtype, width, block_q, block_k, architectures = case
        found += _backward(
            "gradient of k, v", key_kernel, key_configuration, dtype, width, block_k, block_q, architectures
        )
    return found


def _forward(
    kernel: Any, dtype: str, width: int, rows: int, block: int, architectures: tuple[int, ...]
) -> Iterator[CompiledConfiguration]:
    for chosen, some in _chosen(forward_configuration, dtype, width, rows, block, architectures):
        constants = {"GROUP": chosen.group, "NEGATE": False}
        name = f"forward {dtype} d{width} {rows}x{block}"
        yield _configuration(name, kernel, chosen, constants, dtype, width, rows, block, some)


def _backward(
    name: str,
    kernel: Any,
    choose: Callable[..., Configuration],
    dtype: str,
    width: int,
    rows: int,
    block: int,
    architectures: tuple[int, ...],
) -> Iterator[CompiledConfiguration]:
    for chosen, some in _chosen(choose, dtype, width, rows, block, architectures):
        title = f"{name} {dtype} d{width} {rows}x{block}"
        yield _configuration(title, kernel, chosen, {}, dtype, width, rows, block, some)


def _chosen(
    choose: Callable[..., Configuration], dtype: str, width: int, rows: int, block: int, architectures: tuple[int, ...]
) -> Iterator[tuple[Configuration, tuple[int, ...]]]:
    """Each configuration once, with the architectures that get it."""
    found: list[tuple[Configuration, tuple[int, ...]]] = []
    for architecture in architectures:
        wanted = choose(architecture, width, rows, block)
        for place, (chosen, some) in enumerate(found):
            if chosen == wanted:
                found[place] = (chosen, (*some, architecture))
                break
        else:
            found.append((wanted, (architecture,)))
    yield from found


def _configuration(
    name: str,
    kernel: Any,
    chosen: Configuration,
    constants: dict[str, Any],
    dtype: str,
    width: int,
    rows: int,
    block: int,
    architectures: tuple[int, ...],
) -> CompiledConfiguration:
    constants = {
        **constants, "ROWS": rows, "BLOCK": block, "STEP": chosen.step, "WIDTH": width, "UPCAST": False,
        "PRECISION": "ieee",
    }  # fmt: skip
    signature = {
        parameter.name: _type(parameter.name, dtype) for parameter in kernel.params if not parameter.is_constexpr
    }
    aligned = tuple(name for name in signature if name.isupper() or name.endswith(("_item", "_head", "_token")))
    return CompiledConfiguration(
        name, kernel, signature, constants, tuple(x for x in aligned if x != "per_head"), chosen.warps, chosen.stages,
        architectures, chosen.options,
    )  # fmt: skip


def _type(name: str, dtype: str) -> str:
    if name.isupper():
        return _TYPES.get(name, f"*{dtype}")
    if name.endswith(("_item", "_head")) and name != "per_head":
        return "i64"
    return _TYPES.get(name, "i32")
