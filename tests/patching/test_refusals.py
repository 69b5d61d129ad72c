"""Calls, settings and profiles that do not fit: one sentence, and nothing is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import hess_plugin
from hess_plugin import PatchError, ProfileError, ProfileMismatch, TokenLayout, patch
from hess_plugin.attention import SiteAttention
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.plans import Layouts
from hess_plugin.plugins import resolve_adapter
from hess_plugin.settings import Settings

from .patching_problems import BLOCKS, SPECIALS, images_of, outputs, profile_of, trace_of


def test_a_submodule_called_on_an_unannounced_length_says_so(tiny_model: TinyVGGT) -> None:
    attention = tiny_model.aggregator.global_blocks[0].attn
    tokens = torch.zeros(1, 123, 32)
    with patch(tiny_model, sparsity=0.5, **BLOCKS):
        with pytest.raises(PatchError, match=r"global_blocks\.0\.attn got a sequence of 123 tokens.*announced none"):
            attention(tokens)
        outputs(tiny_model, images_of(2))
        with pytest.raises(PatchError, match="announced 82"):
            attention(tokens)
    assert attention(tokens).shape == tokens.shape


def test_the_aggregator_alone_announces_its_layout(tiny_model: TinyVGGT) -> None:
    images = images_of(2, batch=1)
    with patch(tiny_model, sparsity=0.5, **BLOCKS) as handle, torch.no_grad():
        tiny_model.aggregator(images)
        tiny_model.aggregator(images=images)
    assert handle.report().sites[0].calls == 2


@pytest.mark.parametrize(
    "options, named",
    [
        ({"attn_mask": torch.ones(82, 82, dtype=torch.bool)}, "attn_mask"),
        ({"is_causal": True}, "is_causal"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"enable_gqa": True}, "unusual shapes"),
    ],
)
def test_attention_calls_that_are_not_plain_are_refused_when_sparse_and_passed_on_when_dense(
    tiny_model: TinyVGGT, options: dict[str, Any], named: str
) -> None:
    layouts = Layouts("raster", 64)
    layouts.see(TokenLayout(2, 36, leading=SPECIALS))
    site = resolve_adapter(tiny_model).sites(tiny_model)[0]
    q, k, v = torch.randn(3, 1, 4, 82, 8)
    sparse = SiteAttention(site, Settings(0.5, None, None, "uniform", **BLOCKS), None, layouts, 0)
    with pytest.raises(PatchError, match=named):
        sparse(q, k, v, **options)
    dense = SiteAttention(site, Settings(0.0, None, None, "uniform", **BLOCKS), None, layouts, 0)
    torch.manual_seed(5)
    found = dense(q, k, v, **options)
    torch.manual_seed(5)
    assert torch.equal(found, F.scaled_dot_product_attention(q, k, v, **options))


def test_heads_and_keys_that_do_not_fit_are_refused(tiny_model: TinyVGGT) -> None:
    layouts = Layouts("raster", 64)
    layouts.see(TokenLayout(2, 36, leading=SPECIALS))
    site = resolve_adapter(tiny_model).sites(tiny_model)[0]
    attention = SiteAttention(site, Settings(0.5, None, None, "uniform", **BLOCKS), None, layouts, 0)
    q = torch.randn(1, 4, 82, 8)
    for key in (torch.randn(1, 4, 90, 8), torch.randn(1, 1, 82, 8)):
        with pytest.raises(PatchError, match="unusual shapes"):
            attention(q, key, key)
    with pytest.raises(PatchError, match="self-attention of 4 heads"):
        attention(*torch.randn(3, 1, 5, 82, 8))


def test_an_explicit_scale_is_honoured(tiny_model: TinyVGGT) -> None:
    layouts = Layouts("raster", 64)
    layouts.see(TokenLayout(2, 36, leading=SPECIALS))
    site = resolve_adapter(tiny_model).sites(tiny_model)[0]
    q, k, v = torch.randn(3, 1, 4, 82, 8)
    for backend in ("gather", "reference"):
        attention = SiteAttention(
            site, Settings(0.5, None, None, "uniform", backend=backend, **BLOCKS), None, layouts, 0
        )
        torch.testing.assert_close(
            attention(q, k, v, scale=0.1), attention(q * 0.1 * 8**0.5, k, v), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"sparsity": 1.0}, r"sparsity is 1\.0, wanted a number from 0 \(dense\) to below 1\."),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"sparsity": float("nan")}, "sparsity is nan"),
        ({"sparse_ratio": 1.0}, "sparse_ratio is 1.0"),
        ({"sparse_ratio": float("nan")}, "sparse_ratio is nan"),
        ({"cdf_threshold": 1.1}, "cdf_threshold is 1.1, wanted a number from 0 to 1"),
        ({"cdf_threshold": float("nan")}, "cdf_threshold is nan"),
        ({"sparsity": 0.5, "sparse_ratio": 0.5}, "give either a sparsity, or sparse_ratio and/or cdf_threshold"),
        ({"sparsity": 0.5, "cdf_threshold": 0.5}, "give either a sparsity"),
        ({"sparsity": 0.0, "sparse_ratio": 0.0}, "give either a sparsity"),
        ({"allocation": "best"}, "allocation is 'best', wanted one of uniform, equal, hess"),
        ({"allocation": "hess"}, "'hess' divides budgets by a profile and none was given; pass profile=FILE"),
        ({"allocation": "reverse"}, "none was given"),
        ({"allocation": "random"}, "none was given"),
        ({"allocation": "uncapped"}, "none was given"),
        ({"camera_weight": 0.5}, "none was given"),
        ({"selector": "best"}, "selector is 'best', wanted one of mass"),
        ({"backend": "magic"}, "no attention backend 'magic'; choose one of auto, .*gather, reference"),
        ({"block_q": 0}, "block_q is 0, wanted a whole number of at least 1"),
        ({"block_k": -1}, "block_k is -1"),
        ({"block_k": 8.0}, "block_k is 8.0"),
        ({"minimum": 0}, "minimum is 0"),
    ],
)
def test_wrong_settings_are_told_in_a_sentence_and_nothing_is_changed(
    tiny_model: TinyVGGT, options: dict[str, Any], sentence: str
) -> None:
    before = trace_of(tiny_model)
    with pytest.raises(PatchError, match=sentence) as caught:
        patch(tiny_model, **options)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert trace_of(tiny_model) == before


def test_profiles_that_do_not_fit_are_refused_and_nothing_is_changed(tiny_model: TinyVGGT, tmp_path: Any) -> None:
    good = profile_of(tiny_model)
    good.save(tmp_path / "good.hess")
    data = (tmp_path / "good.hess").read_bytes()
    (tmp_path / "short.hess").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.hess").write_text("not a profile")
    other = TinyVGGT(hess_plugin.demo.model.TinyVGGTConfig(dim=32, num_heads=4, depth=3, stem=16, camera_depth=1))
    narrow = TinyVGGT(hess_plugin.demo.model.TinyVGGTConfig(dim=32, num_heads=2, depth=2, stem=16, camera_depth=1))
    before = trace_of(tiny_model)
    cases: list[tuple[Any, type[Exception], str]] = [
        (tmp_path / "none.hess", ProfileError, "is not a file"),
        (tmp_path, ProfileError, "is not a file"),
        (tmp_path / "short.hess", ProfileError, "truncated or not a profile"),
        (tmp_path / "text.hess", ProfileError, "truncated or not a profile"),
        (profile_of(other), ProfileMismatch, "the profile has 3 sites, the model 2"),
        (profile_of(narrow), ProfileMismatch, "the profile has 2 heads"),
        (profile_of(tiny_model, fingerprint="0" * 16), ProfileMismatch, "other weights.*strict=False"),
    ]
    for profile, kind, sentence in cases:
        with pytest.raises(kind, match=sentence):
            patch(tiny_model, profile=profile)
    with pytest.raises(ProfileError, match="camera_weight 2"):
        patch(tiny_model, profile=good, camera_weight=2.0)
    assert trace_of(tiny_model) == before


def test_a_profile_of_other_weights_works_when_asked_for(tiny_model: TinyVGGT) -> None:
    profile = profile_of(tiny_model)
    with torch.no_grad():
        tiny_model.aggregator.global_blocks[0].attn.qkv.weight[0, 0] += 0.5
    with pytest.raises(ProfileMismatch, match="other weights"):
        patch(tiny_model, profile=profile)
    with patch(tiny_model, profile=profile, strict=False, sparsity=0.5, **BLOCKS) as handle:
        outputs(tiny_model, images_of(3))
    assert handle.report().sparsity == pytest.approx(0.5, abs=0.01)
