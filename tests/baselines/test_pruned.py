"""A pruned model computes what the whole one would with those heads' columns of the output projection scaled."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hess_plugin import PatchError, patch, unpatch
from hess_plugin.baselines import prune_heads
from hess_plugin.baselines.pruned import PrunedAttention
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.interception import SDPA, is_patched
from hess_plugin.plugins import resolve_adapter
from hess_plugin.report import PatchReport

NAMES = ("pose_enc", "depth", "depth_conf", "world_points", "world_points_conf")


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        predicted = model(images)
    return torch.cat([predicted[name].flatten() for name in NAMES])


def images_of(views: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(batch, views, 3, 60, 60, generator=torch.Generator().manual_seed(seed))


def scaled(model: TinyVGGT, mask: Tensor) -> TinyVGGT:
    """A copy whose output projections have each head's columns multiplied by its mask."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for block, row in zip(twin.aggregator.global_blocks, mask, strict=True):
            width = block.attn.head_dim
            block.attn.proj.weight *= row.repeat_interleave(width).to(block.attn.proj.weight)
    return twin


def state_of(model: nn.Module) -> list[object]:
    return [(n, type(m), sorted(vars(m)), m.training, len(m._forward_hooks)) for n, m in model.named_modules()]


def ones(layers: int = 2, heads: int = 4) -> Tensor:
    return torch.ones(layers, heads, dtype=torch.float64)


masks = st.lists(st.sampled_from([0.0, 0.0, 1.0, -0.5, 2.25]), min_size=8, max_size=8)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=masks, views=st.integers(1, 3), batch=st.integers(1, 2))
def test_pruning_is_scaling_columns(tiny_model: TinyVGGT, values: list[float], views: int, batch: int) -> None:
    mask = torch.tensor(values, dtype=torch.float64).view(2, 4)
    images = images_of(views, batch)
    wanted = outputs(scaled(tiny_model, mask), images)
    with prune_heads(tiny_model, mask) as pruned:
        found = outputs(tiny_model, images)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    report = pruned.report()
    shares = [float((row == 0).double().mean()) for row in mask]
    assert report.sparsity == report.sparsity_all_keys == pytest.approx(sum(shares) / 2)
    assert [site.sparsity for site in report.sites] == pytest.approx(shares)
    assert [list(site.head_sparsity or ()) for site in report.sites] == (mask == 0).double().tolist()
    assert [site.calls for site in report.sites] == [1, 1]
    assert [site.dense_calls for site in report.sites] == [int(bool((row == 1).all())) for row in mask]


def test_masks_of_one_change_no_bit(tiny_model: TinyVGGT) -> None:
    wanted = outputs(tiny_model, images_of(3))
    with prune_heads(tiny_model, ones()) as pruned:
        assert torch.equal(outputs(tiny_model, images_of(3)), wanted)
    assert pruned.report().sparsity == 0.0


