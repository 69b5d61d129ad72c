"""Checks that a patch can be undone, whatever happened meanwhile."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack, _pop_mode

from hess_plugin.exceptions import PatchError
from hess_plugin.interception import SDPA
from hess_plugin.patching import unpatch
from hess_plugin.predictions import Prediction

from .case import Case, difference


class _Deliberate(Exception):
    """Raised on purpose by a check."""


def undo_is_complete(case: Case) -> str | None:
    """After two calls of remove() the model is as before."""
    before, plain = state_at_rest(case), case.predict()
    handle = case.patched()
    case.predict()
    handle.remove()
    handle.remove()
    changed = changes(before, state_of(case.model))
    return f"{changed[0]} changed; remove() has to put it back" if changed else difference(plain, case.predict())


def second_replacement_refused(case: Case) -> str | None:
    """Attention that is replaced already, by a patch or by another tool, is not replaced again.

    That a patched model is not patched again is seen to by `patch` itself, whatever an adapter does.
    """
    for owner in ("hess_plugin", "another tool"):
        twin = case.copy()
        site = case.adapter.sites(twin)[0]
        if owner == "hess_plugin":
            case.adapter.replace_attention(site, SDPA)
        else:
            own = type(site.module).forward
            site.module.forward = lambda *args, _run=own, _module=site.module, **kwargs: _run(_module, *args, **kwargs)
        try:
            case.adapter.replace_attention(site, SDPA)
        except PatchError:
            continue
        return (
            f"a forward that {owner} had replaced was replaced again; build hess_replace_attention on "
            "hess_plugin.intercept, or raise a PatchError"
        )
    return None


def exception_is_safe(case: Case) -> str | None:
    """An exception inside a patched forward gets out, and the model works as before."""
    plain, site = case.predict(), case.sites()[0]
    # In a layer that the replaced forward runs, so that it is not left by its end; then behind it.
    inside = site.module.get_submodule(site.projections["q"].parameter.rpartition(".")[0])
    for module in dict.fromkeys((inside, site.module)):
        problem = _after_exception(case, module, plain)
        if problem is not None:
            return problem
    return None


def _after_exception(case: Case, module: nn.Module, plain: Prediction) -> str | None:
    """What is wrong after an exception that a hook of this module raised."""
    raised: list[bool] = []

    def fail(*_: object) -> None:
        raised.append(True)
        raise _Deliberate

    modes = len(_get_current_function_mode_stack())
    try:
        with case.patched():
            hook = module.register_forward_hook(fail)
            try:
                case.predict()
            finally:
                hook.remove()
    except _Deliberate:
        left = len(_get_current_function_mode_stack()) - modes
        for _ in range(left):
            _pop_mode()  # or it would stay for everything else that this process computes
        if left:
            return "a function mode is still on; enter it by a with statement, or build on hess_plugin.intercept"
        return difference(plain, case.predict())
    if not raised:
        return None  # a layer whose weight is used without calling it
    return "the exception did not get out; do not catch errors of the model in hess_predict"


def deepcopy_runs(case: Case) -> str | None:
    """A deepcopy of a patched model computes the same, and can be unpatched without its handle."""
    with case.patched():
        patched = case.predict()
        twin = copy.deepcopy(case.model)
        problem = difference(patched, case.predict(twin))
    if problem is not None:
        return f"the copy differs from the patched model: {problem}; bind replacements to the module, not to a closure"
    if unpatch(twin) != len(case.sites()):
        return "unpatch(copy) did not restore every site; build hess_replace_attention on hess_plugin.intercept"
    return difference(case.predict(), case.predict(twin))


def state_at_rest(case: Case) -> dict[str, object]:
    """`state_of` the model, any value for what each of its own forwards changes."""
    case.predict()  # what is made once, in the first forward, is there
    before = state_of(case.model)
    case.predict()
    after = state_of(case.model)
    return {**after, **dict.fromkeys(changes(before, after), _Anything())}


def state_of(model: nn.Module) -> dict[str, object]:
    """Everything a patch could leave behind: classes, instance attributes, hooks, parameters and buffers."""
    state: dict[str, object] = {}
    for name, module in model.named_modules():
        state[f"{name}: class"] = type(module)
        state[f"{name}: attributes"] = tuple(module.__dict__)
        state |= {f"{name}: attribute {key}": _Same(value) for key, value in vars(module).items()}
        for kind, held in vars(module).items():
            if "hooks" in kind and isinstance(held, dict):
                state[f"{name}: {kind}"] = tuple(held)
            if kind in ("_modules", "_parameters", "_buffers"):
                state |= {f"{name}: {key}": _Same(value) for key, value in held.items()}
    for name, tensor in model.state_dict().items():
        state[f"{name}: value"] = (tensor.data_ptr(), tensor._version, tuple(tensor.shape), tensor.dtype)
    for name, parameter in model.named_parameters():
        state[f"{name}: requires_grad"] = parameter.requires_grad
    return state


def changes(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Name what is not as before, or new."""
    return [name for name in before if before[name] != after.get(name)] + [n for n in after if n not in before]


class _Same:
    """Equal to the very same object, or for plain values to an equal one."""

    def __init__(self, value: object) -> None:
        self.value = value  # kept, so that no other object gets its place in memory

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same):
            return NotImplemented
        return self.value is other.value or (_plain(self.value) and _plain(other.value) and self.value == other.value)

    __hash__ = None  # type: ignore[assignment]


def _plain(value: object) -> bool:
    """Whether a value is all that there is to it."""
    if isinstance(value, tuple):
        return all(_plain(item) for item in value)
    return isinstance(value, bool | int | float | str | bytes | torch.dtype | torch.device)


class _Anything:
    """Equal to whatever it is compared with."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]
