"""Block-sparse attention: block lists, a plain reference and the backends that skip the dropped blocks."""

from .attention import block_sparse_attention
from .backends import Backend, Problem, available_backends, register_backend, resolve_backend
from .built_in import register_built_in
from .lists import BlockLists, block_count
from .reference import reference_attention, token_mask

__all__ = [
    "Backend",
    "BlockLists",
    "Problem",
    "available_backends",
    "block_count",
    "block_sparse_attention",
    "reference_attention",
    "register_backend",
    "resolve_backend",
    "token_mask",
]

register_built_in()
