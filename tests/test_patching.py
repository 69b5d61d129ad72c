"""Patching a model, what a patched model computes, and undoing it without a trace."""

from __future__ import annotations

import copy
import functools
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pluggy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hess_plugin
from hess_plugin import PatchError, Profile, ProfileError, ProfileMismatch, Site, TokenLayout, hookimpl, patch, unpatch
from hess_plugin.attention import SiteAttention
from hess_plugin.calibration.calibrator import calibrate
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.interception import SDPA, intercept
from hess_plugin.plans import Layouts
from hess_plugin.plugins import get_plugin_manager, register, resolve_adapter
from hess_plugin.profiles import ERROR_NAMES, weights_fingerprint
from hess_plugin.scenes.scene import Scene
from hess_plugin.settings import ALLOCATIONS, Settings
from hess_plugin.sites import PROJECTIONS
from hess_plugin.sparsity import allocate, block_map, target_total, uniform_counts

BLOCKS: dict[str, Any] = {"block_q": 8, "block_k": 8}
SPECIALS = 5


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Everything a model predicts, as one vector."""
    with torch.no_grad():
        predicted = model(images)
    names = ("pose_enc", "depth", "depth_conf", "world_points", "world_points_conf")
    return torch.cat([predicted[name].flatten() for name in names])


def images_of(views: int, height: int = 60, width: int = 60, batch: int | None = None, seed: int = 0) -> Tensor:
    shape = (views, 3, height, width) if batch is None else (batch, views, 3, height, width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def profile_of(model: nn.Module, traces: Tensor | None = None, **changes: Any) -> Profile:
    """A profile made by hand: `traces` `[L, H]` for both errors and all projections."""
    sites = resolve_adapter(model).sites(model)
    heads = sites[0].num_heads
    if traces is None:
        traces = torch.arange(1.0, heads + 1).repeat(len(sites), 1)
    fields: dict[str, Any] = {
        "adapter": "vggt",
        "sites": tuple(site.name for site in sites),
        "num_heads": heads,
        "scenes": ("one",),
        "traces": {f"{e}.{p}": traces.double()[None] for e in ERROR_NAMES for p in PROJECTIONS},
        "camera_weight": 0.5,
        "fingerprint": weights_fingerprint(sites),
    }
    return Profile(**{**fields, **changes})


def trace_of(model: nn.Module) -> dict[str, object]:
    """All that a patch could leave behind in a model."""
    state: dict[str, object] = {"state_dict": list(model.state_dict())}
    for name, module in model.named_modules():
        state[name] = (
            type(module),
            {key: id(value) for key, value in vars(module).items()},
            {key: list(value.items()) for key, value in vars(module).items() if "hooks" in key and value is not None},
            module.training,
        )
    for name, parameter in model.named_parameters():
        state[f"{name}="] = (id(parameter), parameter._version, parameter.requires_grad, parameter.grad)
    return state


@pytest.fixture
def captured(tiny_model: TinyVGGT) -> Callable[[Tensor], list[tuple[Tensor, Tensor]]]:
    """Reads q and k of every site of the unpatched model."""

    def capture(images: Tensor) -> list[tuple[Tensor, Tensor]]:
        seen: list[tuple[Tensor, Tensor]] = []

        def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            seen.append((query.detach().clone(), key.detach().clone()))
            return SDPA(query, key, value, **options)

        replaced = [intercept(site, attend) for site in resolve_adapter(tiny_model).sites(tiny_model)]
        outputs(tiny_model, images)
        for one in replaced:
            one.remove()
        return seen

    return capture


# ---------------------------------------------------------------- exactness


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


# ---------------------------------------------------------------- undo


@pytest.mark.parametrize("how", ["remove", "with", "unpatch", "exception"])
def test_undo_leaves_no_trace(tiny_model: TinyVGGT, how: str) -> None:
    images = images_of(2)
    next(tiny_model.parameters()).requires_grad_(False)
    tiny_model.aggregator.train()
    plain, before = outputs(tiny_model, images), trace_of(tiny_model)
    handle = patch(tiny_model, sparsity=0.5, **BLOCKS)
    assert handle.active and "active" in repr(handle)
    assert list(tiny_model.state_dict()) == before["state_dict"]
    outputs(tiny_model, images)
    if how == "unpatch":
        assert unpatch(tiny_model) == 2
    elif how == "exception":
        with pytest.raises(ZeroDivisionError), handle:
            _ = 1 / 0
    elif how == "with":
        with handle as same:
            assert same is handle
    handle.remove()
    handle.remove()
    assert not handle.active and "removed" in repr(handle)
    assert trace_of(tiny_model) == before
    assert torch.equal(outputs(tiny_model, images), plain)
    assert unpatch(tiny_model) == 0


def test_a_second_patch_is_refused_and_the_first_stays(tiny_model: TinyVGGT) -> None:
    images = images_of(2)
    with patch(tiny_model, sparsity=0.5, **BLOCKS) as handle:
        patched = outputs(tiny_model, images)
        for _ in range(2):
            with pytest.raises(PatchError, match=r"patched already; call remove\(\)"):
                patch(tiny_model, sparsity=0.3)
        assert torch.equal(outputs(tiny_model, images), patched)
        assert handle.report().sites[0].calls == 2
    patch(tiny_model).remove()


def test_an_old_handle_does_not_undo_a_newer_patch(tiny_model: TinyVGGT) -> None:
    old = patch(tiny_model, sparsity=0.5, **BLOCKS)
    unpatch(tiny_model)
    with patch(tiny_model, sparsity=0.5, **BLOCKS) as new:
        old.remove()
        outputs(tiny_model, images_of(2))
        assert new.report().sites[0].calls == 1
    assert unpatch(tiny_model) == 0


def test_an_exception_inside_a_forward_leaves_the_patch_working_and_no_mode_behind(tiny_model: TinyVGGT) -> None:
    images = images_of(2)
    plain = outputs(tiny_model, images)
    attention = tiny_model.aggregator.global_blocks[1].attn

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with patch(tiny_model, sparsity=0.5, **BLOCKS) as handle:
        patched = outputs(tiny_model, images)
        for place in (attention, attention.qkv, attention.proj):  # before, inside and after the attention call
            hook = place.register_forward_pre_hook(fail)
            with pytest.raises(ZeroDivisionError):
                outputs(tiny_model, images)
            hook.remove()
            assert len(torch.overrides._get_current_function_mode_stack()) == 0
        assert torch.equal(outputs(tiny_model, images), patched)
        assert handle.report().sites[1].sparsity == pytest.approx(0.5, abs=0.02)
    assert torch.equal(outputs(tiny_model, images), plain)


class _Stranger:
    """An adapter that does what VGGT's does; subclasses change one hook."""

    def __init__(self) -> None:
        self.vggt = resolve_adapter(TinyVGGT(), "vggt")

    @hookimpl
    def hess_find_global_attention(self, model: nn.Module) -> list[Site]:
        return self.vggt.sites(model)

    @hookimpl
    def hess_token_layout(self, model: nn.Module, args: Any, kwargs: Any) -> TokenLayout:
        return self.vggt.token_layout(model, args, kwargs)


