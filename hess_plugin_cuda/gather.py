"""The backend for every device: gather the kept keys of a query block, then dense attention over them.

Rows (query blocks of all items and heads) whose gathered key lists have the same length form one batch, so
nothing is padded or masked on the key side. A batch is worked off in chunks that stay in the processor's
cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .lists import BlockLists


def gather_attention(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float) -> Tensor:
    """Attention over block lists; see `block_sparse_attention` for the arguments.

    Heads that keep everything go through one dense call, and so do the special queries. Reads the lengths of
    the lists on the host, for which it waits for a GPU several times.
    """
    batch, heads, _, width = q.shape
    patches = lists.query_tokens
    out = _patch_queries(q[:, :, :patches], k, v, lists, scale)
    if q.shape[2] > patches:
        out = torch.cat([out, F.scaled_dot_product_attention(q[:, :, patches:], k, v, scale=scale)], 2)
    full = (lists.counts().sum(-1) == lists.query_blocks * lists.key_blocks).flatten().nonzero()[:, 0]
    if full.numel():
        # Special queries once more: a head that keeps everything then rounds as one dense call for it does.
        fq, fk, fv = (x.reshape(batch * heads, -1, width)[None, full] for x in (q, k, v))
        dense = F.scaled_dot_product_attention(fq, fk, fv, scale=scale)
        out = out.reshape(batch * heads, -1, width).index_copy(0, full, dense[0]).view_as(out)
    return out


def _patch_queries(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float) -> Tensor:
    """Patch queries `[B, H, P, d]` of the heads that drop something; the others' are left unset."""
    batch, heads, patches, width = q.shape
    block = min(lists.block_q, patches)
    padded = F.pad(q, (0, 0, 0, lists.query_blocks * block - patches))
    rows = padded.reshape(lists.rows, block, width)
    out = _GatherRows.apply(
        rows, k.reshape(-1, width), v.reshape(-1, width), _Gathering(lists, k.shape[2], width), scale
    )
    return out.view(batch, heads, -1, width)[:, :, :patches]


@dataclass(frozen=True)
class _Gathering:
    """Which rows to compute together, and where their keys are.

    Attributes:
        lists: the kept patch blocks.
        keys: keys of one head, special ones included.
        width: of a head.
    """

    lists: BlockLists
    keys: int
    width: int

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows `[r]` and the tokens `[r, L]` they see, as rows of k flattened to `[B * H * N_k, d]`."""
        for rows, blocks, length in self._groups():
            size = max(1, self._chunk_tokens() // (length + self.keys - self.lists.key_tokens))
            for some in rows.split(size):
                yield some, self._tokens(some, blocks, length)

    def _chunk_tokens(self) -> int:
        # On a CPU the gathered keys of a chunk should still be in the cache when they are used: about 1 MiB for one
        # thread, where chunks of 64 MiB are clearly slower. Several threads meet after every step, so their chunks are
        # larger: on a busy machine every meeting waits for the slowest. A GPU wants few launches instead.
        threads = torch.get_num_threads()
        size = 2**20 if threads == 1 else 2**20 * max(8, threads)
        if self.lists.device.type != "cpu":
            size = 2**28
        return size // (4 * self.width)

    def _groups(self) -> list[tuple[Tensor, int, int]]:
        """Rows to compute, by kept blocks and kept patch tokens; heads that keep everything are left out."""
        lists = self.lists
        counts = lists.counts()
        sparse = (counts.sum(-1, keepdim=True) < lists.query_blocks * lists.key_blocks).expand_as(counts)
        kind = counts.flatten() * 2
        missing = -lists.key_tokens % lists.block_k
        if missing:  # a row that keeps the ragged last block sees fewer tokens than others of its count
            kind = kind + (lists.col[lists.row_ptr[1:] - 1] == lists.key_blocks - 1)
        kind, order = torch.where(sparse.flatten(), kind, 0).sort(stable=True)
        kinds, sizes = (x.tolist() for x in kind.unique_consecutive(return_counts=True))
        groups = zip(kinds, order.split(sizes), strict=True)
        return [(rows, n // 2, n // 2 * lists.block_k - n % 2 * missing) for n, rows in groups if n]

    def _tokens(self, rows: Tensor, blocks: int, length: int) -> Tensor:
        lists, device = self.lists, rows.device
        start = lists.row_ptr.index_select(0, rows)[:, None]
        kept = lists.col[start + torch.arange(blocks, device=device)].long()
        inside = torch.arange(lists.block_k, device=device)
        # The ragged block is the last of its row, so its missing tokens are the last ones.
        patches = (kept[:, :, None] * lists.block_k + inside).flatten(1)[:, :length]
        special = torch.arange(lists.key_tokens, self.keys, device=device).expand(rows.numel(), -1)
        head = rows.div(lists.query_blocks, rounding_mode="floor")[:, None]
        return torch.cat([patches, special], 1) + head * self.keys


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Dense attention of rows `[r, block, d]` over their own keys `[r, L, d]`."""
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=scale)[:, 0]


class _GatherRows(torch.autograd.Function):
    """Attention of all rows; the backward pass gathers again instead of storing every gathered key."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, k: Tensor, v: Tensor, plan: _Gathering, scale: float) -> Tensor:
        ctx.save_for_backward(rows, k, v)
        ctx.plan, ctx.scale = plan, scale
        out = torch.empty_like(rows)
        for some, tokens in plan.chunks():
            out.index_copy_(0, some, _attend(rows.index_select(0, some), _pick(k, tokens), _pick(v, tokens), scale))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, k, v = ctx.saved_tensors
        total = torch.promote_types(k.dtype, torch.float32)  # a key's gradient sums over many rows
        grad_rows = torch.zeros_like(rows)
        grad_k, grad_v = torch.zeros_like(k, dtype=total), torch.zeros_like(v, dtype=total)
        for some, tokens in ctx.plan.chunks():
            with torch.enable_grad():
                leaf_q = rows.index_select(0, some).detach().requires_grad_()
                leaf_k = _pick(k, tokens).detach().requires_grad_()
                leaf_v = _pick(v, tokens).detach().requires_grad_()
                out = _attend(leaf_q, leaf_k, leaf_v, ctx.scale)
            parts = torch.autograd.grad(out, (leaf_q, leaf_k, leaf_v), grad.index_select(0, some))
            grad_rows.index_copy_(0, some, parts[0])
            grad_k.index_add_(0, tokens.flatten(), parts[1].flatten(0, 1).to(total))
            grad_v.index_add_(0, tokens.flatten(), parts[2].flatten(0, 1).to(total))
        return grad_rows, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _pick(x: Tensor, tokens: Tensor) -> Tensor:
    return x.index_select(0, tokens.flatten()).view(*tokens.shape, -1)
