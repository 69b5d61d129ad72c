"""One small problem by which a backend shows, once in a process, that it computes what plain torch does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .dense import FLAGS
from .lists import BlockLists, block_count
from .reference import reference_attention, token_mask

if TYPE_CHECKING:
    from .backends import Problem

_SPECIAL = 5
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class SelfTests:
    """Results of the self-tests of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._results: dict[tuple[str, Problem], str | None] = {}

    def result(self, name: str, forward: Callable[..., tuple[Tensor, Tensor | None]], problem: Problem) -> str | None:
        """Say what is wrong with a backend on a problem's device and types; None if nothing is.

        Waits for the device the first time. While a CUDA graph is captured nothing can be tested, and nothing is.
        """
        key = (name, problem)
        with self._lock:
            if key not in self._results:
                if problem.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    return None
                self._results[key] = _test(forward, problem)
            return self._results[key]


def _test(forward: Callable[..., tuple[Tensor, Tensor | None]], problem: Problem) -> str | None:
    # What the caller has switched on or off is none of the test's business; a pin of kernels (Pi3's to FlashAttention)
    # may leave none that takes a mask.
    with (
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(problem.device.type, enabled=False),
        FLAGS,
        sdpa_kernel(_KERNELS),
    ):
        try:
            worst, allowed = _errors(forward, problem)
        except torch.OutOfMemoryError:
            raise  # says nothing about the backend
        except Exception as error:  # a kernel that does not compile or launch may raise anything
            first = (str(error).strip() or "no reason given").splitlines()[0]
            return f"its self-test failed with {type(error).__name__}: {first}"
    if worst <= allowed:  # never true of NaN
        return None
    return f"its self-test is off by {worst:.1e} where {allowed:.1e} is allowed"


def _errors(forward: Callable[..., tuple[Tensor, Tensor | None]], problem: Problem) -> tuple[float, float]:
    """Largest error against float64, and what it may be: twice that of plain torch in the same type."""
    q, k, v, lists = _small_problem(problem)
    scale = problem.head_dim**-0.5
    # On the CPU: that the reference's own matrix products are exact must not hang on the device's settings.
    exact_q, exact_k, exact_v = (x.double().cpu() for x in (q, k, v))
    exact = reference_attention(exact_q, exact_k, exact_v, lists.to("cpu"), scale, dtype=torch.float64)
    mask = token_mask(lists, q.shape[2], k.shape[2])
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).double().cpu()
    given = forward(q, k, v, lists, scale, None)[0].double().cpu()
    allowed = 2 * (plain - exact).abs().max() + torch.finfo(problem.dtype).eps * exact.abs().max()
    return float((given - exact).abs().max()), float(allowed)


def _small_problem(problem: Problem) -> tuple[Tensor, Tensor, Tensor, BlockLists]:
    """Two heads over five key blocks and a half, special tokens, rows of one block to all of them."""
    generator = torch.Generator().manual_seed(0)
    patches = 5 * problem.block_k + problem.block_k // 2 + 1
    shape = (3, 1, 2, patches + _SPECIAL, problem.head_dim)
    tokens = torch.randn(shape, generator=generator).to(problem.dtype).to(problem.device)
    grid = (1, 2, block_count(patches, problem.block_q), block_count(patches, problem.block_k))
    mask = torch.rand(grid, generator=generator) < 0.5
    mask[..., 0] |= ~mask.any(-1)
    lists = BlockLists.from_mask(mask, patches, patches, problem.block_q, problem.block_k).to(problem.device)
    return tokens[0], tokens[1], tokens[2], lists
