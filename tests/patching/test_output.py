"""What a patched model computes: bit for bit where nothing is dropped, special tokens, types."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hess_plugin import TokenLayout, patch
from hess_plugin.attention import SiteAttention
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.interception import SDPA
from hess_plugin.plans import Layouts
from hess_plugin.plugins import resolve_adapter
from hess_plugin.settings import Settings

from .patching_problems import BLOCKS, SPECIALS, images_of, outputs


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.0},
        {"sparse_ratio": 0.0},
        {"cdf_threshold": 1.0},
        {"sparse_ratio": 0.9, "cdf_threshold": 1.0},
        {"sparsity": 0.9, "block_q": 128, "block_k": 10_000},  # one key block
        {"sparsity": 0.9, "minimum": 1000},
    ],
)
def test_where_nothing_is_dropped_the_output_is_bit_exact(tiny_model: TinyVGGT, options: dict[str, Any]) -> None:
    images = images_of(3)
    plain = outputs(tiny_model, images)
    with patch(tiny_model, **{**BLOCKS, **options}) as handle:
        assert torch.equal(outputs(tiny_model, images), plain)
    report = handle.report()
    assert report.sparsity == 0.0 and all(site.calls == site.dense_calls == 1 for site in report.sites)


@pytest.mark.parametrize("views", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("batch", [None, 1, 3])
def test_any_number_of_views_and_items_on_images_that_are_not_square(
    tiny_model: TinyVGGT, views: int, batch: int | None
) -> None:
    images = images_of(views, 40, 70, batch)
    plain = outputs(tiny_model, images)
    results = []
    for backend in ("gather", "reference"):
        with patch(tiny_model, sparsity=0.5, backend=backend, **BLOCKS) as handle:
            results.append(outputs(tiny_model, images))
        assert handle.report().sparsity == pytest.approx(0.5, abs=0.02 if views > 1 else 0.13)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert not torch.equal(results[0], plain)
    assert torch.equal(outputs(tiny_model, images), plain)


def test_items_of_a_batch_do_not_see_each_other(tiny_model: TinyVGGT) -> None:
    images = images_of(3, batch=3)
    with patch(tiny_model, sparsity=0.6, **BLOCKS), torch.no_grad():
        together = tiny_model(images)["world_points"]
        alone = torch.cat([tiny_model(item[None])["world_points"] for item in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_a_special_key_of_one_frame_reaches_every_patch_output(tiny_model: TinyVGGT, backend: str) -> None:
    patches = 36
    layout = TokenLayout(3, patches, leading=SPECIALS)
    site = resolve_adapter(tiny_model).sites(tiny_model)[0]
    layouts = Layouts("raster", 64)
    layouts.see(layout)
    attention = SiteAttention(site, Settings(0.9, None, None, "uniform", backend=backend, **BLOCKS), None, layouts, 0)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, layout.tokens, 8, generator=generator) for _ in range(3))
    before = attention(q, k, v)
    special = layout.tokens_per_frame + 2  # a register of the second frame
    k[:, :, special] += 2.0
    v[:, :, special] += 2.0
    after = attention(q, k, v)
    assert bool((before != after).flatten(0, 2).any(-1).all())
    # A dropped patch key must not: most patch outputs ignore one patch key at sparsity 0.9.
    v[:, :, SPECIALS] += 100.0
    changed = (attention(q, k, v) - after).abs().amax((1, 3)) > 1e-3
    assert 0 < int(changed.sum()) < layout.tokens


def test_special_queries_attend_to_everything(tiny_model: TinyVGGT) -> None:
    layout = TokenLayout(2, 32, leading=SPECIALS)
    layouts = Layouts("raster", 64)
    layouts.see(layout)
    site = resolve_adapter(tiny_model).sites(tiny_model)[0]
    attention = SiteAttention(site, Settings(0.75, None, None, "uniform", **BLOCKS), None, layouts, 0)
    q, k, v = torch.randn(3, 2, 4, layout.tokens, 8, generator=torch.Generator().manual_seed(1))
    dense = SDPA(q, k, v)
    special = [i for i in range(layout.tokens) if i % layout.tokens_per_frame < SPECIALS]
    torch.testing.assert_close(attention(q, k, v)[:, :, special], dense[:, :, special], rtol=1e-5, atol=1e-5)


def test_autocast_casts_as_plain_attention_does(tiny_model: TinyVGGT) -> None:
    layout = TokenLayout(2, 36, leading=SPECIALS)
    layouts = Layouts("raster", 64)
    layouts.see(layout)
    site = resolve_adapter(tiny_model).sites(tiny_model)[0]
    q, k, v = torch.randn(3, 1, 4, layout.tokens, 8, generator=torch.Generator().manual_seed(1))
    v = v.bfloat16()  # VGGT under autocast: q and k leave their norms in float32 beside a bfloat16 v
    for sparsity in (0.0, 0.5):
        attention = SiteAttention(site, Settings(sparsity, None, None, "uniform", **BLOCKS), None, layouts, 0)
        with torch.autocast("cpu", torch.bfloat16):
            found, wanted = attention(q, k, v), SDPA(q, k, v)
        assert found.dtype == wanted.dtype == torch.bfloat16
    exact = SiteAttention(site, Settings(0.5, None, None, "uniform", **BLOCKS), None, layouts, 0)(
        *(t.bfloat16().float() for t in (q, k, v))
    )
    torch.testing.assert_close(found.float(), exact, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_types(tiny_model: TinyVGGT, dtype: torch.dtype) -> None:
    images = images_of(2)
    with torch.autocast("cpu", torch.bfloat16), patch(tiny_model, sparsity=0.5, **BLOCKS):
        assert bool(torch.isfinite(outputs(tiny_model, images)).all())
    site = resolve_adapter(tiny_model).sites(tiny_model)[0]
    layout = TokenLayout(2, 36, leading=SPECIALS)
    layouts = Layouts("raster", 64)
    layouts.see(layout)
    attention = SiteAttention(site, Settings(0.5, None, None, "uniform", **BLOCKS), None, layouts, 0)
    q, k, v = torch.randn(3, 1, 4, layout.tokens, 8, dtype=dtype)
    output = attention(q, k, v)
    assert output.dtype == dtype and output.shape == q.shape
