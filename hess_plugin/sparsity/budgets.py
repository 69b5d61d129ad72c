"""Budgets: how many block pairs each head of a layer keeps, as exact integers (HeSS, sec. 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import SparsityError, check_grid, check_sparsity
from .ranking import rank

ALLOCATIONS = ("equal", "hess", "reverse", "uncapped", "random")


def target_total(sparsity: float, heads: int, rows: int, columns: int, minimum: int = 2) -> int:
    """Kept block pairs of a layer for a plain sparsity target: the nearest integer not below the floor.

    Args:
        sparsity: dropped share of the pairs, 0 (dense) to 1.
        heads: heads H.
        rows: query blocks T_q.
        columns: key blocks T_k.
        minimum: key blocks every row keeps, T_k if there are fewer.

    Raises:
        SparsityError: a number is out of range.
    """
    check_sparsity(sparsity)
    check_grid(rows, columns, minimum)
    pairs = heads * rows * columns
    return min(pairs, max(heads * rows * min(minimum, columns), math.floor((1.0 - sparsity) * pairs + 0.5)))


def head_weights(scores: Tensor, allocation: str, seed: int = 0) -> Tensor:
    """Weights by which a layer's heads share its total: the named allocation of the heads' scores.

    Args:
        scores: HeSS of each head, `[..., H]`, >= 0; needs no normalisation. All zero counts as equal.
        allocation: "hess" and "uncapped" take the scores as they are (the latter goes with
            `allocate(capped=False)`); "equal" gives every head the same; "reverse" gives the best head the
            worst head's score and so on (the paper's sanity check); "random" shuffles the scores among the
            heads.
        seed: of "random".

    Returns:
        float64 `[..., H]`.

    Raises:
        SparsityError: the allocation is unknown, or a score is negative or not finite.
    """
    if allocation not in ALLOCATIONS:
        raise SparsityError(f"There is no allocation {allocation!r}; choose one of {', '.join(ALLOCATIONS)}.")
    scores = scores.to(torch.float64)
    if not bool((torch.isfinite(scores) & (scores >= 0)).all()):
        raise SparsityError(f"Scores of heads must be finite and >= 0; got {scores.tolist()}. Calibrate again.")
    if allocation == "equal":
        return torch.ones_like(scores)
    if allocation == "reverse":
        return scores.sort(-1).values.gather(-1, rank(scores))
    if allocation == "random":
        order = torch.randperm(scores.shape[-1], generator=torch.Generator().manual_seed(seed), device="cpu")
        return scores[..., order.to(scores.device)]
    return scores


def allocate(
    total: int | Tensor, weights: Tensor, *, rows: int, columns: int, minimum: int = 2, capped: bool = True
) -> Tensor:
    """Share a layer's total among its heads in proportion to weights, by water-filling (HeSS, sec. 3).

    No head gets more than rows * columns; what is over goes to the other heads in proportion to their
    weights, until nothing overflows. No head gets less than rows * min(minimum, columns). Heads of weight
    zero get that floor, and share equally what is left once all others are full. Fractions are rounded by
    largest remainder, ties to the lower head.

    Args:
        total: pairs to keep: an int, or an int64 tensor `[...]` on the device of the weights (no host wait; a
            total outside what is feasible is moved to the nearest feasible one, where an int is refused).
        weights: `[..., H]`, >= 0, broadcast against the total; need no normalisation.
        rows: query blocks T_q.
        columns: key blocks T_k.
        minimum: key blocks every row keeps, T_k if there are fewer.
        capped: False drops the surplus of full heads instead of passing it on (the paper's ablation): budgets
            are then in proportion, cut at the cap, and may sum to less than the total.

    Returns:
        int64 `[..., H]`; with `capped` it sums to the total exactly.

    Raises:
        SparsityError: an int total is below all floors or above all caps, or the grid is empty.
    """
    check_grid(rows, columns, minimum)
    heads = weights.shape[-1]
    floor, cap = rows * min(minimum, columns), rows * columns
    if isinstance(total, int):
        if not heads * floor <= total <= heads * cap:
            raise SparsityError(
                f"{heads} heads of {rows} x {columns} blocks, at least {min(minimum, columns)} a row, can "
                f"keep {heads * floor} to {heads * cap} pairs in all; got a total of {total}."
            )
        total = torch.tensor(total, device=weights.device)
    total = total.clamp(heads * floor, heads * cap)
    # Without a cap a single head can get no more than the whole total.
    ceiling = cap if capped else heads * cap
    budgets = _round_to(total, _water_fill(total, weights.to(torch.float64), floor, ceiling), ceiling)
    return budgets.clamp(max=cap)


def _water_fill(total: Tensor, weights: Tensor, floor: int, cap: int) -> Tensor:
    """Real-valued `clip(level * weights, floor, cap)` whose sum is `total`, float64 `[..., H]`.

    The sum is piecewise linear in the level with a kink where a head leaves its floor or meets its cap.
    Evaluating it at all 2 H kinks gives the piece that holds the total, and the level on it, without a loop.
    """
    # Rescaled so that kinks are of order one whatever the scale of the scores; 1e-30 of the largest is as
    # good as zero.
    weights = weights / weights.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    weights, _ = torch.broadcast_tensors(weights, total.unsqueeze(-1))
    zero = weights <= 1e-30
    weights = torch.where(zero, 0.0, weights)
    safe = torch.where(zero, 1.0, weights)
    kinks = torch.cat([floor / safe, cap / safe], -1)
    kinks = torch.where(torch.cat([zero, zero], -1), 0.0, kinks).sort(-1).values
    sums = torch.clamp(kinks.unsqueeze(-1) * weights.unsqueeze(-2), floor, cap).sum(-1)
    goal = total.to(torch.float64).unsqueeze(-1)
    above = (sums <= goal).sum(-1, keepdim=True).clamp(max=kinks.shape[-1] - 1)
    below = (above - 1).clamp(min=0)
    low, high = sums.gather(-1, below), sums.gather(-1, above)
    share = ((goal - low) / (high - low).clamp(min=1e-9)).clamp(0.0, 1.0)
    start, end = kinks.gather(-1, below), kinks.gather(-1, above)
    budgets = torch.clamp((start + (end - start) * share) * weights, floor, cap)
    # What heads of positive weight cannot take goes to the others equally.
    left = (goal - budgets.sum(-1, keepdim=True)).clamp(min=0.0)
    others_full = torch.where(zero, floor, cap).sum(-1, keepdim=True) <= goal
    equal = floor + left / zero.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(zero & others_full, equal, budgets)


def _round_to(total: Tensor, budgets: Tensor, cap: int) -> Tensor:
    """Integers that sum to `total`: floors, then one more for the largest remainders."""
    whole = budgets.floor()
    # Remainders equal in exact arithmetic differ by rounding: compare them to six digits, so that ties are
    # ties.
    remainder = torch.where(whole >= cap, -1.0, ((budgets - whole) * 1e6).round())
    whole = whole.to(torch.int64)
    missing = total.unsqueeze(-1) - whole.sum(-1, keepdim=True)
    return whole + (rank(remainder) < missing)


def spread(budgets: Tensor, rows: int, columns: int, gains: Tensor | None = None) -> Tensor:
    """Divide each head's budget evenly over its query rows (ReSS's reading of HeSS).

    Args:
        budgets: int64 `[..., H]`, each from rows to rows * columns.
        rows: query blocks T_q.
        columns: key blocks T_k.
        gains: `[..., H, rows]`; what each row gains by one block more than the even share. The remainder goes
            to the rows that gain most, ties to the lower row; without gains to the first rows.

    Returns:
        int64 `[..., H, rows]`, each head summing to its budget.
    """
    share = budgets.clamp(0, rows * columns).unsqueeze(-1)
    base, extra = share.div(rows, rounding_mode="floor"), share % rows
    places = torch.arange(rows, device=budgets.device) if gains is None else rank(gains)
    return base + (places < extra)
