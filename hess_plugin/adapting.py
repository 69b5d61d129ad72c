"""The answers adapters give, and `Adapter`: one resolved plugin whose answers the core checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from .exceptions import AdapterError
from .framing import Framing

if TYPE_CHECKING:
    import pluggy
    from torch import Tensor, nn

    from .calibration.errors import Errors
    from .predictions import Prediction
    from .scenes.scene import Scene
    from .sites import Site, TokenLayout


@dataclass(frozen=True)
class Family:
    """What is common to all models of one adapter.

    Attributes:
        camera_weight: default share of the camera trace in the score (lambda of HeSS, eq. 9), 0 to 1.
        framing: size the family's own preprocessing brings images to, and how.
        source: where the camera weight comes from.
        blocks: names of the module lists whose modules are recomputed while calibrating, to save memory; the
            parents of the sites by default.
        frame_heads: names of heads that treat frames alone and are called with tensors ``[B, S, ...]``; they run
            frame by frame while calibrating.
        unused_heads: names of heads that the prediction does not need and whose place may be None; left out
            while calibrating.
    """

    camera_weight: float = 0.5
    framing: Framing = field(default_factory=Framing)
    source: str = ""
    blocks: tuple[str, ...] = ()
    frame_heads: tuple[str, ...] = ()
    unused_heads: tuple[str, ...] = ()


class Replacement(Protocol):
    """The undo of one replaced attention call."""

    def remove(self) -> None:
        """Restore the module; a second call does nothing."""


@dataclass(frozen=True)
class Adapter:
    """One plugin, its hooks called alone and their answers checked.

    Attributes:
        name: the plugin's registered name.
        manager: the plugin manager it is registered with.
    """

    name: str
    manager: pluggy.PluginManager

    def call(self, hook: str, **arguments: Any) -> Any:
        """Call one hook on this adapter alone, so that no second adapter answers for the same model."""
        others = [
            plugin for name, plugin in self.manager.list_name_plugin() if plugin is not None and name != self.name
        ]
        return self.manager.subset_hook_caller(hook, others)(**arguments)

    def family(self, model: nn.Module) -> Family:
        """Describe the model's family, with defaults where the adapter says nothing."""
        return self.call("hess_describe_family", model=model) or Family()

    def sites(self, model: nn.Module) -> list[Site]:
        """List the sites of the model.

        Raises:
            AdapterError: the list is missing, empty, names no module of the model, or repeats one.
        """
        sites: list[Site] | None = self.call("hess_find_global_attention", model=model)
        if not sites:
            raise AdapterError(
                f"adapter {self.name!r} found no global attention in {type(model).__name__}; "
                "hess_find_global_attention must list at least one site."
            )
        modules = dict(model.named_modules())
        for site in sites:
            if modules.get(site.name) is not site.module:
                raise AdapterError(f"adapter {self.name!r} names a site {site.name!r} that is not in the model.")
            if site.layout_module and site.layout_module not in modules:
                raise AdapterError(f"site {site.name!r} names a layout module {site.layout_module!r} not in the model.")
        if len({id(site.module) for site in sites}) != len(sites):
            raise AdapterError(f"adapter {self.name!r} lists a site twice: {[site.name for site in sites]}.")
        return sites

    def token_layout(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenLayout:
        """Tell the token layout of a forward from its arguments."""
        return self._required("hess_token_layout", model=model, args=args, kwargs=kwargs)

    def predict(self, model: nn.Module, images: Tensor) -> Prediction:
        """Run the model on images ``[S, 3, H, W]`` in [0, 1]."""
        multiple = self.family(model).framing.multiple
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % multiple or images.shape[3] % multiple:
            raise AdapterError(
                f"images of shape {list(images.shape)} given to {self.name!r}, which wants [views, 3, H, W] with H and "
                f"W multiples of {multiple}; bring the scene there with Scene.framed(Framing({multiple}))."
            )
        return self._required("hess_predict", model=model, images=images)

    def compute_errors(self, model: nn.Module, scene: Scene, eps: float) -> Errors:
        """Return the differentiable errors of one scene: the adapter's own, else those of its prediction."""
        errors = self.call("hess_compute_errors", model=model, scene=scene, eps=eps)
        if errors is None:
            from .calibration.errors import scene_errors

            errors = scene_errors(self.predict(model, scene.images), scene, eps=eps)
        return errors

    def replace_attention(self, site: Site, attend: Callable[..., Tensor]) -> Replacement:
        """Make a site call `attend`: the adapter's own way, else by intercepting its one attention call."""
        replacement = self.call("hess_replace_attention", site=site, attend=attend)
        if replacement is None:
            from .interception import intercept

            replacement = intercept(site, attend)
        return replacement

    def _required(self, hook: str, **arguments: Any) -> Any:
        answer = self.call(hook, **arguments)
        if answer is None:
            raise AdapterError(f"adapter {self.name!r} gave no answer to {hook}, which this step needs.")
        return answer
