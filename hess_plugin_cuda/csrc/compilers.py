"""The compilers that can make the kernel: NVRTC, a library that pip installs, and nvcc."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent
STAGES = 4
"""Tiles of keys and values under way; two would do, four hide the look-ups between work items."""
SHARED_BYTES = 16384 * (1 + 2 * STAGES) + 2048
"""Queries, and keys and values of every stage, 16 KiB each; barriers; up to 1 KiB to align them."""
OPTIONS = ("-std=c++17", f"-DHESS_STAGES={STAGES}", f"-DHESS_SHARED_BYTES={SHARED_BYTES}")


class BuildError(RuntimeError):
    """The kernel does not compile, or not to what it should be."""


@dataclass(frozen=True)
class Compiled:
    """What a compiler made.

    Attributes:
        image: the cubin.
        log: all that it said, resource usage included.
        compiler: its name and version, such as "NVRTC 12.8".
    """

    image: bytes
    log: str
    compiler: str


def sources() -> dict[str, str]:
    """The kernel's files by name."""
    return {path.name: path.read_text() for path in sorted(SOURCES.glob("*")) if path.suffix in {".cu", ".cuh", ".h"}}


def sources_digest() -> str:
    """SHA-256 over the sources and the options: whether a compiled file is of these."""
    told = json.dumps([sources(), OPTIONS], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def compile_with_nvrtc(library: Path) -> Compiled:
    """Compile in this process.

    Raises:
        BuildError: the sources do not compile.
    """
    nvrtc = ctypes.CDLL(str(library))
    numbers = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(*(ctypes.byref(number) for number in numbers))
    files = {name: text.encode() for name, text in sources().items()}
    main = files.pop("block_sparse_sm90.cu")
    program = ctypes.c_void_p()
    headers = (ctypes.c_char_p * len(files))(*files.values())
    names = (ctypes.c_char_p * len(files))(*(name.encode() for name in files))
    status = nvrtc.nvrtcCreateProgram(ctypes.byref(program), main, b"block_sparse_sm90.cu", len(files), headers, names)
    if status != 0:
        raise BuildError(f"{library.name} could not take the sources (error {status}).")
    wanted = ["--gpu-architecture=sm_90a", "--ptxas-options=-v", *OPTIONS]
    options = (ctypes.c_char_p * len(wanted))(*(option.encode() for option in wanted))
    status = nvrtc.nvrtcCompileProgram(program, len(wanted), options)
    log = _nvrtc_text(nvrtc, program, "ProgramLog").decode(errors="replace").strip("\0\n")
    if status != 0:
        raise BuildError(f"{library.name} refuses the sources:\n{log}")
    image = _nvrtc_text(nvrtc, program, "CUBIN")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return Compiled(image, log, f"NVRTC {numbers[0].value}.{numbers[1].value}")


def _nvrtc_text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    room = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, room)
    return room.raw


def compile_with_nvcc(nvcc: Path) -> Compiled:
    """Compile with the command-line compiler.

    Raises:
        BuildError: the sources do not compile.
    """
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release ([\d.]+)", told)
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "kernel.cubin"
        options = ["-cubin", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v", *OPTIONS, f"-I{SOURCES}"]
        command = [str(nvcc), *options, str(SOURCES / "block_sparse_sm90.cu"), "-o", str(to)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise BuildError(f"{nvcc} refuses the sources:\n{done.stdout}{done.stderr}")
        return Compiled(to.read_bytes(), done.stdout + done.stderr, f"nvcc {version[1] if version else '?'}")


def find_compiler() -> Path:
    """NVRTC as a wheel installs it, of CUDA 12 before 13, or nvcc.

    Raises:
        BuildError: there is none.
    """
    found = importlib.util.find_spec("nvidia")
    for folder in found.submodule_search_locations or () if found else ():
        for pattern in ("cuda_nvrtc/lib/libnvrtc.so.12", "cu13/lib/libnvrtc.so.13"):
            if (Path(folder) / pattern).exists():
                return Path(folder) / pattern
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise BuildError("There is no CUDA compiler: pip install nvidia-cuda-nvrtc-cu12==12.8.93.")
    return Path(nvcc)


def compile_kernels(compiler: Path) -> Compiled:
    """Compile with either kind of compiler, known by its name.

    Raises:
        BuildError: the sources do not compile.
    """
    try:
        return compile_with_nvcc(compiler) if compiler.name.startswith("nvcc") else compile_with_nvrtc(compiler)
    except OSError as error:
        raise BuildError(f"{compiler} cannot be used ({error}); give a libnvrtc.so or an nvcc.") from error
