"""Attention over block lists on Hopper GPUs: argument checks, tensor maps and the launch of the compiled kernel."""

from __future__ import annotations

import ctypes
import functools
import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hess_plugin_cuda.lists import BlockLists, block_count
from hess_plugin_cuda.schedule import work_order

from . import driver as cuda

if TYPE_CHECKING:
    from hess_plugin_cuda.backends import Problem

HEAD_DIM, BLOCK_Q, BLOCK_K = 64, 128, 64
KERNELS = {torch.bfloat16: "block_sparse_bf16", torch.float16: "block_sparse_fp16"}
COMPILED = Path(__file__).parents[1] / "fatbin" / "block_sparse_sm90.cubin"

_workspaces = threading.local()
_loading = threading.Lock()


def refusal(problem: Problem) -> str | None:
    """Why this backend cannot compute a problem, in a few words, or None if it can."""
    if problem.device.type != "cuda":
        return "it needs a CUDA device"
    if problem.dtype not in KERNELS:
        return "it is made for bfloat16 and float16"
    if problem.head_dim != HEAD_DIM:
        return f"it is made for heads of width {HEAD_DIM}"
    if (problem.block_q, problem.block_k) != (BLOCK_Q, BLOCK_K):
        return f"it is made for blocks of {BLOCK_Q} x {BLOCK_K}"
    index = problem.device.index
    return device_refusal(torch.cuda.current_device() if index is None else index)


@functools.cache
def device_refusal(ordinal: int) -> str | None:
    """Why the kernel cannot run on a device, or None if it can."""
    try:
        device = cuda.device(ordinal)
        version = device.driver.version()
        wanted = facts()["cuda"]
    except OSError as error:
        return f"{error}"
    except cuda.DriverError as error:
        return f"{error}".removesuffix(".")
    if device.capability != (9, 0):
        return "its kernel is for compute capability 9.0 (H100, H200), this device has {}.{}".format(*device.capability)
    if version // 1000 < wanted // 1000:
        return f"its kernel needs a driver for CUDA {wanted // 1000}, this one is for CUDA {version // 1000}"
    return None


@functools.cache
def facts() -> dict[str, Any]:
    """What `csrc/build.py` wrote down about the compiled kernel.

    Raises:
        OSError: the kernel is not part of this installation.
    """
    if not COMPILED.exists():
        raise FileNotFoundError(f"{COMPILED.name} is not part of this installation")
    return json.loads(COMPILED.with_suffix(".json").read_text())


def loadable(x: Tensor) -> bool:
    """Whether a tensor map can describe `[B, H, N, 64]`: rows contiguous, base and other strides 16-byte multiples."""
    if x.stride(3) != 1 or x.data_ptr() % 16:
        return False
    strides = [x.stride(n) for n in range(3) if x.shape[n] > 1]
    # A stride of zero (an expanded tensor) is not among what the driver's manual allows.
    return all(0 < stride < 2**39 and stride % 8 == 0 for stride in strides)


def forward(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, heads: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over block lists; nothing waits for the GPU.

    Args:
        q: queries `[B, H, N_q, 64]`, bfloat16 or float16, patch tokens first, any strides.
        k: keys `[B, H, N_k, 64]`.
        v: values `[B, H, N_k, 64]`.
        lists: the kept patch blocks, of 128 queries x 64 keys.
        scale: factor on q . k.
        heads: compute only these heads of every item; the rest of the results is left unset. None is all of them.

    Returns:
        The output, `[B, H, N_q, 64]` with the strides of `torch.empty_like(q)`, and float32 `[B, H, N_q]`, the
        natural logarithm of the sum over keys of exp(scale * q . k).

    Raises:
        DriverError: the driver refuses the kernel or its launch.
    """
    out = torch.empty_like(q)
    if out.stride(3) != 1:  # the kernel writes whole rows
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if abs(scale) < 2.0**-120:  # all keys count the same; scaled by zero, a masked score of -inf would be NaN
        q, scale = torch.zeros_like(q), 1.0
    if scale < 0:  # the kernel takes the largest score before it scales; the negation is exact
        q, scale = -q, -scale
    q, k, v = (x if loadable(x) else x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
    special_tiles = block_count(q.shape[2] - lists.query_tokens, BLOCK_Q)
    order = work_order(lists, special_tiles, heads)
    row_ptr, col = lists.row_ptr.contiguous(), lists.col.contiguous()
    claimed = torch.zeros(1, dtype=torch.int32, device=q.device)
    arguments = _Arguments(
        *(row_ptr.data_ptr(), col.data_ptr(), order.data_ptr(), claimed.data_ptr(), out.data_ptr()),
        *(lse.data_ptr(), *out.stride()[:3], order.numel(), lists.heads, lists.query_blocks, special_tiles),
        *(q.shape[2], lists.query_tokens, k.shape[2], lists.key_tokens, scale),
    )
    _launch(q, k, v, arguments)
    return out, lse


class _Arguments(ctypes.Structure):
    """`Problem` of csrc/work_items.h: the same fields in the same order."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("row_ptr", "col", "order", "claimed", "out", "lse")),
        *((name, ctypes.c_int64) for name in ("out_batch", "out_head", "out_token")),
        *((name, ctypes.c_int32) for name in ("work", "heads", "query_blocks", "special_tiles")),
        *((name, ctypes.c_int32) for name in ("queries", "patch_queries", "keys", "patch_keys")),
        ("scale", ctypes.c_float),
    )


class _Workspace:
    """Room for the tensor maps of one thread's launches: the driver copies them at every launch."""

    def __init__(self, driver: cuda.Driver) -> None:
        self.maps = [cuda.TensorMap(driver, tokens) for tokens in (BLOCK_Q, BLOCK_K, BLOCK_K)]
        self.parameters = (ctypes.c_void_p * 4)(*(tensor_map.address for tensor_map in self.maps), None)


def _launch(q: Tensor, k: Tensor, v: Tensor, arguments: _Arguments) -> None:
    ordinal = q.device.index or 0
    kernel = _kernel(ordinal, q.dtype)
    space = getattr(_workspaces, "of_thread", None)
    if space is None:
        space = _workspaces.of_thread = _Workspace(kernel.device.driver)
    for tensor_map, x in zip(space.maps, (q, k, v), strict=True):
        tensor_map.encode(x.data_ptr(), x.dtype == torch.float16, x.shape, x.stride())
    space.parameters[3] = ctypes.addressof(arguments)
    # One CTA fills a multiprocessor; each goes on to further items by itself.
    kernel.launch(min(kernel.device.multiprocessors, arguments.work), current_stream(q.device), space.parameters)


def current_stream(device: torch.device) -> int:
    """The stream that torch launches on, as the driver knows it."""
    return torch.cuda.current_stream(device).cuda_stream


def _kernel(ordinal: int, dtype: torch.dtype) -> cuda.Kernel:
    with _loading:  # the cache alone would let two threads load the module twice
        return _load(ordinal, dtype)


@functools.cache
def _load(ordinal: int, dtype: torch.dtype) -> cuda.Kernel:
    told = facts()
    return cuda.Kernel(
        cuda.device(ordinal), COMPILED.read_bytes(), KERNELS[dtype], told["threads"], told["shared_bytes"]
    )
