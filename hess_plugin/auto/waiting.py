"""Waiting for a model's weights: a profile's budgets belong to the weights that it was calibrated on."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from hess_plugin.adapting import Adapter
from hess_plugin.interception import LayoutHook
from hess_plugin.profiles import Profile, weights_fingerprint
from hess_plugin.sites import Site

_MARK = "_hess_plugin_waiting"


class Waiting:
    """The models whose weights are still to come."""

    def __init__(self) -> None:
        self._kept: weakref.WeakKeyDictionary[nn.Module, list[RemovableHandle]] = weakref.WeakKeyDictionary()

    def for_weights(
        self, model: nn.Module, profile: Profile, adapter: Adapter, then: Callable[[nn.Module, str], None]
    ) -> None:
        """Call ``then(model, adapter.name)`` when the profile's weights are loaded, else before the first forward.

        Raises:
            ProfileMismatch: the profile is of another architecture; waiting would be in vain.
        """
        sites = adapter.sites(model)
        profile.check(sites)
        _forget(model)  # hooks that a deepcopy brought along know the original model
        known = weakref.ref(model)  # the hooks are part of the model

        def go() -> None:
            found = known()
            if found is not None:
                self._stop(found)
                then(found, adapter.name)

        def loaded(*_: Any) -> None:
            found = known()
            if found is not None and _has_weights(adapter.sites(found), profile):
                go()

        def used(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            go()
            # The call under way has collected its hooks already and would not run those that `then` has added.
            for hook in tuple(module._forward_pre_hooks.values()):
                if isinstance(hook, LayoutHook):
                    hook(module, args, kwargs)

        setattr(loaded, _MARK, True)
        setattr(used, _MARK, True)
        handles = [model.register_load_state_dict_post_hook(loaded)]
        for name in dict.fromkeys(["", *(site.layout_module for site in sites)]):
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(used, with_kwargs=True, prepend=True))
        self._kept[model] = handles

    @property
    def models(self) -> list[str]:
        """Classes of the models that are waited for."""
        return [type(model).__name__ for model in self._kept]

    def end(self) -> None:
        """Wait no longer."""
        for model in list(self._kept):
            self._stop(model)

    def _stop(self, model: nn.Module) -> None:
        for handle in self._kept.pop(model, ()):
            handle.remove()
        _forget(model)


def _has_weights(sites: list[Site], profile: Profile) -> bool:
    weights = [site.weight(projection) for site in sites for projection in site.projections]
    return not any(weight.is_meta for weight in weights) and weights_fingerprint(sites) == profile.fingerprint


def _forget(model: nn.Module) -> None:
    """Take the hooks of a wait off a model and its modules."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._load_state_dict_post_hooks):
            for key, hook in list(hooks.items()):
                if hasattr(hook, _MARK):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
