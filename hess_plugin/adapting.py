"""The answers adapters give, and `Adapter`: one resolved plugin whose answers the core checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from .answers import checked, checked_list, wrong_answer
from .exceptions import AdapterError, HessError
from .framing import Framing
from .registration.registry import called, cause_of

if TYPE_CHECKING:
    import pluggy
    import torch
    from torch import Tensor, nn

    from .calibration.errors import Errors
    from .predictions import Prediction
    from .scenes.scene import Scene
    from .sites import Site, TokenLayout

_RUN_THE_MODEL = ("hess_predict", "hess_compute_errors")


@dataclass(frozen=True)
class JoinedLayers:
    """A module that joins what two blocks return into one tensor a layer and gives back those of all layers.

    Attributes:
        module: its name; its forward calls ``torch.cat`` along the last axis on what the blocks of a layer returned,
            and returns a list of the results, alone or in a tuple.
        blocks: names of the two lists of blocks, as they are joined.
        read: indices of the layers that the rest of the model reads; every other becomes None.
    """

    module: str
    blocks: tuple[str, str]
    read: tuple[int, ...]


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
        separable: names of modules that treat the entries along one axis of their tensors alone, each with that axis:
            0 for what is called with frames ``[B * S, ...]``, 1 for frames ``[B, S, ...]`` or for a network on tokens
            ``[B, N, C]``. All tensors they are given that are as long along it as the first one are cut, and all they
            return are joined. They run in chunks with ``patch(..., memory="lean")``, and so do `frame_heads`.
        joined_layers: the module that gives back joined outputs of all layers, where some are never read; those are
            not made with ``patch(..., memory="lean")``.
    """

    camera_weight: float = 0.5
    framing: Framing = field(default_factory=Framing)
    source: str = ""
    blocks: tuple[str, ...] = ()
    frame_heads: tuple[str, ...] = ()
    unused_heads: tuple[str, ...] = ()
    separable: tuple[tuple[str, int], ...] = ()
    joined_layers: JoinedLayers | None = None


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

    @property
    def called(self) -> str:
        """What messages call it: its name, and its package or file where it has one."""
        return called(self.manager, self.name)

    def file_of(self, hook: str) -> str | None:
        """The file that one of its hooks is written in, or None."""
        code = getattr(getattr(self.manager.get_plugin(self.name), hook, None), "__code__", None)
        return None if code is None else code.co_filename

    def ask(self, hook: str, **arguments: Any) -> Any:
        """Call one hook on this adapter alone, so that no second adapter answers for the same model."""
        others = [
            plugin for name, plugin in self.manager.list_name_plugin() if plugin is not None and name != self.name
        ]
        return self.manager.subset_hook_caller(hook, others)(**arguments)

    def call(self, hook: str, **arguments: Any) -> Any:
        """Call one hook on this adapter alone and tell whose hook it was that failed.

        What comes out of the model itself (`hess_predict` and `hess_compute_errors` run it) is left as it is.

        Raises:
            AdapterError: naming adapter, hook and cause.
        """
        try:
            return self.ask(hook, **arguments)
        except HessError:
            raise
        except Exception as error:
            if hook in _RUN_THE_MODEL and (isinstance(error, RuntimeError) or not self._raised(hook, error)):
                raise
            raise AdapterError(f"{self.called} failed in {hook}: {cause_of(error, self.file_of(hook))}.") from error

    def _raised(self, hook: str, error: BaseException) -> bool:
        """Whether an error came from a line of the adapter's own file, and not from what that line called."""
        file, trace = self.file_of(hook), error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        return trace is not None and trace.tb_frame.f_code.co_filename == file

    def load(self, name: str, weights: str, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
        """Build a model by name; None where the name is another adapter's.

        Raises:
            AdapterError: the answer is no module, or a module in training mode.
        """
        from torch import nn

        model = self.call("hess_load_model", name=name, weights=weights, device=device, dtype=dtype)
        if model is None:
            return None
        model = checked(self.called, "hess_load_model", model, nn.Module, "a torch.nn.Module")
        if model.training:
            raise AdapterError(f"{self.called} loads {name!r} in training mode; return model.eval().")
        return model

    def family(self, model: nn.Module) -> Family:
        """Describe the model's family, with defaults where the adapter says nothing."""
        answer = self.call("hess_describe_family", model=model)
        return Family() if answer is None else checked(self.called, "hess_describe_family", answer, Family)

    def sites(self, model: nn.Module) -> list[Site]:
        """List the sites of the model.

        Raises:
            AdapterError: the list is missing, empty, names no module of the model, or repeats one.
        """
        from .sites import Site

        hook = "hess_find_global_attention"
        answer = self.call(hook, model=model)
        if answer is None or (isinstance(answer, list | tuple) and not answer):
            raise AdapterError(
                f"{self.called} found no global attention in {type(model).__name__}; "
                "hess_find_global_attention must list at least one site."
            )
        sites = checked_list(self.called, hook, answer, Site)
        modules = dict(model.named_modules())
        for site in sites:
            if modules.get(site.name) is not site.module:
                raise AdapterError(f"{self.called} names a site {site.name!r} that is not in the model.")
            if site.layout_module and site.layout_module not in modules:
                raise AdapterError(f"site {site.name!r} names a layout module {site.layout_module!r} not in the model.")
        if len({id(site.module) for site in sites}) != len(sites):
            raise AdapterError(f"{self.called} lists a site twice: {[site.name for site in sites]}.")
        return sites

    def token_layout(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenLayout:
        """Tell the token layout of a forward from its arguments."""
        from .sites import TokenLayout

        hook = "hess_token_layout"
        return checked(self.called, hook, self._required(hook, model=model, args=args, kwargs=kwargs), TokenLayout)

    def predict(self, model: nn.Module, images: Tensor) -> Prediction:
        """Run the model on images ``[S, 3, H, W]`` in [0, 1]."""
        multiple = self.family(model).framing.multiple
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % multiple or images.shape[3] % multiple:
            raise AdapterError(
                f"images of shape {list(images.shape)} given to {self.called}, which wants [views, 3, H, W] with H and "
                f"W multiples of {multiple}; bring the scene there with Scene.framed(Framing({multiple}))."
            )
        from .predictions import Prediction

        hook = "hess_predict"
        return checked(self.called, hook, self._required(hook, model=model, images=images), Prediction)

    def compute_errors(self, model: nn.Module, scene: Scene, eps: float) -> Errors:
        """Return the differentiable errors of one scene: the adapter's own, else those of its prediction."""
        errors = self.call("hess_compute_errors", model=model, scene=scene, eps=eps)
        if errors is None:
            from .calibration.errors import scene_errors

            return scene_errors(self.predict(model, scene.images), scene, eps=eps)
        from .calibration.errors import Errors

        return checked(self.called, "hess_compute_errors", errors, Errors)

    def replace_attention(self, site: Site, attend: Callable[..., Tensor]) -> Replacement:
        """Make a site call `attend`: the adapter's own way, else by intercepting its one attention call."""
        replacement = self.call("hess_replace_attention", site=site, attend=attend)
        if replacement is None:
            from .interception import intercept

            return intercept(site, attend)
        if not callable(getattr(replacement, "remove", None)):
            raise wrong_answer(self.called, "hess_replace_attention", replacement, "an object with remove()")
        return replacement

    def _required(self, hook: str, **arguments: Any) -> Any:
        answer = self.call(hook, **arguments)
        if answer is None:
            raise AdapterError(f"{self.called} gave no answer to {hook}, which this step needs.")
        return answer
