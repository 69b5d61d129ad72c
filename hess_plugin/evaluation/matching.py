"""Matching measured sparsity: turning a knob until an arm keeps as much as another."""

from __future__ import annotations

from collections.abc import Sequence

TOLERANCE = 0.005


def next_knob(tried: Sequence[tuple[float, float]], target: float, low: float, high: float) -> float:
    """Where to set a knob next, so that the measured sparsity comes to a target.

    Sparsity must not fall as the knob grows. Between a value that gave too little and one that gave too much the
    next is interpolated, well inside; beyond all values so far the step doubles.

    Args:
        tried: pairs of knob and sparsity measured there, in the order of trying; at least one, none on target.
        target: sparsity wanted.
        low: least knob.
        high: largest knob.

    Returns:
        A knob in low..high; one that was tried already if there is nothing left to try.
    """
    below = max((point for point in tried if point[1] < target), default=None)
    above = min((point for point in tried if point[1] > target), default=None)
    if below is not None and above is not None:
        share = (target - below[1]) / (above[1] - below[1])
        # Close to one end, interpolation creeps where the curve bends; the middle third is always progress.
        share = min(max(share, 0.1), 0.9) if len(tried) < 4 else min(max(share, 0.3), 0.7)
        return below[0] + share * (above[0] - below[0])
    knob, sparsity = tried[-1]
    step = (target - sparsity) * 1.5
    if len(tried) > 1:
        last = abs(tried[-1][0] - tried[-2][0])
        step = max(abs(step), 2 * last) * (1 if step > 0 else -1)
    return min(max(knob + step, low), high)
