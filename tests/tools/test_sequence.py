"""Many patches one after another, several models at once, and what is left of them: nothing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hess_plugin import PatchError, patch, unpatch
from hess_plugin.attention import SiteAttention
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.interception import is_patched

Run = Callable[[nn.Module, Tensor], Tensor]


def carried(model: nn.Module) -> list[tuple[int, ...]]:
    """How many things every module carries."""
    return [
        (len(vars(module)), len(module._forward_pre_hooks), len(module._forward_pre_hooks_with_kwargs))
        for module in model.modules()
    ]


def living() -> int:
    gc.collect()
    return sum(type(thing) is SiteAttention for thing in gc.get_objects())


def test_patches_with_changing_settings_leave_nothing_and_compute_what_a_first_one_does(
    make_model: Callable[..., TinyVGGT], outputs: Run, images: Callable[..., Tensor]
) -> None:
    model, x = make_model(), images()
    settings: list[dict[str, Any]] = [
        {"sparsity": 0.5},
        {"sparsity": 0.9, "backend": "reference"},
        {"sparse_ratio": 0.3, "cdf_threshold": 0.6},
        {"sparsity": 0.7, "allocation": "equal", "block_order": "tiles"},
        {"sparsity": 0.0},
    ]
    plain, before, alive = outputs(model, x), carried(model), living()
    first: list[Tensor] = []
    for turn in range(50):
        with patch(model, block_q=8, block_k=8, **settings[turn % 5]):
            if turn < 10:
                found = outputs(model, x)
                first.append(found)
                assert torch.equal(found, first[turn % 5])
        assert carried(model) == before
    assert torch.equal(outputs(model, x), plain) and torch.equal(first[4], plain)
    assert len({float(found.double().sum()) for found in first}) == 5 and living() == alive


def test_a_removed_patch_and_a_dropped_model_are_freed(
    make_model: Callable[..., TinyVGGT], outputs: Run, images: Callable[..., Tensor], small_blocks: dict[str, Any]
) -> None:
    alive, model = living(), make_model()
    handle = patch(model, **small_blocks)
    outputs(model, images())
    assert living() == alive + 2
    handle.remove()
    assert living() == alive  # the report needs its counts, not the attention
    assert handle.report().sites[0].calls == 1
    freed = weakref.ref(handle), weakref.ref(model)
    patch(model, **small_blocks)
    del handle, model
    assert living() == alive and [reference() for reference in freed] == [None, None]


def test_two_models_are_patched_at_once_and_undone_in_any_order(
    make_model: Callable[..., TinyVGGT], outputs: Run, images: Callable[..., Tensor]
) -> None:
    models, x = [make_model(), make_model(seed=1)], images()
    plain = [outputs(model, x) for model in models]
    options = [{"sparsity": 0.5, "block_q": 8, "block_k": 8}, {"sparsity": 0.8, "block_q": 16, "block_k": 8}]
    alone = []
    for model, chosen in zip(models, options, strict=True):
        with patch(model, **chosen):
            alone.append(outputs(model, x))
    with patch(models[0], **options[0]) as first:
        with patch(models[1], **options[1]) as second:
            for _ in range(3):
                for model, wanted in zip(models, alone, strict=True):
                    assert torch.equal(outputs(model, x), wanted)
            first.remove()  # out of order
            assert torch.equal(outputs(models[0], x), plain[0]) and torch.equal(outputs(models[1], x), alone[1])
        assert torch.equal(outputs(models[1], x), plain[1])
    assert first.report().sparsity == pytest.approx(0.5, abs=0.01)
    assert second.report().sparsity == pytest.approx(0.8, abs=0.02)
    assert [site.calls for report in (first, second) for site in report.report().sites] == [3, 3, 4, 4]


def test_a_model_that_shares_a_patched_module_is_refused_until_that_is_undone(
    make_model: Callable[..., TinyVGGT], outputs: Run, images: Callable[..., Tensor], small_blocks: dict[str, Any]
) -> None:
    model, other, x = make_model(), make_model(seed=1), images()
    other.aggregator.global_blocks[1] = model.aggregator.global_blocks[1]
    plain = outputs(other, x)
    handle = patch(model, **small_blocks)
    with pytest.raises(PatchError, match="a module that it shares with another, is patched already"):
        patch(other, **small_blocks)
    with pytest.raises(PatchError, match=r"global_blocks\.1\.attn got a sequence of 123 tokens.*announced none"):
        outputs(other, x)  # half of this model would be sparse
    handle.remove()
    assert torch.equal(outputs(other, x), plain)
    with patch(other, **small_blocks) as again:
        outputs(other, x)
    assert again.report().sparsity == pytest.approx(0.5, abs=0.01)


def test_unpatch_reaches_the_parts_and_the_handle_has_nothing_left_to_do(
    make_model: Callable[..., TinyVGGT], small_blocks: dict[str, Any]
) -> None:
    model = make_model()
    before = carried(model)
    handle = patch(model, **small_blocks)
    assert unpatch(model.aggregator.global_blocks[0]) == 1 and is_patched(model)
    assert unpatch(model) == 1 and not is_patched(model) and carried(model) == before
    handle.remove()
    assert carried(model) == before