def test_pruned_heads_are_not_computed(tiny_model: TinyVGGT, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(tuple(query.shape))
        return SDPA(query, *args, **kwargs)

    monkeypatch.setattr("hess_plugin.baselines.pruned.SDPA", counted)
    mask = ones()
    mask[0, 1] = mask[1] = 0
    with prune_heads(tiny_model, mask):
        outputs(tiny_model, images_of(2))
    assert seen == [(1, 3, 2 * 41, 8)]  # the second site lost all its heads and does not call it


@pytest.mark.parametrize("inside", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kept", [0, 2, 4])
def test_types_are_those_of_the_call_it_answers(
    tiny_model: TinyVGGT, kept: int, dtype: torch.dtype, inside: torch.dtype | None
) -> None:
    mask = torch.ones(4, dtype=torch.float64)
    mask[kept:] = 0
    attention = PrunedAttention(resolve_adapter(tiny_model).sites(tiny_model)[0], mask)
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", inside, enabled=inside is not None):
        wanted, found = SDPA(q, k, v), attention(q, k, v)
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    tolerance = 1e-2 if wanted.dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(found[:, :kept], wanted[:, :kept], rtol=tolerance, atol=tolerance)
    assert not bool(found[:, kept:].any())


def test_autocast_changes_no_more_than_for_the_whole_model(tiny_model: TinyVGGT) -> None:
    mask = ones()
    mask[0, 0] = mask[1] = 0
    with torch.autocast("cpu", torch.bfloat16):
        wanted = outputs(scaled(tiny_model, mask), images_of(2))
        with prune_heads(tiny_model, mask):
            found = outputs(tiny_model, images_of(2))
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_layer_without_heads_gives_zeros_of_the_type(tiny_model: TinyVGGT, dtype: torch.dtype) -> None:
    model = tiny_model.to(dtype)
    tokens = torch.randn(2, 7, 32, dtype=dtype)
    attention = model.aggregator.global_blocks[0].attn
    with prune_heads(model, ones() * 0):
        output = attention(tokens)
    assert output.dtype == dtype and torch.equal(output, attention.proj.bias.expand(2, 7, 32))


def test_undo_leaves_no_trace(tiny_model: TinyVGGT) -> None:
    before, wanted = state_of(tiny_model), outputs(tiny_model, images_of(2))
    mask = ones()
    mask[:, 0] = 0
    pruned = prune_heads(tiny_model, mask)
    assert pruned.active and is_patched(tiny_model) and repr(pruned) == "<Pruned: 2 of 8 heads, active>"
    mask[:] = 1  # the caller's tensor is its own
    assert not torch.equal(outputs(tiny_model, images_of(2)), wanted)
    pruned.remove()
    pruned.remove()
    assert not pruned.active and state_of(tiny_model) == before
    assert torch.equal(outputs(tiny_model, images_of(2)), wanted)
    with pytest.raises(ZeroDivisionError), prune_heads(tiny_model, mask * 0):
        raise ZeroDivisionError
    assert state_of(tiny_model) == before


def test_a_copy_of_a_pruned_model_is_its_own(tiny_model: TinyVGGT) -> None:
    wanted, mask = outputs(tiny_model, images_of(2)), ones()
    mask[:, 1:] = 0
    with prune_heads(tiny_model, mask):
        pruned = outputs(tiny_model, images_of(2))
        twin = copy.deepcopy(tiny_model)
    assert torch.equal(outputs(twin, images_of(2)), pruned)
    assert unpatch(twin) == 2 and torch.equal(outputs(twin, images_of(2)), wanted)


def test_a_pruned_model_can_be_trained_also_after_inference_mode(tiny_model: TinyVGGT) -> None:
    mask = ones()
    mask[0, 0] = mask[1] = 0
    mask[0, 1] = 0.5
    with prune_heads(tiny_model, mask):
        with torch.inference_mode():
            tiny_model(images_of(2))
        tiny_model(images_of(2))["world_points"].sum().backward()
    gradient = tiny_model.aggregator.global_blocks[0].attn.proj.weight.grad
    assert gradient is not None
    assert bool((gradient[:, :8] == 0).all()) and bool((gradient[:, 8:] != 0).any(0).all())


def test_the_report_is_that_of_a_patch(tiny_model: TinyVGGT) -> None:
    mask = ones()
    mask[0, 0], mask[0, 1] = 0, 0.5
    with prune_heads(tiny_model, mask) as pruned:
        assert pruned.report().sparsity is None
        outputs(tiny_model, images_of(2))
        outputs(tiny_model, images_of(3))
    report = pruned.report()
    assert isinstance(report, PatchReport) and report.sparsity == 0.125 and report.seconds > 0
    assert report.settings == {"heads": 8, "pruned_heads": 1, "scaled_heads": 1}
    assert json.loads(json.dumps(report.to_dict()))["allocation"] == "pruned"
    assert "sparsity 0.1250" in str(report) and "aggregator.global_blocks.1.attn" in str(report)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 3), r"of shape \[2, 3\] was given, wanted a tensor \[2, 4\]"),
        (torch.ones(8), r"of shape \[8\] was given"),
        ([[1.0] * 4] * 2, "of type list was given"),
        (torch.full((2, 4), torch.nan), "not finite real numbers"),
        (torch.ones(2, 4, dtype=torch.complex64), "not finite real numbers"),
    ],
)
def test_masks_that_do_not_fit_are_told(tiny_model: TinyVGGT, mask: Any, message: str) -> None:
    before = state_of(tiny_model)
    with pytest.raises(PatchError, match=message):
        prune_heads(tiny_model, mask)
    assert state_of(tiny_model) == before


def test_whole_numbers_and_single_precision_are_masks(tiny_model: TinyVGGT) -> None:
    mask = ones()
    mask[:, 2] = 0
    found = []
    for dtype in (torch.float64, torch.float32, torch.int64, torch.bool):
        with prune_heads(tiny_model, mask.to(dtype)):
            found.append(outputs(tiny_model, images_of(2)))
    assert all(torch.equal(each, found[0]) for each in found)


def test_a_patched_model_is_refused(tiny_model: TinyVGGT) -> None:
    with patch(tiny_model), pytest.raises(PatchError, match="patched already"):
        prune_heads(tiny_model, ones())
    with prune_heads(tiny_model, ones()), pytest.raises(PatchError, match="patched already"):
        patch(tiny_model)


class Masked(nn.Module):
    """Attention that is called with a mask, inside of a site's module."""

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self.qkv, self.num_heads = site.qkv, site.num_heads

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        output = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        return output.transpose(1, 2).flatten(2)


def test_masked_attention_is_told_and_passes_where_all_heads_stay(tiny_model: TinyVGGT) -> None:
    block = tiny_model.aggregator.global_blocks[1]
    block.attn = Masked(block.attn)
    mask = ones()
    mask[0, 0] = 0
    with prune_heads(tiny_model, mask):
        outputs(tiny_model, images_of(2))
    mask[1, 0] = 0
    with prune_heads(tiny_model, mask), pytest.raises(PatchError, match=r"global_blocks\.1\.attn called .* attn_mask"):
        outputs(tiny_model, images_of(2))
    assert resolve_adapter(tiny_model).sites(tiny_model)[1].module is block.attn