class _OwnReplacement(_Stranger):
    """Spells the module's forward out around `attend`; replacing the site number `broken` fails."""

    def __init__(self, broken: int | None = None) -> None:
        super().__init__()
        self.broken, self.made, self.live = broken, 0, set()  # type: ignore[var-annotated]

    @hookimpl
    def hess_replace_attention(self, site: Site, attend: Callable[..., Tensor]) -> Any:
        if self.made == self.broken:
            raise ZeroDivisionError("this site cannot be replaced")
        module: Any = site.module
        live = self.live

        def forward(x: Tensor, pos: Tensor) -> Tensor:
            parts = module.qkv(x).unflatten(-1, (3, site.num_heads, site.head_dim))
            q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
            q, k = module.rope(module.q_norm(q), pos), module.rope(module.k_norm(k), pos)
            return module.proj(attend(q, k, v).transpose(1, 2).flatten(2))

        class Undo:
            def remove(self) -> None:
                module.__dict__.pop("forward", None)
                live.discard(site.name)

        module.forward = forward
        live.add(site.name)
        self.made += 1
        return Undo()


def _manager(plugin: object) -> pluggy.PluginManager:
    manager = get_plugin_manager(entry_points=False)
    register(manager, plugin, "stranger")
    return manager


def test_a_replacement_that_fails_half_way_is_undone(tiny_model: TinyVGGT) -> None:
    before, stranger = trace_of(tiny_model), _OwnReplacement(broken=1)
    with pytest.raises(hess_plugin.AdapterError, match=r"stranger.*ZeroDivisionError: this site"):
        patch(tiny_model, adapter="stranger", manager=_manager(stranger))
    assert (stranger.made, stranger.live) == (1, set())
    assert trace_of(tiny_model) == before


