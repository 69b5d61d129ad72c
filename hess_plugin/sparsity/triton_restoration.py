"""Selectors by drift in Triton, the way for a GPU: where it is taken, and what its kernels are given.

See `hess_plugin_cuda.triton_selection.restoration`.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from .drift import normalised as normalised
from .pooled_values import PooledValues
from .pooling import PooledTokens
from .sub_blocks import part_sizes
from .triton_trial import uses_triton

_log = logging.getLogger(__name__)

_PARTS = (1, 2, 4, 8)
_MOST_ROUNDS = 6
_GROUP = 2**16
"""Query sub-blocks of the heads that are worked on one after the other, with some 800 bytes kept for each of them."""

_TRIALS = ((5, 1), (5, 2))
"""Seeds and sub-blocks of problems in which no rounding of float32 decides."""


def restores_by_triton(pooled: PooledTokens, rounds: int) -> bool:
    """Whether rows of these tokens are restored by Triton kernels. The first answer for a GPU waits for a trial."""
    device = pooled.q.device
    if not uses_triton(device):
        return False
    if pooled.parts_q not in _PARTS or pooled.parts_k not in _PARTS or rounds > _MOST_ROUNDS:
        _tell_parts(pooled.parts_q, pooled.parts_k)
        return False
    return (device.type == "cuda" and torch.cuda.is_current_stream_capturing()) or _works(device)


@functools.cache
def _tell_parts(parts_q: int, parts_k: int) -> None:
    """Say once that there are no kernels for so many parts."""
    _log.warning(
        "blocks in %d x %d parts are restored without Triton, which is slower; it takes %s of each",
        parts_q,
        parts_k,
        ", ".join(str(parts) for parts in _PARTS),
    )


def restore_by_triton(
    pooled: PooledTokens, values: PooledValues, counts: Tensor, row_ptr: Tensor, col: Tensor, rounds: int
) -> None:
    """See `restored_rows`."""
    from hess_plugin_cuda.triton_selection import restoration
    from hess_plugin_cuda.triton_selection.tokens import Tokens

    starts = row_ptr[:-1].view_as(counts)
    patches, queries = pooled.k.shape[1], pooled.q.shape[1]
    sizes = part_sizes(pooled.key_tokens, pooled.pool_k, patches, pooled.k.device)
    weights = part_sizes(pooled.query_tokens, pooled.pool_q, queries, pooled.q.device).float() / pooled.block_q
    step = max(1, _GROUP // queries)
    for first in range(0, pooled.q.shape[0], step):
        heads = slice(first, first + step)
        u = normalised(torch.cat([values.v[heads], values.special_v[heads]], 1), patches)
        tokens = Tokens(
            pooled.q[heads].contiguous(), pooled.k[heads].contiguous(), u[:, :patches].contiguous(),
            values.special_k[heads].contiguous(), u[:, patches:].contiguous(), sizes.float().log_(), weights,
            pooled.parts_q, pooled.parts_k,
        )  # fmt: skip
        restoration.fill(
            tokens, counts[heads].contiguous(), starts[heads], col, rounds, chunk_entries=pooled.chunk_entries
        )


@functools.cache
def _works(device: torch.device) -> bool:
    reason = restoration_failure(device)
    if reason is not None:
        _log.warning("blocks on %s are restored without Triton, which is slower: %s", device, reason)
    return reason is None


def restoration_failure(device: torch.device) -> str | None:
    """What is wrong with the kernels on a device; None where they choose what torch chooses on the CPU."""
    from .restoration import ROUNDS, restored_rows

    # The caller's inference mode and default device are none of the trial's business.
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        for seed, parts in _TRIALS:
            pooled, values, counts = _problem(seed, parts)
            row_ptr = torch.nn.functional.pad(counts.flatten().cumsum(0), (1, 0))
            wanted = torch.zeros(int(row_ptr[-1]) + 1, dtype=torch.int32)
            for rounds in (0, ROUNDS):
                restored_rows(pooled, values, counts, row_ptr, wanted, rounds=rounds)
                try:
                    tried = torch.zeros_like(wanted, device=device)
                    restore_by_triton(
                        _moved(pooled, device), _moved(values, device), counts.to(device), row_ptr.to(device), tried,
                        rounds,
                    )  # fmt: skip
                    same = torch.equal(tried[:-1].cpu(), wanted[:-1])
                except torch.OutOfMemoryError:
                    raise  # says nothing about the kernels
                except Exception as error:  # a kernel that does not compile or launch may raise anything
                    first = (str(error).strip() or "no reason given").splitlines()[0]
                    return f"a trial failed with {type(error).__name__}: {first}"
                if not same:
                    return "a trial chose other blocks"
    return None


def _problem(seed: int, parts: int) -> tuple[PooledTokens, PooledValues, Tensor]:
    """Two heads of 3 x 70 blocks, each of so many sub-blocks on either side, and 3 special keys."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tokens: int) -> Tensor:
        return torch.randn(2, tokens, 16, dtype=torch.float32, generator=generator)

    # The last blocks are ragged: the last sub-blocks are a token short.
    pooled = PooledTokens(
        normal(3 * parts) / 2,
        normal(70 * parts),
        1,
        2,
        6 * parts - 1,
        140 * parts - 1,
        2 * parts,
        2 * parts,
        None,
        2,
        2,
    )
    counts = torch.randint(1, 71, (2, 3), generator=generator)
    return pooled, PooledValues(normal(70 * parts), normal(3), normal(3)), counts


def _moved(x: Any, device: torch.device) -> Any:
    """A dataclass with its tensors on a device."""
    return replace(x, **{f.name: y.to(device) for f in fields(x) if isinstance(y := getattr(x, f.name), Tensor)})
