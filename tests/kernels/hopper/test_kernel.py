"""The kernel on the emulated machine against float64, under random schedules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hess_plugin_cuda import BlockLists, token_mask

Case = tuple[Tensor, Tensor, Tensor, BlockLists]


def exact(case: Case, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64."""
    q, k, v, lists = case
    scores = scale * (q.double() @ k.double().mT)
    scores = scores.masked_fill(~token_mask(lists, q.shape[2], k.shape[2]), -torch.inf)
    return scores.softmax(-1) @ v.double(), scores.logsumexp(-1)


def check(case: Case, given: tuple[Tensor, Tensor], scale: float = 0.125, heads: slice = slice(None)) -> None:
    """Error against float64 at most twice that of plain torch in the same dtype, plus one rounded addition."""
    q, k, v, lists = case
    out, lse = (x[:, heads] for x in given)
    wanted, wanted_lse = (x[:, heads] for x in exact(case, scale))
    mask = token_mask(lists, q.shape[2], k.shape[2])
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[:, heads]
    allowed = 2 * (plain.double() - wanted).abs().max() + torch.finfo(q.dtype).eps * wanted.abs().max()
    error = (out.double() - wanted).abs().max()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"
    torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-5, rtol=1e-5)


CASES = [
    # patch queries and keys, special queries and keys, batch, heads
    ((128, 128), (0, 0), 1, 1),  # everything divides
    ((128, 64), (0, 0), 1, 1),  # a single entry, an odd half
    ((300, 300), (5, 5), 1, 2),  # ragged on both sides
    ((1, 1), (0, 0), 1, 1),  # a single token
    ((130, 200), (1, 1), 2, 1),  # one special token
    ((256, 320), (17, 70), 1, 2),  # cross attention, special keys of a full and a ragged block
    ((140, 1000), (70, 130), 2, 2),  # two full special blocks and two keys
    ((100, 2500), (3, 70), 1, 1),  # more entries than are looked up at once
    ((128, 448), (130, 64), 1, 1),  # two tiles of special queries; nothing ragged
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("patches", "special", "batch", "heads"), CASES)
def test_matches_float64(
    gpu: Any, make_case: Callable[..., Case], patches: Any, special: Any, batch: int, heads: int, dtype: torch.dtype
) -> None:
    case = make_case(patches, special, dtype, batch=batch, heads=heads)
    check(case, gpu.attend(*case, seed=patches[1]))


@pytest.mark.parametrize("seed", range(12))
def test_every_schedule_gives_the_same_bits(gpu: Any, make_case: Callable[..., Case], seed: int) -> None:
    """Several items for each CTA, so that the ring of stages and the orders wrap around."""
    case = make_case((260, 700), (5, 9), torch.bfloat16, heads=2, seed=seed % 3)
    out, lse = gpu.attend(*case, seed=seed, multiprocessors=1 + seed % 2)
    check(case, (out, lse))
    again, lse_again = gpu.attend(*case, seed=seed + 1000, multiprocessors=4)
    assert torch.equal(out, again) and torch.equal(lse, lse_again)


@pytest.mark.parametrize(("stages", "turns"), [(2, 1), (3, 0)])
def test_other_stages_and_no_turns(
    emulate: Callable[[Path], Any],
    compile_emulator: Callable[..., Path],
    make_case: Callable[..., Case],
    stages: int,
    turns: int,
) -> None:
    gpu = emulate(compile_emulator(stages, turns))
    case = make_case((260, 700), (5, 9), torch.float16, heads=2)
    for seed in range(2):
        check(case, gpu.attend(*case, seed=seed, multiprocessors=1 + seed))