def test_a_site_that_another_tool_holds_undoes_the_sites_before_it(tiny_model: TinyVGGT) -> None:
    last = tiny_model.aggregator.global_blocks[1].attn
    last.forward = functools.partial(last.forward)  # what other tools do
    before = trace_of(tiny_model)
    with pytest.raises(PatchError, match=r"global_blocks\.1\.attn\.forward is already replaced by another tool"):
        patch(tiny_model, sparsity=0.5)
    assert trace_of(tiny_model) == before


def test_an_adapter_with_its_own_replacement_is_used_refused_twice_and_undone(tiny_model: TinyVGGT) -> None:
    images, stranger = images_of(2), _OwnReplacement()
    manager, before = _manager(stranger), trace_of(tiny_model)
    with patch(tiny_model, sparsity=0.5, **BLOCKS):
        wanted = outputs(tiny_model, images)
    with patch(tiny_model, sparsity=0.5, adapter="stranger", manager=manager, **BLOCKS):
        torch.testing.assert_close(outputs(tiny_model, images), wanted)
        with pytest.raises(PatchError, match="patched already"):
            patch(tiny_model, adapter="stranger", manager=manager)
    assert not stranger.live and trace_of(tiny_model) == before


# ---------------------------------------------------------------- gradients


def checkpoint_globals(model: TinyVGGT) -> None:
    """What upstream's training mode does, on the global blocks."""
    for block in model.aggregator.global_blocks:
        forward = type(block).forward
        block.forward = lambda x, pos=None, f=forward, b=block: checkpoint(f, b, x, pos, use_reentrant=False)


def gradients(model: TinyVGGT, *inputs: Tensor) -> list[Tensor]:
    """Gradients of all inputs' losses together, every forward before the one backward."""
    model.zero_grad()
    loss = torch.stack([model(images)["world_points"].square().mean() for images in inputs]).sum()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(
    "options", [{"sparsity": 0.5}, {"cdf_threshold": 0.5}, {"cdf_threshold": 0.5, "allocation": "equal"}]
)
def test_gradient_checkpointing_gives_the_same_gradients_and_sparsity(
    tiny_model: TinyVGGT, options: dict[str, Any]
) -> None:
    inputs = (images_of(2), images_of(3, 40, 70, seed=1))  # two shapes, recomputed after both forwards
    with patch(tiny_model, **options, **BLOCKS) as handle:
        plain = gradients(tiny_model, *inputs)
    first = handle.report()
    checkpoint_globals(tiny_model)
    with patch(tiny_model, **options, **BLOCKS) as handle:
        again = gradients(tiny_model, *inputs)
    second = handle.report()
    assert len(plain) == len(again) > 20
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert [site.calls for site in first.sites] == [2, 2] and [site.calls for site in second.sites] == [4, 4]
    for one, two in zip(first.sites, second.sites, strict=True):
        assert one.head_sparsity == pytest.approx(two.head_sparsity)
        assert one.sparsity_all_keys == pytest.approx(two.sparsity_all_keys)


def test_gradients_agree_with_the_reference_backend(tiny_model: TinyVGGT) -> None:
    found = []
    for backend in ("gather", "reference"):
        with patch(tiny_model, sparsity=0.5, backend=backend, **BLOCKS):
            found.append(gradients(tiny_model, images_of(2)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"cdf_threshold": 0.5, "allocation": "equal"}])
def test_training_works_after_inference_mode_with_the_same_patch(tiny_model: TinyVGGT, options: dict[str, Any]) -> None:
    images = images_of(2)
    with torch.inference_mode():
        handle = patch(tiny_model, **options, **BLOCKS)
        tiny_model(images)
    with handle:
        found = gradients(tiny_model, images)
        with torch.inference_mode():
            tiny_model(images)
        assert handle.report().sites[0].calls == 3
    with patch(tiny_model, **options, **BLOCKS):
        wanted = gradients(tiny_model, images)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- copies and types


def test_a_deepcopy_is_independent_and_can_be_unpatched(tiny_model: TinyVGGT) -> None:
    images = images_of(2)
    plain = outputs(tiny_model, images)
    with patch(tiny_model, sparsity=0.6, **BLOCKS):
        patched = outputs(tiny_model, images)
        twin = copy.deepcopy(tiny_model)
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in tiny_model.parameters()}
    assert torch.equal(outputs(twin, images), patched)  # also after the original was restored
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.zero_()
    assert torch.equal(outputs(twin, images), patched)  # the copy runs its own weights
    with pytest.raises(PatchError, match="unpatch"):
        patch(twin)
    assert unpatch(twin) == 2
    assert torch.equal(outputs(twin, images), plain)
    with patch(twin, sparsity=0.6, **BLOCKS) as handle:
        assert torch.equal(outputs(twin, images), patched)
    assert handle.report().sites[0].calls == 1


