"""Waiting for a model's weights: a profile's budgets belong to the weights that it was calibrated on."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from hess_plugin.adapting import Adapter
from hess_plugin.interception import LayoutHook
from hess_plugin.pickling import Unpicklable, no_hook
from hess_plugin.profiles import Profile, weights_fingerprint
from hess_plugin.sites import Site
from hess_plugin.uncompiled import Uncompiled

Then = Callable[[nn.Module, str], None]


class Waiting:
    """The models whose weights are still to come.

    Args:
        then: called as ``then(model, adapter name)`` when they are there; must not raise.
        refuse: called as ``refuse(model, why)`` where finding out fails.
    """

    def __init__(self, then: Then, refuse: Then) -> None:
        self._then, self._refuse = then, refuse
        self._kept: weakref.WeakKeyDictionary[nn.Module, list[RemovableHandle]] = weakref.WeakKeyDictionary()

    def for_weights(self, model: nn.Module, profile: Profile, adapter: Adapter) -> None:
        """Wait until the profile's weights are loaded, else until just before the first forward.

        A model around one that is waited for is not waited for itself.

        Raises:
            ProfileMismatch: the profile is of another architecture; waiting would be in vain.
        """
        _forget(model, self)  # hooks that a deepcopy brought along know the original model
        if any(module in self._kept for module in model.modules()):
            return
        sites = adapter.sites(model)
        profile.check(sites)
        handles = [model.register_load_state_dict_post_hook(_Loaded(self, model, profile, adapter))]
        for name in dict.fromkeys(["", *(site.layout_module for site in sites)]):
            used = _Used(self, model, adapter)
            handles.append(model.get_submodule(name).register_forward_pre_hook(used, with_kwargs=True, prepend=True))
        self._kept[model] = handles

    @property
    def models(self) -> list[str]:
        """Classes of the models that are waited for."""
        return [type(model).__name__ for model in self._kept]

    def end(self) -> None:
        """Wait no longer."""
        for model in list(self._kept):
            self._stop(model)

    def arrived(self, model: nn.Module, adapter: Adapter) -> None:
        """Wait for this model no longer and go on."""
        self._stop(model)
        self._then(model, adapter.name)

    def failed(self, model: nn.Module, error: Exception) -> None:
        """Something went wrong between the program and its weights, which must not stop it."""
        self._refuse(model, " ".join(str(error).split()) or type(error).__name__)

    def _stop(self, model: nn.Module) -> None:
        for handle in self._kept.pop(model, ()):
            handle.remove()


class _Hook(Unpicklable):
    """What waits in a model; left out where the model is pickled."""

    __slots__ = ("adapter", "model", "waiting")

    def __init__(self, waiting: Waiting, model: nn.Module, adapter: Adapter) -> None:
        self.waiting, self.adapter, self.left_out = waiting, adapter, True
        self.model = weakref.ref(model)  # this is a part of the model

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return self  # the copy is noticed when it is complete, and gets hooks of its own then

    def without(self) -> tuple[Any, ...]:
        """A hook that does nothing."""
        return no_hook()


class _Loaded(_Hook):
    """After ``load_state_dict``: are these the profile's weights?"""

    __slots__ = ("profile",)

    def __init__(self, waiting: Waiting, model: nn.Module, profile: Profile, adapter: Adapter) -> None:
        super().__init__(waiting, model, adapter)
        self.profile = profile

    def __call__(self, *_: Any) -> None:
        model = self.model()
        if model is None:
            return
        try:
            if _has_weights(self.adapter.sites(model), self.profile):
                self.waiting.arrived(model, self.adapter)
        except Exception as error:
            self.waiting.failed(model, error)


class _Used(_Hook, Uncompiled):
    """Before the first forward: whatever the weights are now is what they are."""

    __slots__ = ()
    reason = "hess_plugin patches a model that is called for the first time"

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Patch, or say why not."""
        model = self.model()
        if model is None:
            return
        self.waiting.arrived(model, self.adapter)
        # The call under way has collected its hooks already and would not run those that were added.
        for hook in tuple(module._forward_pre_hooks.values()):
            if isinstance(hook, LayoutHook):
                hook(module, args, kwargs)


def _has_weights(sites: list[Site], profile: Profile) -> bool:
    weights = [site.tensor(projection) for site in sites for projection in site.projections]
    return not any(weight.is_meta for weight in weights) and weights_fingerprint(sites) == profile.fingerprint


def _forget(model: nn.Module, waiting: Waiting) -> None:
    """Take hooks off a model and its modules that wait for another model, of which this is a copy."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._load_state_dict_post_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _Hook) and not _is_inside(hook.model(), module, waiting):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)


def _is_inside(waited: nn.Module | None, module: nn.Module, waiting: Waiting) -> bool:
    return waited is not None and waited in waiting._kept and any(part is module for part in waited.modules())
