"""Bytes of all tensors that are alive, counted operation by operation; on real tensors and on fake ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
# The attention kernels of a CPU, which torch's own registry of costs lacks: two and five products of N x N x d.
_CPU_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: 2,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: 5,
}


class LiveMemory(TorchDispatchMode):
    """Counts, while it is entered, the bytes of living tensors and the floating-point operations.

    A tensor counts from the operation that made its storage until the storage is freed, views once. What kernels
    use inside themselves and what an allocator adds is not seen. Backward passes are counted, also recomputed
    forwards in them.

    Attributes:
        live: bytes alive now, without those that existed before.
        peak: most bytes alive at once.
        flops: floating-point operations of matrix products, convolutions and attention.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        """Leave out the storages of some tensors: a view of one is not new memory."""
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._bytes = {tensor.untyped_storage()._cdata: 0 for tensor in existing}
        self._existing = list(existing)  # kept alive, so that no new storage takes an address noted above

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self.flops += _flops(func, args, kwargs or {}, output)
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                self._note(leaf.untyped_storage())
        return output

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._bytes:
            self._bytes[key] = storage.nbytes()
            self.live += self._bytes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._bytes.pop(key)


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    packet = getattr(func, "overloadpacket", None)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=output))
    if packet in _CPU_ATTENTION:
        query, key = (args[0], args[1]) if _CPU_ATTENTION[packet] == 2 else (args[1], args[2])
        return int(2 * _CPU_ATTENTION[packet] * query.numel() * key.shape[-2])
    return 0
