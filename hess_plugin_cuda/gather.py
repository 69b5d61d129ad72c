"""The backend for every device: gather the kept keys of a query block, then dense attention over them.

Rows (query blocks of all items and heads) whose gathered key lists have the same length form one batch, so
nothing is padded or masked on the key side. A batch is worked off in chunks that stay in the processor's
cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .lists import BlockLists


def forward(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, heads: tuple[int, ...] | None = None
) -> tuple[Tensor, None]:
    """Attention over block lists; see `Backend.forward`.

    Heads that keep everything go through one dense call, and so do the special queries. Reads the lengths of
    the lists on the host, for which it waits for a GPU several times.
    """
    patches = lists.query_tokens
    out = _patch_queries(q[:, :, :patches], k, v, lists, scale)
    if q.shape[2] > patches:
        out = torch.cat([out, F.scaled_dot_product_attention(q[:, :, patches:], k, v, scale=scale)], 2)
    full = _full_heads(lists)
    if full.numel():
        # Special queries once more: a head that keeps everything then rounds as one dense call for it does.
        full_q, full_k, full_v = (_heads(x, full) for x in (q, k, v))
        dense = F.scaled_dot_product_attention(full_q, full_k, full_v, scale=scale)
        out = out.flatten(0, 1).index_copy(0, full, dense[0]).view_as(out)
    return out, None


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lists: BlockLists, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, by gathering again instead of keeping every gathered key."""
    patches = lists.query_tokens
    total = torch.promote_types(v.dtype, torch.float32)  # a key's gradient sums over many rows
    grad_q = torch.empty_like(q)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=total, device=x.device) for x in (k, v))
    grad_q[:, :, :patches] = _patch_gradients(
        grad[:, :, :patches], q[:, :, :patches], k, v, lists, scale, grad_k, grad_v
    )
    if q.shape[2] > patches:
        parts = _dense_gradients(grad[:, :, patches:], q[:, :, patches:], k, v, scale)
        grad_q[:, :, patches:] = parts[0]
        grad_k += parts[1]
        grad_v += parts[2]
    full = _full_heads(lists)
    if full.numel():
        flow, full_q, full_k, full_v = (_heads(x, full) for x in (grad, q, k, v))
        parts = _dense_gradients(flow, full_q, full_k, full_v, scale)
        for whole, part in zip((grad_q, grad_k, grad_v), parts, strict=True):
            item, head = full.div(lists.heads, rounding_mode="floor"), full % lists.heads
            whole[item, head] = part[0].to(whole.dtype)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _full_heads(lists: BlockLists) -> Tensor:
    """Heads of all items `[n]` that keep everything."""
    return (lists.counts().sum(-1) == lists.query_blocks * lists.key_blocks).flatten().nonzero()[:, 0]


def _heads(x: Tensor, some: Tensor) -> Tensor:
    """Some of the heads of all items, `[1, n, N, d]` of `[B, H, N, d]`."""
    return x.reshape(-1, *x.shape[2:])[None, some]


def _rows(x: Tensor, lists: BlockLists) -> Tensor:
    """Patch queries `[B, H, P, d]` by query block, `[rows, block, d]`, the last of a head filled up with zeros."""
    block = min(lists.block_q, lists.query_tokens)
    padded = F.pad(x, (0, 0, 0, lists.query_blocks * block - lists.query_tokens))
    return padded.reshape(lists.rows, block, x.shape[-1])


def _patch_queries(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float) -> Tensor:
    """Patch queries `[B, H, P, d]` of the heads that drop something; the others' are left unset."""
    rows, width = _rows(q, lists), q.shape[-1]
    k, v = k.reshape(-1, width), v.reshape(-1, width)
    # Not a view of the rows: autograd lets nobody write into a view that a function of its own returns.
    out = q.new_empty((lists.batch, lists.heads, rows.shape[0] // (lists.batch * lists.heads) * rows.shape[1], width))
    flat = out.view_as(rows)
    for some, tokens in _Gathering(lists, k.shape[0] // (lists.batch * lists.heads), width).chunks():
        flat.index_copy_(0, some, _attend(rows.index_select(0, some), _pick(k, tokens), _pick(v, tokens), scale))
    return out if out.shape[2] == lists.query_tokens else out[:, :, : lists.query_tokens].contiguous()


def _patch_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    scale: float,
    grad_k: Tensor,
    grad_v: Tensor,
) -> Tensor:
    """Gradient of patch queries `[B, H, P, d]` of the heads that drop something; adds to those of all keys."""
    rows, flow, width = _rows(q, lists), _rows(grad, lists), q.shape[-1]
    keys = k.shape[2]
    k, v = k.reshape(-1, width), v.reshape(-1, width)
    flat_k, flat_v = grad_k.view(-1, width), grad_v.view(-1, width)
    out = torch.zeros_like(rows)
    for some, tokens in _Gathering(lists, keys, width).chunks():
        picked = rows.index_select(0, some), _pick(k, tokens), _pick(v, tokens)
        parts = _differentiate(_attend, flow.index_select(0, some), picked, scale)
        out.index_copy_(0, some, parts[0])
        flat_k.index_add_(0, tokens.flatten(), parts[1].flatten(0, 1).to(flat_k.dtype))
        flat_v.index_add_(0, tokens.flatten(), parts[2].flatten(0, 1).to(flat_v.dtype))
    return out.view(lists.batch, lists.heads, -1, width)[:, :, : lists.query_tokens]


def _dense_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, ...]:
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    return _differentiate(attend, grad, (q, k, v), scale)


def _differentiate(
    function: Callable[..., Tensor], grad: Tensor, tensors: tuple[Tensor, ...], scale: float
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = function(*leaves, scale)
    return torch.autograd.grad(out, leaves, grad)


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


def _pick(x: Tensor, tokens: Tensor) -> Tensor:
    return x.index_select(0, tokens.flatten()).view(*tokens.shape, -1)