def test_state_dict_of_a_patched_model_saves_and_loads(tiny_model: TinyVGGT) -> None:
    buffer = io.BytesIO()
    with patch(tiny_model, sparsity=0.5, **BLOCKS):
        torch.save(tiny_model.state_dict(), buffer)
        buffer.seek(0)
        tiny_model.load_state_dict(torch.load(buffer, weights_only=True))
    fresh = TinyVGGT(tiny_model.config)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))


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


# ---------------------------------------------------------------- how much is kept


@pytest.mark.parametrize("ratio", [None, 0.3, 0.75, 0.999])
@pytest.mark.parametrize("mass", [None, 0.0, 0.4, 0.9])
@pytest.mark.parametrize("minimum", [1, 3])
def test_the_uniform_rule_keeps_what_it_says_on_the_captured_block_map(
    tiny_model: TinyVGGT,
    captured: Callable[[Tensor], list[tuple[Tensor, Tensor]]],
    ratio: float | None,
    mass: float | None,
    minimum: int,
) -> None:
    if ratio is None and mass is None:
        return
    images = images_of(3, 40, 70)
    with patch(tiny_model, sparse_ratio=ratio, cdf_threshold=mass, minimum=minimum, **BLOCKS) as handle:
        outputs(tiny_model, images)
    # Only the first site's input is the unpatched one.
    q, k = captured(images)[0]
    order = TokenLayout(3, 28, leading=SPECIALS).patches_first()[: 3 * 28]
    pooled = block_map(q[:, :, order], k[:, :, order], 8, 8)
    counts = uniform_counts(pooled, ratio, mass, minimum)
    wanted = 1 - counts.double().sum(-1)[0] / (pooled.shape[-1] * pooled.shape[-2])
    site = handle.report().sites[0]
    assert site.head_sparsity == pytest.approx(wanted.tolist())
    assert site.sparsity == pytest.approx(wanted.mean().item())
    special = -(-3 * SPECIALS // 8)
    columns = pooled.shape[-1]
    assert site.sparsity_all_keys == pytest.approx(wanted.mean().item() * columns / (columns + special))


@pytest.mark.parametrize("target", [0.1, 0.5, 0.73, 0.95, 0.9999])
def test_a_sparsity_target_is_met_to_one_block_pair(tiny_model: TinyVGGT, target: float) -> None:
    images = images_of(4)
    rows = columns = 4 * 36 // 8
    with patch(tiny_model, sparsity=target, **BLOCKS) as handle:
        outputs(tiny_model, images)
    pairs = 4 * rows * columns
    wanted = 1 - target_total(target, 4, rows, columns, 2) / pairs
    for site in handle.report().sites:
        assert site.sparsity == pytest.approx(wanted, abs=1e-12)
        # The floor of two key blocks a row limits what can be dropped.
        assert abs(site.sparsity - min(target, 1 - 2 / columns)) <= 1 / pairs


@pytest.mark.parametrize("rule", [{"sparsity": 0.5}, {"cdf_threshold": 0.6}])
@pytest.mark.parametrize("allocation", [name for name in ALLOCATIONS if name != "harm"])  # over all layers at once
def test_every_allocation_divides_one_total_by_the_scores(
    tiny_model: TinyVGGT, allocation: str, rule: dict[str, float]
) -> None:
    images = images_of(4, batch=2)
    traces = torch.tensor([[1.0, 2.0, 3.0, 30.0], [4.0, 3.0, 2.0, 1.0]])
    profile = profile_of(tiny_model, traces)
    with patch(tiny_model, **rule, **BLOCKS) as handle:
        outputs(tiny_model, images)
    uniform = handle.report().sites[0]
    with patch(tiny_model, profile=profile, allocation=allocation, seed=3, **rule, **BLOCKS) as handle:
        outputs(tiny_model, images)
    first, second = handle.report().sites
    assert first.head_sparsity is not None and second.head_sparsity is not None
    if allocation == "uniform":
        assert first == uniform.__class__(**{**vars(uniform), "seconds": first.seconds})
        return
    if allocation == "uncapped":
        assert first.sparsity >= uniform.sparsity
    else:
        assert first.sparsity == pytest.approx(uniform.sparsity, abs=1e-12)
    kept = [[1 - s for s in site.head_sparsity] for site in (first, second)]
    ranks = [sorted(range(4), key=lambda h, k=k: k[h]) for k in kept]
    if allocation == "equal":
        assert max(kept[0]) - min(kept[0]) <= 1 / (18 * 18) + 1e-9
    elif allocation in ("hess", "uncapped"):
        assert ranks[0] == [0, 1, 2, 3] and kept[0][3] == 1.0  # more than a head can use: capped
        if "sparsity" in rule:
            assert ranks[1] == [3, 2, 1, 0]
    elif allocation == "reverse":
        assert kept[0][0] == 1.0 and kept[0][0] > kept[0][1] >= kept[0][2] >= kept[0][3]
    else:
        assert sorted(kept[0])[-1] == 1.0
    if "sparsity" in rule and allocation == "hess":
        total = target_total(0.5, 4, 18, 18)
        budgets = allocate(total, traces.double(), rows=18, columns=18)
        wanted = (budgets.double() / 18**2).tolist()
        assert kept[0] == pytest.approx(wanted[0]) and kept[1] == pytest.approx(wanted[1])


def test_random_allocation_is_repeatable_and_depends_on_the_seed(tiny_model: TinyVGGT) -> None:
    found = []
    profile = profile_of(tiny_model)
    for seed in (0, 0, 1, 2, 3):
        with patch(tiny_model, profile=profile, allocation="random", sparsity=0.6, seed=seed, **BLOCKS) as handle:
            outputs(tiny_model, images_of(4))
        found.append(tuple(site.head_sparsity for site in handle.report().sites))
    assert found[0] == found[1] and len(set(found)) > 1


def test_a_profile_file_and_its_object_give_the_same_patch(tiny_model: TinyVGGT, tmp_path: Any) -> None:
    profile = profile_of(tiny_model)
    profile.save(tmp_path / "a.hess")
    results = []
    for given in (profile, tmp_path / "a.hess", str(tmp_path / "a.hess")):
        with patch(tiny_model, profile=given, **BLOCKS) as handle:
            results.append(outputs(tiny_model, images_of(3)))
        assert handle.report().allocation == "hess" and handle.report().settings["sparsity"] == 0.73
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_calibrated_demo_model_runs_patched(room: Scene) -> None:
    from hess_plugin.demo.model import load_demo_model

    model = load_demo_model()
    profile = calibrate(model, [room])
    with patch(model, profile=profile, sparsity=0.5, **BLOCKS) as handle:
        outputs(model, room.images)
    budgets = torch.tensor([site.head_sparsity for site in handle.report().sites])
    scores = profile.scores()
    # More sensitive heads never keep less.
    for row, score in zip(1 - budgets, scores, strict=True):
        assert bool((row[score.argsort()].diff() >= -1 / 18**2).all())


# ---------------------------------------------------------------- reports


def test_the_report_before_and_after_forwards(tiny_model: TinyVGGT) -> None:
    with patch(tiny_model, sparsity=0.5, **BLOCKS) as handle:
        empty = handle.report()
        assert empty.sparsity is None and empty.sparsity_all_keys is None and empty.seconds == 0
        assert "sparsity - (- of all key blocks)" in str(empty)
        json.dumps(empty.to_dict(), allow_nan=False)
        outputs(tiny_model, images_of(3))
        outputs(tiny_model, images_of(1, 30, 30))  # so short that it stays dense
    report = handle.report()
    assert [site.calls for site in report.sites] == [2, 2] and [site.dense_calls for site in report.sites] == [1, 1]
    assert report.backend == "gather" and report.seconds > 0
    assert 0.4 < report.sparsity < 0.5  # the dense call counts as dropping nothing
    text = str(report)
    assert "aggregator.global_blocks.1.attn" in text and "backend gather" in text and "allocation uniform" in text
    loaded = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert loaded["sparsity"] == report.sparsity and len(loaded["sites"][0]["head_sparsity"]) == 4
    assert loaded["settings"]["block_q"] == 8


def test_a_report_is_a_snapshot(tiny_model: TinyVGGT) -> None:
    with patch(tiny_model, sparsity=0.5, **BLOCKS) as handle:
        outputs(tiny_model, images_of(2))
        first = handle.report()
        outputs(tiny_model, images_of(2))
        assert first.sites[0].calls == 1 and handle.report().sites[0].calls == 2
        assert handle.report().sparsity == pytest.approx(first.sparsity)


# ---------------------------------------------------------------- calls that do not fit


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


# ---------------------------------------------------------------- settings and profiles that do not fit


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


@pytest.fixture(autouse=True)
def _no_mode_left() -> Iterator[None]:
    yield
    assert len(torch.overrides._get_current_function_mode_stack()) == 0
