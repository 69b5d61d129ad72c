"""Compile the Hopper kernel into the file that is shipped: `python -m hess_plugin_cuda.csrc.build`.

The compiler is NVRTC 12.8 (`pip install nvidia-cuda-nvrtc-cu12==12.8.93`): it needs neither a CUDA toolkit nor a host
compiler, and depends on no path, so that the same sources give the same bytes everywhere. A newer driver runs what an
older compiler made but not the other way round: code of CUDA 13 needs a driver of the 580 series, code of CUDA 12 runs
from 525 on. `--compiler` takes another libnvrtc or an nvcc; their output is checked, but is not what is shipped.

A build fails on register spills, on a stack frame, on products that the compiler had to serialise, on an ignored
`setmaxnreg` and on a kernel without Hopper's matrix instructions.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .compilers import (
    OPTIONS,
    SHARED_BYTES,
    SOURCES,
    BuildError,
    Compiled,
    compile_kernels,
    find_compiler,
    sources_digest,
)

SHIPPED = SOURCES.parent / "fatbin" / "block_sparse_sm90.cubin"
KERNELS = ("block_sparse_bf16", "block_sparse_fp16")
SHIPPING_COMPILER = "NVRTC 12.8"
THREADS = 384

FORBIDDEN = {
    "C7508": "setmaxnreg is ignored",
    "C7510": "products are serialised",
    "C7512": "products are serialised",
    "C7514": "products are serialised",
    "warning": "the compiler warns",
}


def resources(log: str) -> dict[str, dict[str, int]]:
    """Registers, stack and spilled bytes of every kernel, out of what the assembler says.

    Raises:
        BuildError: it says nothing about one of them.
    """
    found = {}
    for name in KERNELS:
        told = re.search(
            rf"Compiling entry function '{name}'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads.*?Used (\d+) registers",
            log,
            re.DOTALL,
        )
        if told is None:
            raise BuildError(f"The assembler says nothing about {name}:\n{log}")
        stack, stores, loads, registers = map(int, told.groups())
        found[name] = {"registers": registers, "stack": stack, "spills": stores + loads}
    return found


def check_log(compiled: Compiled) -> None:
    """Raise BuildError unless the kernels are free of spills and of what makes the products wait."""
    for sign, meaning in FORBIDDEN.items():
        line = next((line for line in compiled.log.splitlines() if sign in line), None)
        if line is not None:
            raise BuildError(f"With {compiled.compiler}, {meaning}: {line.strip()}")
    for name, used in resources(compiled.log).items():
        if used["spills"] or used["stack"]:
            raise BuildError(f"With {compiled.compiler}, {name} spills: {used}.")


def find_disassembler() -> Path | None:
    """Find nvdisasm: the one on PATH, or Triton's."""
    found = shutil.which("nvdisasm")
    if found is not None:
        return Path(found)
    triton = importlib.util.find_spec("triton")
    for folder in triton.submodule_search_locations or () if triton else ():
        path = Path(folder) / "backends/nvidia/bin/nvdisasm"
        if path.exists():
            return path
    return None


def check_instructions(compiled: Compiled, disassembler: Path) -> dict[str, int]:
    """Count the instructions that matter.

    Raises:
        BuildError: matrix products or bulk loads are missing, or something goes through local memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.image)
        code = subprocess.run([disassembler, "-c", path], capture_output=True, text=True, check=True).stdout
    # Products of both kinds, in the first tile, the loop and the last tile, of two kernels.
    wanted = {"HGMMA.64x128x16": 2 * 2 * 4, "HGMMA.64x64x16": 2 * 2 * 8, "UTMALDG.4D": 2 * 5}
    counts = {name: len(re.findall(rf"\b{re.escape(name)}", code)) for name in (*wanted, "LDL", "STL")}
    for name, count in wanted.items():
        if counts[name] != count:
            raise BuildError(f"With {compiled.compiler}, the kernels have {counts[name]} {name}, not {count}.")
    if counts["LDL"] or counts["STL"]:
        raise BuildError(f"With {compiled.compiler}, the kernels use local memory: {counts}.")
    _check_overlap(compiled.compiler, code)
    return counts


def _check_overlap(compiler: str, code: str) -> None:
    """Between the wait for the scores and the one for the outputs lie the exponentials of a tile, 64 of a thread."""
    between = re.findall(r"DEPBAR\.LE gsb0, 0x1 ;(.*?)DEPBAR\.LE gsb0, 0x0 ;", code, re.DOTALL)
    hidden = [part.count("MUFU.EX2") for part in between]
    if len(hidden) != len(KERNELS) or min(hidden) < 64:
        raise BuildError(f"With {compiler}, products run beside {hidden} exponentials of a tile, not beside all 64.")


def facts_about(compiled: Compiled) -> dict[str, Any]:
    """What `sm90.launch` and the tests need to know of a compiled file."""
    major, minor = map(int, compiled.compiler.split()[1].split("."))
    return {
        "compiler": compiled.compiler,
        "cuda": 1000 * major + 10 * minor,
        "options": list(OPTIONS),
        "sources": sources_digest(),
        "threads": THREADS,
        "shared_bytes": SHARED_BYTES,
        "kernels": resources(compiled.log),
    }


def build(compiler: Path) -> Compiled:
    """Compile and check, printing what came out.

    Raises:
        BuildError: it does not compile, or not to what it should be.
    """
    compiled = compile_kernels(compiler)
    check_log(compiled)
    for name, used in resources(compiled.log).items():
        print(f"{name}: {used['registers']} registers, {used['spills']} bytes spilled, {SHARED_BYTES} bytes shared")
    disassembler = find_disassembler()
    if disassembler is None:
        print("no nvdisasm: the instructions were not looked at")
    else:
        print(", ".join(f"{count} {name}" for name, count in check_instructions(compiled, disassembler).items()))
    print(f"{len(compiled.image)} bytes by {compiled.compiler}")
    return compiled


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the shipped file, or with `--check` compare a fresh build with it; 0 if all is well."""
    parser = argparse.ArgumentParser(description="Compile the Hopper kernel into the file that is shipped.")
    parser.add_argument("--compiler", type=Path, help="libnvrtc.so.* or nvcc; default: the first that is found")
    parser.add_argument("--check", action="store_true", help="write nothing, compare with the shipped file")
    given = parser.parse_args(arguments)
    try:
        compiled = build(given.compiler or find_compiler())
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    if compiled.compiler != SHIPPING_COMPILER:
        print(f"The shipped file is made by {SHIPPING_COMPILER}; this one was only checked.", file=sys.stderr)
        return 0 if given.check else 1
    facts = json.dumps(facts_about(compiled), indent=2) + "\n"
    if given.check:
        same = SHIPPED.read_bytes() == compiled.image and SHIPPED.with_suffix(".json").read_text() == facts
        print("the shipped file is of these sources" if same else "the shipped file differs: build it anew")
        return 0 if same else 1
    SHIPPED.parent.mkdir(exist_ok=True)
    SHIPPED.write_bytes(compiled.image)
    SHIPPED.with_suffix(".json").write_text(facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
