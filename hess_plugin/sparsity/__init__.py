"""Which key blocks each query block attends to: block maps, uniform counts, budgets of heads, selectors."""

from .budgets import allocate, head_weights, spread, target_total
from .checks import SparsityError
from .counts import pooled_uniform_counts, streamed_uniform_counts, uniform_counts
from .marginal import allocate_by_gain, allocate_convex, convex_curves
from .pooled_values import PooledValues, pool_values
from .pooling import PooledTokens, block_map, pool, pool_tokens
from .selection import SELECTORS, select, select_from_map

__all__ = [
    "SELECTORS",
    "PooledTokens",
    "PooledValues",
    "SparsityError",
    "allocate",
    "allocate_by_gain",
    "allocate_convex",
    "block_map",
    "convex_curves",
    "head_weights",
    "pool",
    "pool_tokens",
    "pool_values",
    "pooled_uniform_counts",
    "select",
    "select_from_map",
    "spread",
    "streamed_uniform_counts",
    "target_total",
    "uniform_counts",
]
