"""What selection did to the attention of a forward, measured beside it: realised drift and recalled attention mass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import hess_plugin_cuda
from hess_plugin import Site
from hess_plugin_cuda import BlockLists, token_mask


def output_metric(weight: Tensor, heads: int) -> Tensor:
    """The metric of every head's output, ``M_h = W_O^h' W_O^h``: float64 ``[H, d, d]``.

    Args:
        weight: W_O ``[C, H * d]``, columns head-major.
        heads: heads H.
    """
    columns = weight.detach().double().unflatten(1, (heads, -1)).movedim(1, 0)
    return columns.mT @ columns


@dataclass(eq=False)
class Probe:
    """Watches the block-sparse attention calls inside its context; nothing in the forward changes.

    A site that is answered dense has neither error nor loss.

    Args:
        sites: whose attention is watched; their modules join heads by ``proj``, as the demo model's do.

    Attributes:
        drift: of each site: mean over patch tokens of ``e' M_h e``, summed over heads, e what sparsification changed
            in the output of head h.
        recall: of each site: share of the patch queries' true attention on patch keys that falls on kept blocks.
        seconds: what watching took since `clear`.
    """

    sites: Sequence[Site]
    drift: list[float] = field(init=False)
    recall: list[float] = field(init=False)
    seconds: float = field(init=False)

    def __post_init__(self) -> None:
        self._attend = hess_plugin_cuda.block_sparse_attention
        self._site = 0
        self._undo = ExitStack()
        self.clear()

    def clear(self) -> None:
        """Forget the last forward."""
        self.drift, self.recall, self.seconds = [0.0] * len(self.sites), [1.0] * len(self.sites), 0.0

    def __enter__(self) -> Probe:
        for index, site in enumerate(self.sites):
            hook = site.module.register_forward_pre_hook(lambda *_, index=index: setattr(self, "_site", index))
            self._undo.callback(hook.remove)
        self._undo.enter_context(mock.patch.object(hess_plugin_cuda, "block_sparse_attention", self._watch))
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _watch(self, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, **options: Any) -> Tensor:
        output = self._attend(q, k, v, lists, **options)
        started, scale = time.perf_counter(), options.get("scale")
        self._compare(q, k, v, lists, output, q.shape[-1] ** -0.5 if scale is None else scale)
        self.seconds += time.perf_counter() - started
        return output

    def _compare(self, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, sparse: Tensor, scale: float) -> None:
        patches = lists.query_tokens  # they come first
        attention = (q[:, :, :patches] @ k.mT * scale).softmax(-1)
        change = (sparse[:, :, :patches] - attention @ v).double()
        site = self.sites[self._site]
        metric = output_metric(site.module.get_submodule("proj").weight, site.num_heads)
        squares = ((change @ metric) * change).sum((1, 3))
        self.drift[self._site] = float(squares.mean())
        on_patches = attention[..., : lists.key_tokens]
        kept = on_patches * token_mask(lists, patches, lists.key_tokens)
        self.recall[self._site] = float(kept.sum(dtype=torch.float64) / on_patches.sum(dtype=torch.float64))
