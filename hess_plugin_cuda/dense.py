"""Dense attention by the fastest kernel of the place, whatever the caller's choice of kernels is."""

from __future__ import annotations

import functools
import threading

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

_NAMES = {
    SDPBackend.CUDNN_ATTENTION: "cudnn",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.MATH: "math",
}
_USUAL = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
    SDPBackend.CUDNN_ATTENTION,
)
_CUDNN_FIRST = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
_CUDNN_SINCE = 91501  # before, wrong where the number of tokens is no multiple of 128
_HALVES = (torch.float16, torch.bfloat16)
FLAGS = threading.RLock()
"""Held by whoever sets which kernels torch may choose, a setting of the process."""


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Softmax attention of all queries over all keys, by the best kernel that can run.

    On a GPU that is cuDNN's on compute capability 9.x and 10.x, and FlashAttention 2 elsewhere: what torch prefers by
    itself from 2.11 on, unless the caller has pinned its choice, as Pi3 does.
    There is no mask, so that no kernel is asked for what it computes wrongly (the memory-efficient one, masks past
    65536 tokens).

    Args:
        q: queries `[B, H, N_q, d]`.
        k: keys `[B, H, N_k, d]`, of the same dtype.
        v: values `[B, H, N_k, d]`, of the same dtype.
        scale: factor on q . k.

    Returns:
        `[B, H, N_q, d]`, differentiable in q, k and v. Waits for no device.
    """
    if q.device.type != "cuda":
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    order = _order(q.device, q.dtype, q.shape[-1])
    if _torch_takes(order[0], q, k, v, scale):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    # What torch may choose is a setting of the process: two threads that set it and set it back must take turns, or
    # the setting of one is left behind for good.
    with FLAGS, sdpa_kernel(list(order), set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)


def dense_kernels(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    """Names of torch's kernels for dense attention that can run here, best first.

    Args:
        device: where.
        dtype: of q, k and v.
        head_dim: width d of a head.

    Returns:
        Some of "cudnn", "flash", "efficient" and "math"; the first is what `dense_attention` uses.
    """
    device = torch.device(device)
    q = torch.empty(1, 1, 128, head_dim, dtype=dtype, device=device)
    if device.type != "cuda":
        # No other device lets its kernels be asked one by one.
        chosen = SDPBackend(torch._fused_sdp_choice(q, q, q))
        return tuple(dict.fromkeys((_NAMES[chosen], "math")))
    params = SDPAParams(q, q, q, None, 0.0, False, False)
    usable = {
        SDPBackend.CUDNN_ATTENTION: can_use_cudnn_attention,
        SDPBackend.FLASH_ATTENTION: can_use_flash_attention,
        SDPBackend.EFFICIENT_ATTENTION: can_use_efficient_attention,
        SDPBackend.MATH: lambda params: True,
    }
    order = _order(device, dtype, head_dim)
    with FLAGS, sdpa_kernel(list(order)):  # else a kernel that the caller has switched off counts as unable
        return tuple(_NAMES[kernel] for kernel in order if usable[kernel](params))


def _torch_takes(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether torch chooses a kernel for these tensors by itself, so that its settings can be left alone."""
    asked = getattr(torch, "_fused_sdp_choice", None)  # not a promise of torch's: only time is lost without it
    if asked is None:
        return False
    try:
        return SDPBackend(asked(q, k, v, scale=scale)) == kernel
    except RuntimeError:  # of those that the caller has left switched on, none can
        return False


@functools.lru_cache(maxsize=64)  # asked by every call
def _order(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[SDPBackend, ...]:
    """Torch's kernels on a GPU, best first; those that cannot run are passed over by torch."""
    major, _ = torch.cuda.get_device_capability(device)
    version = torch.backends.cudnn.version() or 0
    best = major in (9, 10) and version >= _CUDNN_SINCE and dtype in _HALVES and head_dim <= 128
    return _CUDNN_FIRST if best else _USUAL
