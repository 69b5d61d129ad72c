"""Checks that a patch can be undone, whatever happened meanwhile."""

from __future__ import annotations

import copy

from torch import nn

from hess_plugin.exceptions import PatchError
from hess_plugin.patching import unpatch

from .case import Case, difference


class _Deliberate(Exception):
    """Raised on purpose by a check."""


def undo_is_complete(case: Case) -> str | None:
    """After two calls of remove() the model is as before."""
    before, plain = state_of(case.model), case.predict()
    handle = case.patched()
    case.predict()
    handle.remove()
    handle.remove()
    changed = changes(before, state_of(case.model))
    return f"{changed[0]} changed; remove() has to put it back" if changed else difference(plain, case.predict())


def second_patch_refused(case: Case) -> str | None:
    """A patched model cannot be patched again."""
    with case.patched(0.0):
        try:
            case.patched(0.0)
        except PatchError:
            return None
    return "it was accepted; build hess_replace_attention on hess_plugin.intercept"


def exception_is_safe(case: Case) -> str | None:
    """An exception inside a patched forward gets out, and the model works as before."""
    plain = case.predict()
    try:
        with case.patched():
            hook = case.sites()[0].module.register_forward_hook(_fail)
            try:
                case.predict()
            finally:
                hook.remove()
    except _Deliberate:
        return difference(plain, case.predict())
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


def state_of(model: nn.Module) -> dict[str, object]:
    """Everything a patch could leave behind: classes, instance attributes, hooks, parameters and buffers."""
    state: dict[str, object] = {}
    for name, module in model.named_modules():
        state[f"{name}: class"] = type(module)
        state[f"{name}: attributes"] = tuple(module.__dict__)
        for kind, hooks in vars(module).items():
            if "hooks" in kind and isinstance(hooks, dict):
                state[f"{name}: {kind}"] = tuple(hooks)
    for name, tensor in model.state_dict().items():
        state[f"{name}: value"] = (tensor.data_ptr(), tensor._version, tuple(tensor.shape), tensor.dtype)
    for name, parameter in model.named_parameters():
        state[f"{name}: requires_grad"] = parameter.requires_grad
    return state


def changes(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Name what is not as before, or new."""
    return [name for name in before if before[name] != after.get(name)] + [n for n in after if n not in before]


def _fail(*_: object) -> None:
    raise _Deliberate
