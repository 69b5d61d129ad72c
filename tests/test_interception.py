"""Answering exactly one attention call of a module, however the module makes it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as imported_sdpa
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from hess_plugin import PatchError, Site
from hess_plugin.interception import SDPA, intercept, is_intercepted, is_patched, restore


class Attending(nn.Module):
    """Calls attention `times` times, through the module attribute or an imported name."""

    def __init__(self, times: int = 1, imported: bool = False) -> None:
        super().__init__()
        self.times, self.imported = times, imported
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, pos: Tensor | None = None, **options: Any) -> Tensor:
        attention = imported_sdpa if self.imported else F.scaled_dot_product_attention
        for _ in range(self.times):
            x = attention(x, x, x, **options)
        return self.gain * x + (0 if pos is None else pos)


def site_of(module: nn.Module) -> Site:
    return Site("block.attn", module, 2, 4, "", {})


def count_calls(answers: list[tuple[Any, ...]]) -> Any:
    def attend(*args: Any, **kwargs: Any) -> Tensor:
        answers.append((len(args), kwargs))
        return SDPA(*args, **kwargs)

    return attend


@pytest.fixture
def x() -> Tensor:
    return torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("imported", [False, True])
def test_the_call_is_answered_bit_for_bit_whatever_name_it_goes_by(x: Tensor, imported: bool) -> None:
    module, seen = Attending(imported=imported), []
    plain = module(x, pos=x, scale=0.3)
    handle = intercept(site_of(module), count_calls(seen))
    assert torch.equal(module(x, pos=x, scale=0.3), plain)
    assert torch.equal(module(x, x, scale=0.3), plain)
    assert seen == [(3, {"scale": 0.3})] * 2
    handle.remove()
    handle.remove()
    assert torch.equal(module(x, pos=x, scale=0.3), plain) and len(seen) == 2
    assert "forward" not in module.__dict__


def test_only_the_answered_call_changes(x: Tensor) -> None:
    module = Attending()
    intercept(site_of(module), lambda q, k, v, **options: torch.ones_like(q))
    assert torch.equal(module(x), torch.full_like(x, 2.0))
    assert not torch.equal(Attending()(x), module(x))  # instances, never the class


@pytest.mark.parametrize("times", [0, 2, 3])
def test_another_number_of_calls_than_one_is_an_error(x: Tensor, times: int) -> None:
    module = Attending(times)
    intercept(site_of(module), SDPA)
    wanted = rf"block\.attn \(Attending\) called .* {times} times in one forward, wanted exactly one.*hess_replace"
    with pytest.raises(PatchError, match=wanted):
        module(x)
    assert not _get_current_function_mode_stack()


def test_attention_spelt_out_is_refused_at_once(x: Tensor) -> None:
    module = Attending()
    module.fused_attn = False
    with pytest.raises(PatchError, match=r"block\.attn has fused_attn=False.*set block\.attn\.fused_attn = True"):
        intercept(site_of(module), SDPA)
    assert not is_intercepted(module)
    module.fused_attn = True
    intercept(site_of(module), SDPA).remove()


def test_a_forward_that_somebody_replaced_already_is_refused(x: Tensor) -> None:
    module = Attending()
    module.forward = lambda x: x
    with pytest.raises(PatchError, match="already replaced by another tool"):
        intercept(site_of(module), SDPA)
    assert module(x) is x and not restore(module)
    del module.forward
    intercept(site_of(module), SDPA)
    with pytest.raises(PatchError, match="already replaced by hess_plugin"):
        intercept(site_of(module), SDPA)


def test_an_attend_that_attends_is_not_answered_by_itself(x: Tensor) -> None:
    module, depth = Attending(), []

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        depth.append(len(_get_current_function_mode_stack()))
        return F.scaled_dot_product_attention(q, k, v) + imported_sdpa(q, k, v)

    intercept(site_of(module), attend)
    assert torch.equal(module(x), 2 * (2 * SDPA(x, x, x)))
    assert depth == [0]


def test_a_module_inside_another_keeps_its_own_answer(x: Tensor) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attending()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(imported_sdpa(x, x, x))

    outer, seen = Outer(), []
    intercept(site_of(outer), lambda q, k, v: seen.append("outer") or torch.zeros_like(q))
    intercept(site_of(outer.inner), lambda q, k, v: seen.append("inner") or torch.ones_like(q))
    assert torch.equal(outer(x), torch.full_like(x, 2.0)) and seen == ["outer", "inner"]
    restore(outer.inner)
    # The inner module's call is now one call too many of the outer one.
    with pytest.raises(PatchError, match="2 times"):
        outer(x)


def test_other_function_modes_still_see_their_calls(x: Tensor) -> None:
    class Spy(TorchFunctionMode):
        names: list[str]

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    module, spy = Attending(), Spy()
    spy.names = []
    intercept(site_of(module), SDPA)
    with spy:
        module(x)
    assert "scaled_dot_product_attention" in spy.names


def test_an_exception_of_attend_or_of_the_module_leaves_no_mode(x: Tensor) -> None:
    module = Attending()
    intercept(site_of(module), lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module(x)
    with pytest.raises(TypeError):
        module(x, nonsense=1)
    assert not _get_current_function_mode_stack()


def test_hooks_of_the_module_run_once_and_stay(x: Tensor) -> None:
    module, seen = Attending(), []
    module.register_forward_hook(lambda *_: seen.append("after"))
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    handle = intercept(site_of(module), SDPA)
    module(x)
    handle.remove()
    module(x)
    assert seen == ["before", "after"] * 2


def test_a_copy_runs_itself_and_an_old_handle_leaves_a_newer_one_alone(x: Tensor) -> None:
    module = Attending()
    handle = intercept(site_of(module), SDPA)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.gain.fill_(3.0)
    assert is_intercepted(twin) and torch.equal(twin(x), 3 * SDPA(x, x, x))
    handle.remove()
    assert is_intercepted(twin) and restore(twin) and not restore(twin)
    newer = intercept(site_of(module), SDPA)
    handle.remove()
    assert is_intercepted(module) and is_patched(nn.Sequential(module))
    newer.remove()
    assert not is_patched(nn.Sequential(module))


def test_gradients_flow_through_the_answer(x: Tensor) -> None:
    module = Attending()
    q = x.clone().requires_grad_()
    module(q).sum().backward()
    plain = q.grad
    intercept(site_of(module), SDPA)
    q.grad = None
    module(q).sum().backward()
    assert torch.equal(q.grad, plain)
