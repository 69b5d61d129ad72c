"""What the Triton kernels compile to: registers, spills, shared memory, on every architecture, without a GPU.

    python benchmarks/kernel_resources.py                                             # print the table
    python benchmarks/kernel_resources.py --write benchmarks/results/kernel_resources.md
    python benchmarks/kernel_resources.py --hold benchmarks/results/kernel_resources.md

Kernels are compiled with the hints that a launch would give. Triton brings the assembler and the disassembler.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

COLUMNS = (
    "kernel", "sm", "warps", "stages", "registers", "stack bytes", "spill instructions", "shared bytes",
    "matrix instructions",
)  # fmt: skip
TITLE = "# Resources of the Triton kernels"
EXPLANATION = """\
A row is a kernel in the configuration that it gets on an architecture, with the hints that a launch gives the compiler
(addresses and strides in multiples of 16). Registers are of a thread; spill instructions are those that read or write
local memory. Nothing here was run: these are properties of the machine code. `forward bf16 d64 128x64` is the forward
pass in bfloat16 at a head width of 64, with blocks of 128 queries and 64 keys; a gradient of k and v names its keys
first."""


@dataclass(frozen=True)
class Resources:
    """One row of the table."""

    kernel: str
    architecture: int
    warps: int
    stages: int
    registers: int
    stack: int
    spills: int
    shared: int
    matrix: str

    @property
    def key(self) -> tuple[str, int]:
        """What names the row."""
        return self.kernel, self.architecture

    def row(self) -> str:
        """The row as Markdown."""
        values = (
            self.kernel, self.architecture, self.warps, self.stages, self.registers, self.stack, self.spills,
            self.shared, self.matrix,
        )  # fmt: skip
        return f"| {' | '.join(str(value) for value in values)} |"


def configurations() -> list[Any]:
    """Every configuration of every package of kernels."""
    from hess_plugin_cuda.triton.compilations import compiled_configurations as of_attention
    from hess_plugin_cuda.triton_selection import compiled_configurations as of_selection

    return [*of_attention(), *of_selection()]


def compile_kernel(configuration: Any, architecture: int) -> Any:
    """Compile a `CompiledConfiguration` as its launch would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [parameter.name for parameter in configuration.kernel.params]
    types = {name: configuration.signature.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in configuration.constants.items()}
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in configuration.aligned}
    source = ASTSource(configuration.kernel, signature=types, constexprs=constants, attrs=hints)
    options = {"num_warps": configuration.warps, "num_stages": configuration.stages, **configuration.options}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources_of(configuration: Any, architecture: int) -> Resources:
    """Compile and read what came out."""
    compiled = compile_kernel(configuration, architecture)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if numbers is None:
        raise click.ClickException(f"cuobjdump did not say what {configuration.name} uses: {usage.strip()}")
    opcodes = Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", code, re.MULTILINE))
    matrix = [f"{opcodes[name]} {name}" for name in ("HGMMA", "HMMA", "UTCHMMA") if opcodes[name]]
    return Resources(
        configuration.name, architecture, configuration.warps, configuration.stages, int(numbers[1]), int(numbers[2]),
        opcodes["STL"] + opcodes["LDL"], compiled.metadata.shared, " ".join(matrix) or "none",
    )  # fmt: skip


def _resources(asked: tuple[int, int]) -> Resources:
    """`resources_of` a configuration, by its number, in a process that shares nothing else."""
    number, architecture = asked
    return resources_of(configurations()[number], architecture)


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], check=True, capture_output=True, text=True).stdout


def versions() -> str:
    """Of what the numbers depend on."""
    import triton

    # Triton brings two assemblers, the second for compute capability 10.0 and later.
    found = [re.search(r"V([\d.]+)", _tool(name, "--version")) for name in ("ptxas", "ptxas-blackwell")]
    told = [release[1] if release else "unknown" for release in found]
    return f"Triton {triton.__version__}, ptxas {told[0]}, from sm_100 on {told[1]}"


def table(rows: list[Resources]) -> str:
    """The whole document."""
    head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
    body = "\n".join(row.row() for row in sorted(rows, key=lambda row: row.key))
    return f"{TITLE}\n\n{versions()}.\n\n{EXPLANATION}\n\n{head}\n{body}\n"


def read_table(text: str) -> tuple[str, dict[tuple[str, int], Resources]]:
    """Versions and rows of a document that `table` made."""
    made_with = re.search(r"^(Triton .*)\.$", text, re.MULTILINE)
    if made_with is None:
        raise click.ClickException("The table does not say which Triton made it; write it again with --write.")
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == len(COLUMNS) and cells[1].isdigit():
            row = Resources(cells[0], *(int(cell) for cell in cells[1:8]), cells[8])
            rows[row.key] = row
    return made_with[1], rows


def complaints(rows: list[Resources], held: dict[tuple[str, int], Resources]) -> list[str]:
    """What is worse than a table, or missing on either side; nothing may spill, whatever the table says."""
    found = []
    for row in rows:
        name = f"{row.kernel} on sm_{row.architecture}"
        if row.stack or row.spills:
            found.append(f"{name} spills: {row.stack} bytes, {row.spills} instructions")
        if row.key not in held:
            found.append(f"{name} is not in the table")
        elif row.registers > held[row.key].registers:
            found.append(f"{name} takes {row.registers} registers, the table says {held[row.key].registers}")
        elif row.matrix != held[row.key].matrix:
            found.append(f"{name} has {row.matrix}, the table says {held[row.key].matrix}")
    missing = held.keys() - {row.key for row in rows}
    return found + [f"{kernel} on sm_{sm} is in the table and no longer compiled" for kernel, sm in sorted(missing)]


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--write", type=click.Path(dir_okay=False, path_type=Path), help="Write the table to this file.")
@click.option(
    "--hold",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Fail if a kernel spills, or needs more registers than this table says. Skipped for another Triton.",
)
@click.option("--only", default="", help="Only kernels with this in their name; not with --write or --hold.")
def main(write: Path | None, hold: Path | None, only: str) -> None:
    if bool(only) + bool(write) + bool(hold) > 1:
        raise click.UsageError("--only, --write and --hold are three uses of the table; give one of them.")
    held = read_table(hold.read_text(encoding="utf-8")) if hold else None
    if held and held[0] != versions():
        print(f"skipped: the table is of {held[0]}, this is {versions()}")
        return
    rows = []
    asked = [
        (number, architecture)
        for number, configuration in enumerate(configurations())
        if only in configuration.name
        for architecture in configuration.architectures
    ]
    if not asked:
        raise click.UsageError(f"No kernel has {only!r} in its name; without --only there is a list of them.")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as processes:
        for row in processes.map(_resources, asked):
            rows.append(row)
            print(row.row(), file=sys.stderr, flush=True)
    if held:
        found = complaints(rows, held[1])
        if found:
            raise click.ClickException("\n".join(found))
        print(f"{len(rows)} kernels are as good as the table says")
    elif write:
        write.write_text(table(rows), encoding="utf-8")
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
