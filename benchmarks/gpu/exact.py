"""What attention over lists is, in float64 on the keys that a row keeps; and what plain torch makes of the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hess_plugin_cuda import BlockLists


def row_keys(lists: BlockLists, row: int, keys: int) -> Tensor:
    """Keys that a row of the lists sees, in order."""
    begin, end = lists.row_ptr[row : row + 2].tolist()
    inside = torch.arange(lists.block_k, device=lists.device)
    patches = (lists.col[begin:end].long()[:, None] * lists.block_k + inside).flatten()
    special = torch.arange(lists.key_tokens, keys, device=lists.device)
    return torch.cat([patches[patches < lists.key_tokens], special])


def row_queries(lists: BlockLists, row: int) -> slice:
    """Queries of a row."""
    first = row % lists.query_blocks * lists.block_q
    return slice(first, min(first + lists.block_q, lists.query_tokens))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of q `[n, d]` over k, v `[m, d]`: in float64, its log-sum-exp, and plain torch's in their own type."""
    scores = q.double() @ k.double().T * scale
    exact = scores.softmax(-1) @ v.double()
    plain = F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None], scale=scale)[0, 0]
    return exact, scores.logsumexp(-1), plain


class Worst:
    """The largest errors over all rows that were looked at."""

    def __init__(self) -> None:
        self.error = self.plain = self.lse = self.size = 0.0
        self.rows, self.finite = 0, True

    def add(self, given: Tensor, lse: Tensor | None, expected: tuple[Tensor, Tensor, Tensor]) -> None:
        """Compare one row's output and log-sum-exp with what `attend` returned."""
        exact, exact_lse, plain = expected
        self.rows += 1
        self.finite &= bool(given.isfinite().all())
        self.error = max(self.error, float((given.double() - exact).abs().max()))
        self.plain = max(self.plain, float((plain.double() - exact).abs().max()))
        self.size = max(self.size, float(exact.abs().max()))
        if lse is not None:
            self.finite &= bool(lse.isfinite().all())
            self.lse = max(self.lse, float((lse.double() - exact_lse).abs().max()))

    def right(self, dtype: torch.dtype) -> bool:
        """Whether no error is above twice that of plain torch and one rounding, and none of the log-sum-exp 1e-3."""
        allowed = 2 * self.plain + torch.finfo(dtype).eps * self.size
        return self.finite and self.error <= allowed and self.lse <= 1e-3
