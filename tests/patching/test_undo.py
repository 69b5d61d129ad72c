"""Undoing a patch without a trace, whatever happened under it, and copies of patched models."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pluggy
import pytest
import torch
from torch import Tensor, nn

import hess_plugin
from hess_plugin import PatchError, Site, TokenLayout, hookimpl, patch, unpatch
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.plugins import get_plugin_manager, register, resolve_adapter

from .patching_problems import BLOCKS, images_of, outputs, trace_of


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
