"""Upstream code: W_O is what its site names, fed with the heads side by side, and restoration runs by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hess_plugin import patch
from hess_plugin.attention import SiteAttention
from hess_plugin.plugins import resolve_adapter

CHOICE: dict[str, Any] = {"block_q": 8, "block_k": 8, "selector": "restore", "pool_q": 4, "pool_k": 4}


def run(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(0)  # Pi3X draws which conditions it uses
    with torch.no_grad():
        predicted = model(torch.rand(1, 4, 3, 56, 70, generator=torch.Generator().manual_seed(0)))
    return {name: value.clone() for name, value in predicted.items() if isinstance(value, Tensor)}


def test_the_projection_gets_the_heads_side_by_side(upstream_model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[Tensor] = []
    inputs: list[Tensor] = []
    attend = SiteAttention.__call__

    def noted(self: SiteAttention, *args: Any, **kwargs: Any) -> Tensor:
        outputs.append(attend(self, *args, **kwargs))
        return outputs[-1]

    monkeypatch.setattr(SiteAttention, "__call__", noted)
    sites = resolve_adapter(upstream_model).sites(upstream_model)
    for site in sites:
        assert site.output is not None and site.output_weight() is not None
        joined = site.module.get_submodule(site.output.rpartition(".")[0])
        joined.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with patch(upstream_model, sparsity=0.5, **CHOICE) as handle:
        run(upstream_model)
    assert handle.report().sparsity == pytest.approx(0.5, abs=0.02)
    assert len(outputs) == len(inputs) == len(sites)
    for output, given in zip(outputs, inputs, strict=True):
        torch.testing.assert_close(given, output.transpose(1, 2).flatten(2).to(given.dtype))


def test_restored_blocks_leave_no_trace(upstream_model: nn.Module) -> None:
    before = run(upstream_model)
    with patch(upstream_model, sparsity=0.0, **CHOICE):
        dense = run(upstream_model)
    with patch(upstream_model, sparsity=0.6, **CHOICE):
        sparse = run(upstream_model)
    after = run(upstream_model)
    assert all(torch.equal(dense[name], value) and torch.equal(after[name], value) for name, value in before.items())
    assert any(not torch.equal(sparse[name], value) for name, value in before.items())
    assert all(bool(value.isfinite().all()) for value in sparse.values() if value.is_floating_point())
