"""What the kernels of this package are compiled for, told to `benchmarks/kernel_resources.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hess_plugin_cuda.triton.compiled import CompiledConfiguration

from .shapes import RowShape, emission_shape, row_shape, swap_shape

# One of each kind: a warp alone, several, as many as there are with 16 and with 32 columns a thread, rows read in
# pieces. Rows of other lengths are as many columns to a thread as one of these.
_COLUMNS = (512, 4096, 16384, 32768, 32769)

_PARTS = ((1, 1), (4, 4))  # sub-blocks of a query block and of a key block

_SWAP_COLUMNS = (2139, 4096, 21391, 32768, 32769)

_STAGES = 3  # what Triton takes where nothing is said

_TYPES = {
    "SCORES": "*fp32", "GAINS": "*fp32", "BUDGETS": "*i64", "STARTS": "*i64", "COUNTS": "*i64", "KEYS": "*i32",
    "CUTS": "*i32", "COL": "*i32", "first": "i32", "columns": "i32", "rows": "i32", "stride": "i32", "least": "i32",
    "share": "fp32", "Q": "*fp32", "K": "*fp32", "V": "*fp32", "SPECIAL_K": "*fp32", "SPECIAL_V": "*fp32",
    "BIAS": "*fp32", "TOP": "*fp32", "INVERSE": "*fp32", "OUT": "*fp32", "SPECIAL_OUT": "*fp32",
    "SPECIAL_SHARE": "*fp32", "GRAM": "*fp32", "WEIGHTS": "*fp32", "PROBABILITIES": "*fp32", "SQUARES": "*fp32",
    "STATES": "*i8", "RESIDUAL": "*fp32", "LENGTHS": "*fp32", "AHEAD": "*fp32", "KEPT": "*fp32", "DRIFT": "*fp32",
    "BEST": "*i32", "specials": "i32", "pair_stride": "i32", "turn": "i32",
}  # fmt: skip


def compiled_configurations() -> list[CompiledConfiguration]:
    """Kernels and configurations that `benchmarks/kernel_resources.py` compiles."""
    return [*_scores(), *_rows(), *_drifts(), *_swaps()]


def _scores() -> Iterator[CompiledConfiguration]:
    """The kernels that make scores, at the head width of VGGT."""
    from .launch import SCORE_STAGES, SCORE_TILE, SCORE_WARPS, pool_options
    from .scores import pool_kernel, score_kernel

    strides = {name: "i64" for name in ("item_stride", "head_stride", "token_stride")}
    sizes = {name: "i32" for name in ("heads", "tokens", "blocks")}
    for kind in ("bf16", "fp16", "fp32"):
        options = pool_options(64, 64)
        warps = options.pop("num_warps")
        types = {"X": f"*{kind}", "OUT": "*fp32", **strides, **sizes, "scale": "fp32"}
        aligned = ("X", "OUT", *strides)
        yield CompiledConfiguration(f"pooling {kind} d64", pool_kernel, types, options, aligned, warps, _STAGES)
    types = {"Q": "*fp32", "K": "*fp32", "SCORES": "*fp32", "q_head": "i64", "k_head": "i64"}
    types |= {name: "i32" for name in ("rows", "columns", "stride")}
    aligned = ("Q", "K", "SCORES", "q_head", "k_head", "stride")
    tile = {"WIDTH": 64, **SCORE_TILE}
    yield CompiledConfiguration("scores d64", score_kernel, types, tile, aligned, SCORE_WARPS, SCORE_STAGES)


def _rows() -> Iterator[CompiledConfiguration]:
    """The kernels that work on rows."""
    from .counts import count_kernel
    from .emission import choose_kernel, emit_kernel
    from .thresholds import spread_kernel, threshold_kernel

    for columns in _COLUMNS:
        shape, told = row_shape(columns), f"{columns} columns" if row_shape(columns).whole else "in pieces"
        yield _row(f"thresholds, {told}", threshold_kernel, shape)
        yield _row(f"spread, {told.replace('columns', 'rows')}", spread_kernel, shape)
        yield _row(f"counts, {told}", count_kernel, shape)
        yield _row(f"choice, {told}", choose_kernel, shape)
    for columns in (512, 2048):
        shape = emission_shape(columns)
        yield _row(f"emission, {shape.tile} columns at once", emit_kernel, shape)


def _row(name: str, kernel: Any, shape: RowShape) -> CompiledConfiguration:
    arguments = [parameter.name for parameter in kernel.params]
    types = {argument: _TYPES[argument] for argument in arguments if argument in _TYPES}
    # Triton is asked not to look at the other numbers, which change with every input.
    aligned = tuple(argument for argument in types if argument.isupper() or argument == "stride")
    sizes = {"SIZE": shape.size, "WHOLE": shape.whole, "TILE": shape.tile}
    constants = {argument: value for argument, value in sizes.items() if argument in arguments}
    options = dict(shape.options)
    return CompiledConfiguration(
        name, kernel, types, constants, aligned, options.pop("num_warps"), _STAGES, options=options
    )


def _drifts() -> Iterator[CompiledConfiguration]:
    """The kernels of the selectors by drift that work on tiles, at the head width of VGGT."""
    from .drifts import change_kernel, drift_kernel
    from .probabilities import attend_kernel
    from .restoration import ATTEND_OPTIONS, ATTEND_TILE, DEPTH, DRIFT_DEPTH, TILE_OPTIONS, padded, tile_shape

    constants = {"WIDTH": 64, "VALUES": 64, "PADDED": padded(64), "DEPTH": DEPTH, **ATTEND_TILE}
    yield _told("attention of pooled tokens d64", attend_kernel, constants, ATTEND_OPTIONS)
    refined = {"DEPTH": DRIFT_DEPTH, "REFINED": True}
    for parts_q, parts_k in _PARTS:
        told, tile = f"d64 {parts_q}x{parts_k}", {"VALUES": 64, **tile_shape(parts_q, parts_k)}
        yield _told(f"drifts {told}", drift_kernel, {"WIDTH": 64, **tile, **refined}, TILE_OPTIONS)
        for name, drops in (("restoring", False), ("dropping", True)):
            yield _told(f"{name} {told}", change_kernel, {**tile, "DROPS": drops}, TILE_OPTIONS)


def _swaps() -> Iterator[CompiledConfiguration]:
    """The kernels of the selectors by drift that work on rows."""
    from .restoration import DROP, RESTORE, START, swap_constants
    from .swaps import list_kernel, swap_kernel

    for columns in _SWAP_COLUMNS:
        shape = swap_shape(columns)
        told = f"{shape.size} and {shape.rest} columns" if shape.rest else f"{shape.size} columns"
        told = told if shape.whole else "in pieces"
        steps = {"starts": START, "restored": RESTORE, "dropped": DROP}
        for name, step in steps.items() if columns == _SWAP_COLUMNS[0] else [("restored", RESTORE)]:
            constants = {**swap_constants(64, 1, 1), **shape.constants, "STEP": step, "REFINED": True}
            yield _told(f"{name} d64, {told}", swap_kernel, constants, shape.options)
    for columns in (512, 2048):
        emitted = emission_shape(columns)
        told = f"best states, {emitted.tile} columns at once"
        yield _told(told, list_kernel, {"TILE": emitted.tile}, emitted.options)


def _told(name: str, kernel: Any, constants: dict[str, Any], options: dict[str, int]) -> CompiledConfiguration:
    """A kernel by the types of its arguments, of which addresses and strides are multiples of 16 unless it says so."""
    types = {parameter.name: _TYPES[parameter.name] for parameter in kernel.params if parameter.name in _TYPES}
    unknown = {parameter.name for parameter in kernel.params if parameter.do_not_specialize_on_alignment}
    aligned = tuple(name for name in types if name.isupper() or name in ("stride", "pair_stride"))
    aligned = tuple(name for name in aligned if name not in unknown)
    options = dict(options)
    warps, stages = options.pop("num_warps"), options.pop("num_stages", _STAGES)
    return CompiledConfiguration(name, kernel, types, constants, aligned, warps, stages, options=options)
