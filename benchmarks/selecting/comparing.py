"""Cells compared on the scenes they share: means, paired differences with standard errors, rank correlations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from hess_plugin.agreement import spearman

from .records import Line

SURE = 3.0
"""Standard errors from which a difference counts: so many are looked at."""

ByScene = Mapping[str, Line]
"""Lines of one cell by scene."""


@dataclass(frozen=True)
class Metric:
    """A figure of a line: how it is read and shown, and the sign of better."""

    heading: str
    read: Callable[[Line], float]
    factor: float
    decimals: int
    better: int


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


AUC = Metric("AUC@30", lambda line: line.auc30, 100.0, 2, 1)
POINTS = Metric("point error", lambda line: line.point_error, 1000.0, 2, -1)
DRIFT = Metric("drift", lambda line: _mean(line.drift), 1.0, 3, -1)
RECALL = Metric("recall", lambda line: _mean(line.recall), 100.0, 1, 1)
SECONDS = Metric("ms", lambda line: line.seconds, 1000.0, 0, -1)


@dataclass(frozen=True)
class Estimate:
    """A mean over scenes, its standard error (NaN for a single scene) and how many scenes have it."""

    mean: float
    error: float
    count: int

    def better(self, metric: Metric) -> bool:
        """Whether a difference is surely on the better side."""
        return metric.better * self.mean > SURE * self.error

    def worse(self, metric: Metric) -> bool:
        """Whether it is surely on the other."""
        return -metric.better * self.mean > SURE * self.error


def value(cell: ByScene, metric: Metric) -> Estimate:
    """A metric of one cell."""
    return _estimate([metric.read(line) for line in cell.values()], metric)


def difference(cell: ByScene, baseline: ByScene, metric: Metric) -> Estimate:
    """A metric of one cell minus that of another, over the scenes that both have."""
    both = [(line, baseline[scene]) for scene, line in cell.items() if scene in baseline]
    return _estimate([metric.read(line) - metric.read(base) for line, base in both], metric)


def _estimate(values: Sequence[float], metric: Metric) -> Estimate:
    known = [metric.factor * value for value in values if not math.isnan(value)]
    if not known:
        return Estimate(math.nan, math.nan, 0)
    error = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return Estimate(statistics.fmean(known), error, len(known))


def rank_correlation(cells: Sequence[ByScene], metric: Metric, layer: int | None = None) -> float:
    """Spearman's rho, over cells, of a metric with realised drift: mean over layers, or that of one layer.

    A positive value says that accuracy follows drift: less drift, the better metric. NaN with fewer than three cells.
    """
    pairs = []
    for cell in cells:
        drifts = [_mean(line.drift) if layer is None else line.drift[layer] for line in cell.values() if line.drift]
        if drifts:
            pairs.append((_mean(drifts), metric.better * value(cell, metric).mean))
    if len(pairs) < 3:
        return math.nan
    drift, accuracy = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    return -float(spearman(drift, accuracy))
