"""The Hopper kernel without a Hopper GPU: its own source compiled against an emulator that passes for libcuda."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hess_plugin_cuda.sm90.driver as cuda
from hess_plugin_cuda import BlockLists
from hess_plugin_cuda.csrc import compilers
from hess_plugin_cuda.sm90 import launch

EMULATOR = Path(__file__).parent / "emulator"
CSRC = Path(compilers.__file__).parent


@pytest.fixture(scope="session")
def compile_emulator(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compile the kernel for the emulator with some stages; the machine itself is compiled once."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to compile the emulator with")
    folder = tmp_path_factory.mktemp("emulator")
    # The fibers jump between stacks, which fortified longjmp takes for a fault.
    options = [compiler, "-std=c++17", "-O2", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas"]
    include = ["-Wno-psabi", "-I", EMULATOR, "-I", CSRC]

    def run(*command: Any) -> None:
        done = subprocess.run([*options, *include, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    machine = []
    for name in ("machine", "products", "driver"):
        machine.append(folder / f"{name}.o")
        run("-c", EMULATOR / f"{name}.cpp", "-o", machine[-1])

    def compile_kernel(stages: int, turns: int = 1) -> Path:
        library = folder / f"libcuda_{stages}_{turns}.so"
        shared = 16384 * (1 + 2 * stages) + 2048
        macros = [f"-DHESS_STAGES={stages}", f"-DHESS_SHARED_BYTES={shared}", f"-DHESS_TAKE_TURNS={turns}"]
        # Each its own symbols: the process holds several of these libraries.
        run("-shared", "-Wl,-Bsymbolic", *macros, EMULATOR / "kernels.cpp", *machine, "-o", library)
        return library

    return compile_kernel


@pytest.fixture(scope="session")
def shipped(compile_emulator: Callable[..., Path]) -> Path:
    """The emulated libcuda with as many stages as the shipped kernel."""
    return compile_emulator(compilers.STAGES)


@dataclass
class Gpu:
    """The emulated GPU, and the launcher that believes in it."""

    library: ctypes.CDLL

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lists: BlockLists,
        scale: float = 0.125,
        heads: tuple[int, ...] | None = None,
        *,
        seed: int = 0,
        multiprocessors: int = 3,
    ) -> tuple[Tensor, Tensor]:
        """`launch.forward` under one random schedule; asserts that the machine saw no violation."""
        self.library.emulator_seed(ctypes.c_uint64(seed))
        cuda.device(0).multiprocessors = multiprocessors
        try:
            return launch.forward(q, k, v, lists, scale, heads)
        except cuda.DriverError:
            self.library.emulator_error.restype = ctypes.c_char_p
            pytest.fail(f"seed {seed}: {self.library.emulator_error().decode()}")


def forget() -> None:
    """Forget what the launcher holds of a driver."""
    for cached in (cuda.driver, cuda.device, launch.device_refusal, launch.facts, launch._load):
        cached.cache_clear()
    launch._workspaces.__dict__.clear()


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Gpu]]:
    """Make an emulated libcuda the launcher's."""

    def use(library: Path) -> Gpu:
        monkeypatch.setattr(cuda, "LIBRARY", str(library))
        monkeypatch.setattr(launch, "current_stream", lambda device: 0)
        forget()
        loaded = ctypes.CDLL(str(library))
        loaded.emulator_reset()
        return Gpu(loaded)

    yield use
    forget()


@pytest.fixture
def gpu(emulate: Callable[[Path], Gpu], shipped: Path) -> Gpu:
    """The emulated GPU with the kernel as it is shipped."""
    return emulate(shipped)


@pytest.fixture(scope="session")
def make_case() -> Callable[..., tuple[Tensor, Tensor, Tensor, BlockLists]]:
    """Random q, k, v in a dtype and random lists for them."""

    def make(
        patches: tuple[int, int],
        special: tuple[int, int],
        dtype: torch.dtype,
        *,
        batch: int = 1,
        heads: int = 1,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor, BlockLists]:
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(batch, heads, patches[0] + special[0], 64, generator=generator) * 2
        k, v = (torch.randn(batch, heads, patches[1] + special[1], 64, generator=generator) for _ in range(2))
        rows, columns = -(-patches[0] // 128), -(-patches[1] // 64)
        mask = torch.rand(batch, heads, rows, columns, generator=generator) < torch.rand(
            batch, heads, rows, 1, generator=generator
        )
        mask.scatter_(-1, torch.randint(columns, (batch, heads, rows, 1), generator=generator), True)
        lists = BlockLists.from_mask(mask, *patches, 128, 64).check()
        return q.to(dtype), k.to(dtype), v.to(dtype), lists

    return make
