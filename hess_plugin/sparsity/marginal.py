"""Budgets by marginal gain: pairs go where one more lowers the harm most, over all heads of all layers at once."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .checks import SparsityError, check_grid

_SNAP = 1e-6  # of a pair: a knot this close to a whole number of pairs is that number


def allocate_by_gain(total: int, shares: Tensor, harm: Tensor, *, rows: int, columns: int, minimum: int = 2) -> Tensor:
    """Share a total among heads so that the sum of their harms is least.

    The harm of a head is taken as the largest convex function below what was measured: what several blocks gain
    together is then the sum of what each gains, and the best budgets are found by taking the gains in descending
    order. It ends in no harm at share 1, goes straight between measured shares, and on with the first slope below the
    first of them. Exact: no other integer budgets of this total have less harm, to rounding. Pairs that gain the same
    everywhere are divided in proportion to how many of them each head has, by largest remainder, ties to the lower
    head.

    Args:
        total: pairs to keep in all.
        shares: kept shares that were measured, ascending, above 0 and at most 1, ``[K]``.
        harm: at those shares, ``[..., K]``, >= 0; its unit does not matter as long as heads have the same.
        rows: query blocks T_q.
        columns: key blocks T_k.
        minimum: key blocks every row keeps, T_k if there are fewer.

    Returns:
        int64 ``[...]`` on the CPU, each from rows * min(minimum, columns) to rows * columns, summing to the total.

    Raises:
        SparsityError: the total is out of reach, shares do not ascend, or a harm is negative or not finite.
    """
    _check_curves(shares, harm)
    return allocate_convex(total, *convex_curves(shares, harm), rows=rows, columns=columns, minimum=minimum)


def allocate_convex(
    total: int, knots: np.ndarray, heights: np.ndarray, *, rows: int, columns: int, minimum: int = 2
) -> Tensor:
    """`allocate_by_gain` of curves that are convex already, as `convex_curves` gives them.

    Args:
        total: pairs to keep in all.
        knots: shares from 0 to 1, ``[K']``.
        heights: harm at them, ``[..., K']``.
        rows: query blocks T_q.
        columns: key blocks T_k.
        minimum: key blocks every row keeps, T_k if there are fewer.

    Raises:
        SparsityError: the total is out of reach.
    """
    check_grid(rows, columns, minimum)
    heads, pairs, least = math.prod(heights.shape[:-1]), rows * columns, rows * min(minimum, columns)
    if not heads * least <= total <= heads * pairs:
        raise SparsityError(
            f"{heads} heads of {rows} x {columns} blocks, at least {min(minimum, columns)} a row, can keep "
            f"{heads * least} to {heads * pairs} pairs in all; got a total of {total}."
        )
    stops = _stops(knots * pairs, least, pairs)
    widths = np.diff(stops)
    at_stops = np.stack([np.interp(stops, knots * pairs, curve) for curve in heights.reshape(heads, -1)])
    # Rounding must not let a later piece of a head gain more than an earlier one.
    gains = np.minimum.accumulate(-np.diff(at_stops) / widths, axis=-1)
    return torch.from_numpy(least + _filled(total - heads * least, gains, widths)).reshape(heights.shape[:-1])


def convex_curves(shares: Tensor, harm: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The largest convex function below measured harm, which ends in no harm at share 1.

    Args:
        shares: ascending, ``[K]``.
        harm: at those shares, ``[..., K]``.

    Returns:
        Shares of its knots from 0 to 1, float64 ``[K']``, and its values there, ``[..., K']``; straight in between.
    """
    inner = shares.detach().cpu().double().numpy()
    inner = inner[inner < 1.0]
    measured = harm.detach().cpu().double().numpy()[..., : len(inner)]
    knots = np.concatenate([inner, [1.0]])
    values = np.concatenate([measured, np.zeros((*measured.shape[:-1], 1))], -1)
    flat = np.stack([_minorant(knots, curve) for curve in values.reshape(-1, len(knots))])
    slope = (flat[:, 1] - flat[:, 0]) / (knots[1] - knots[0]) if len(knots) > 1 else np.zeros(len(flat))
    first = flat[:, 0] - slope * knots[0]
    return np.concatenate([[0.0], knots]), np.column_stack([first, flat]).reshape(*values.shape[:-1], -1)


def _minorant(knots: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The lower convex hull of points, at all of their places."""
    hull: list[int] = []
    for index in range(len(knots)):
        while len(hull) > 1 and _above(knots, values, hull[-2], hull[-1], index):
            hull.pop()
        hull.append(index)
    return np.interp(knots, knots[hull], values[hull])


def _above(knots: np.ndarray, values: np.ndarray, first: int, middle: int, last: int) -> bool:
    """Whether the point in the middle lies on or above the line between its neighbours."""
    before = (values[middle] - values[first]) * (knots[last] - knots[middle])
    after = (values[last] - values[middle]) * (knots[middle] - knots[first])
    return bool(before >= after)


def _stops(knots: np.ndarray, least: int, cap: int) -> np.ndarray:
    """Whole numbers of pairs between which every curve is straight, if it is looked at in whole numbers only."""
    near = np.rint(knots)
    knots = np.where(np.abs(knots - near) < _SNAP, near, knots)
    both = np.concatenate([np.floor(knots), np.ceil(knots), [least, cap]]).clip(least, cap)
    return np.unique(both.astype(np.int64))


def _filled(room: int, gains: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Pairs of each head beyond its floor: the pieces ``[heads, M]`` of most gain, `room` pairs of them in all."""
    if room == 0:
        return np.zeros(len(gains), dtype=np.int64)
    order = np.argsort(-gains, axis=None, kind="stable")
    pieces = np.broadcast_to(widths, gains.shape)
    filled = np.cumsum(pieces.reshape(-1)[order])
    level = gains.reshape(-1)[order[np.searchsorted(filled, room)]]
    taken = (pieces * (gains > level)).sum(-1)
    tied = (pieces * (gains == level)).sum(-1)
    return taken + _in_proportion(room - int(taken.sum()), tied)


def _in_proportion(total: int, sizes: np.ndarray) -> np.ndarray:
    """Divide a total in proportion to sizes by largest remainder, none getting more than its size."""
    whole = sum(int(size) for size in sizes)
    exact = [divmod(total * int(size), whole) for size in sizes]  # of any length: a product may exceed 64 bits
    parts = np.array([quotient for quotient, _ in exact], dtype=np.int64)
    places = sorted(range(len(sizes)), key=lambda index: -exact[index][1])
    parts[places[: total - int(parts.sum())]] += 1
    return parts


def _check_curves(shares: Tensor, harm: Tensor) -> None:
    if shares.ndim != 1 or harm.ndim < 1 or len(shares) < 1 or harm.shape[-1] != len(shares) or harm.numel() == 0:
        raise SparsityError(f"Wanted shares [K] and harm [..., K]; got {list(shares.shape)} and {list(harm.shape)}.")
    if not bool((shares[1:] > shares[:-1]).all() and (shares > 0).all() and (shares <= 1).all()):
        raise SparsityError(f"Kept shares must ascend from above 0 to at most 1; got {shares.tolist()}.")
    if not bool((torch.isfinite(harm) & (harm >= 0)).all()):
        raise SparsityError("Harm must be finite and >= 0 for every head; calibrate again.")
