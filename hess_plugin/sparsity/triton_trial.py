"""Whether blocks on a device are chosen by Triton kernels: where Triton can run, and a trial agrees with sorting."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .rows import MapRows

_log = logging.getLogger(__name__)
_BUDGETS = (333, 1013)  # of 20 rows x 70 columns: even shares with a remainder
_BLOCK = 4


def uses_triton(device: torch.device) -> bool:
    """Whether blocks on this device are chosen by Triton kernels. The first answer for a GPU waits for a trial.

    While a CUDA graph is captured nothing can be tried, and Triton is taken where it can run.
    """
    if device.type != "cuda":
        return False
    return _refusal(device) is None if torch.cuda.is_current_stream_capturing() else _works(device)


def _refusal(device: torch.device) -> str | None:
    from hess_plugin_cuda.triton.support import device_refusal

    return device_refusal(device)


@functools.cache
def _works(device: torch.device) -> bool:
    reason = _refusal(device) or failure(device)
    if reason is not None:
        _log.warning("blocks on %s are chosen by sorting, which is slower than Triton's way: %s", device, reason)
    return reason is None


def failure(device: torch.device) -> str | None:
    """What is wrong with the kernels on a device; None where they choose what sorting on the CPU chooses."""
    from .pooling import pool_tokens
    from .sorted_rows import SortedRows

    # The caller's inference mode and default device are none of the trial's business.
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        # Tokens of whole numbers: their means and scores are the same bits everywhere, with many ties.
        generator = torch.Generator().manual_seed(0)
        q = torch.randint(-2, 3, (1, 2, 20 * _BLOCK - 2, 16), generator=generator).float()
        k = torch.randint(-2, 3, (1, 2, 70 * _BLOCK, 16), generator=generator).float()
        try:
            from hess_plugin_cuda.triton_selection import launch

            from .bisected_rows import BisectedRows

            tried = _chosen(BisectedRows, *(launch.pool(x.to(device), _BLOCK) for x in (q, k)))
        except torch.OutOfMemoryError:
            raise  # says nothing about the kernels
        except Exception as error:  # a kernel that does not compile or launch may raise anything
            first = (str(error).strip() or "no reason given").splitlines()[0]
            return f"a trial failed with {type(error).__name__}: {first}"
        wanted = _chosen(SortedRows, *(pool_tokens(x, _BLOCK).flatten(0, 1) for x in (q, k)))
    if all(torch.equal(a.cpu(), b) for a, b in zip(tried, wanted, strict=True)):
        return None
    return "a trial chose other blocks"


def _chosen(way: type[MapRows], q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """Counts and lists of pooled tokens `[2, 20, d]` and `[2, 70, d]`, by budgets and by counts; a covering count."""
    from .pooling import PooledTokens

    pooled = PooledTokens(q, k, 1, 2, q.shape[1], k.shape[1], 1, 1)
    rows = way(pooled)  # type: ignore[call-arg]
    counts = rows.spread(torch.tensor(_BUDGETS, device=q.device))
    row_ptr = torch.cat([counts.new_zeros(1), counts.flatten().cumsum(0)])
    lists = []
    for each in (rows, way(pooled)):  # type: ignore[call-arg]  # the second has to find thresholds of its own
        col = torch.zeros(sum(_BUDGETS) + 1, dtype=torch.int32, device=q.device)
        each.fill(counts, row_ptr, col)
        lists.append(col[:-1])
    # No cumulative probability of these tokens lies within 1e-3 of the first share: rounding decides nothing.
    covering = [way(pooled).uniform_counts(share, 3) for share in (0.3, 0.0)]  # type: ignore[call-arg]
    return counts, *lists, *covering
