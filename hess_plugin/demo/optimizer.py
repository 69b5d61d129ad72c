"""Muon for the matrices of the transformer blocks, in plain PyTorch; AdamW takes the rest."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 4
_ADAM_SHARE = 0.6


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates (Jordan et al. 2024), all matrices of one shape in one batch.

    The update has the root mean square of an Adam update (0.2), so one learning rate serves both. It is computed in
    `dtype`.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.05,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[tuple(parameter.shape)].append((parameter, self._nesterov(parameter, group["momentum"])))
            for shape, pairs in by_shape.items():
                updates = orthogonalise(torch.stack([update for _, update in pairs]), self._dtype)
                scale = 0.2 * math.sqrt(max(shape))
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * scale)
        return loss

    def _nesterov(self, parameter: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient: Tensor = parameter.grad  # type: ignore[assignment]
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum)


def orthogonalise(matrices: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Nearest semi-orthogonal matrices `[K, m, n]`, roughly, by Newton-Schulz in `dtype`."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(dtype)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


def make_optimizers(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> list[torch.optim.Optimizer]:
    """Muon (computing in `dtype`) for the 2-D weights inside blocks and the camera trunk, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = "_blocks." in name or ".trunk." in name or ".readers." in name
        (matrices if inside and parameter.ndim == 2 else others).append(parameter)
    return [
        Muon(matrices, lr=1e-3, dtype=dtype),
        torch.optim.AdamW(others, lr=1e-3, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def fast_type(device: torch.device) -> torch.dtype:
    """bfloat16 where it is the faster one; a CPU without instructions for it takes ten times as long as in float32."""
    native = device.type != "cpu" or bool(torch.backends.mkldnn.is_available() and _multiplies_bfloat16())
    return torch.bfloat16 if native else torch.float32


def _multiplies_bfloat16() -> bool:
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # torch has no public way to ask
    return bool(asked is not None and asked())


def set_learning_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Set Muon's rate, and AdamW's in proportion."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate if isinstance(optimizer, Muon) else _ADAM_SHARE * rate
