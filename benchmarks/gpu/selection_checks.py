"""Section "check": the GPU's selection equals the CPU's, ties included, on scores that both compute exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from hess_plugin import sparsity

from .options import BLOCK_K, BLOCK_Q, WIDTH, Options
from .sheet import Sheet


def check_selection(options: Options, sheet: Sheet) -> None:
    """Compare selections of small integers, whose pooled scores are exact in any order of adding and full of ties."""
    sizes = [(1, 2, 700, 700), (2, 3, 1369, 1369)] if options.quick else []
    if not options.quick:
        sizes = [(2, 3, 1369, 1369), (1, 16, 13690, 13690), (1, 1, 1280, 1600 * 1369)]  # the last: 34225 blocks a row
    for batch, heads, queries, keys in sizes:
        for values in (2, 9):
            q = _blocks((batch, heads, queries), BLOCK_Q, values, 1)
            k = _blocks((batch, heads, keys), BLOCK_K, values, 2)
            _compare_budgets(q, k, values, options, sheet)
            _compare_counts(q, k, values, options, sheet)


def _blocks(shape: tuple[int, int, int], block: int, values: int, seed: int) -> Tensor:
    """Tokens `[B, H, N, d]` in bfloat16 of so many different small integers, all alike within a block."""
    batch, heads, tokens = shape
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(values, (batch, heads, -(-tokens // block), WIDTH), generator=generator) - values // 2
    return blocks.to(torch.bfloat16).repeat_interleave(block, 2)[:, :, :tokens]


def _compare_budgets(q: Tensor, k: Tensor, values: int, options: Options, sheet: Sheet) -> None:
    rows, columns = -(-q.shape[2] // BLOCK_Q), -(-k.shape[2] // BLOCK_K)
    shares = torch.rand(q.shape[:2], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    budgets = (shares * (columns - 1) + 1).mul(rows).long().clamp(rows, rows * columns)
    total = int(budgets.sum())
    # Known totals of the heads are those of every item; unknown ones leave room behind the lists.
    totals = tuple(budgets[0].tolist()) if len(budgets) == 1 else None
    rule = {"block_q": BLOCK_Q, "block_k": BLOCK_K, "scale": 0.01, "head_totals": totals}
    expected = sparsity.select(q, k, budgets=budgets, **rule)
    moved = q.to(options.device), k.to(options.device)
    given = sparsity.select(*moved, budgets=budgets.to(options.device), **rule).to("cpu")
    same = torch.equal(given.row_ptr, expected.row_ptr) and torch.equal(given.col[:total], expected.col)
    _tell(sheet, "budgets", q, k, values, 0 if same else 1, same)


def _compare_counts(q: Tensor, k: Tensor, values: int, options: Options, sheet: Sheet) -> None:
    rule = {"cdf_threshold": 0.9, "block_q": BLOCK_Q, "block_k": BLOCK_K, "scale": 0.01}
    expected = sparsity.streamed_uniform_counts(q, k, **rule)
    given = sparsity.streamed_uniform_counts(q.to(options.device), k.to(options.device), **rule).cpu()
    off = float((given != expected).double().mean())
    # The exponential function differs in its last bit from device to device, and with it a sum that hits the threshold.
    right = off <= 0.01 and int((given - expected).abs().max()) <= max(1, int(expected.max()) // 100)
    _tell(sheet, "counts of a CDF threshold", q, k, values, off, right)


def _tell(sheet: Sheet, what: str, q: Tensor, k: Tensor, values: int, off: float, right: bool) -> None:
    shape = f"{q.shape[0]} x {q.shape[1]} heads x {q.shape[2]} x {k.shape[2]} tokens"
    sheet.row(
        "selection", what=what, problem=f"{shape}, {values} values", rows_off=off, result="equal" if right else "WRONG"
    )
    if not right:
        sheet.fail(f"the selection by {what} differs from the CPU's on {shape} of {values} values.")
