"""The contract between the core and an adapter: eight hooks, nothing else.

An adapter is a module (or object) with functions of these names marked with `hookimpl`; it is found through
the entry-point group ``hess_plugin``. Hooks are called with keyword arguments; an implementation may take
fewer of them than the specification lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .adapting import Family, Replacement
    from .calibration.errors import Errors
    from .predictions import Prediction
    from .scenes.scene import Scene
    from .sites import Site, TokenLayout

PROJECT = "hess_plugin"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def hess_claim_model(model: nn.Module) -> bool | None:
    """Say whether this adapter knows the model. Required.

    Called once for each `patch` or `calibrate`, on every adapter; exactly one has to answer True. Look at
    attributes, not at the class: forks carry the same class names, and different names for the same class.
    An adapter that fails here, or answers something else, is warned of and does not claim the model.

    Returns:
        True if the model is this adapter's, else None or False.
    """


@hookspec(firstresult=True)
def hess_describe_family(model: nn.Module) -> Family | None:
    """Describe the model family: camera weight, framing of images, blocks and heads. Optional.

    Called whenever a default is needed, and before each scene is measured in little memory. None means
    `hess_plugin.Family()`.
    """


@hookspec(firstresult=True)
def hess_find_global_attention(model: nn.Module) -> list[Site] | None:
    """List the global-attention modules of the model in execution order. Required.

    Called once for each `patch` or `calibrate`. The core checks that the list is not empty, that every
    ``site.name`` is a module of the model and that no module appears twice.
    """


@hookspec(firstresult=True)
def hess_token_layout(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenLayout | None:
    """Tell the token layout of the forward that is about to run. Required.

    Called before every forward of the module named by ``site.layout_module``, with that call's arguments.
    Use shapes only: reading tensor values would make every forward wait for the device.
    """


@hookspec(firstresult=True)
def hess_predict(model: nn.Module, images: Tensor) -> Prediction | None:
    """Run the model on images ``[S, 3, H, W]`` in [0, 1] and return cameras and points.

    Needed to calibrate and to evaluate. Called with and without gradient; with gradient, the result must
    be differentiable with respect to the projections of every site.

    Returns:
        A `Prediction`: camera-to-world poses ``[S, 4, 4]`` with OpenCV axes, world points
        ``[S, h, w, 3]``, their confidence ``[S, h, w]`` and the least confidence worth using.
    """


@hookspec(firstresult=True)
def hess_compute_errors(model: nn.Module, scene: Scene, eps: float) -> Errors | None:
    """Return the differentiable camera and point error of one scene. Optional.

    Called once a scene while calibrating; the scene is normalised, on the model's device, and `eps` is the
    inlier distance of the point error in its unit. None means the errors of HeSS, eq. 3 and 4, on the result
    of `hess_predict`. Not called where the target is the model's own prediction.
    """


@hookspec(firstresult=True)
def hess_replace_attention(site: Site, attend: Callable[..., Tensor]) -> Replacement | None:
    """Make one site call `attend` instead of ``scaled_dot_product_attention``.

    The core answers by running the module's own forward with that one call intercepted; an adapter answers
    first where a model spells attention out, best with ``hess_plugin.intercept(site, attend, forward=...)``, whose
    forward makes the call. `attend` has the signature of ``scaled_dot_product_attention``
    and receives q, k, v ``[B, H, N, d]`` after normalisation and position encoding.

    Returns:
        A `Replacement` whose ``remove()`` undoes everything and may be called twice.
    """


@hookspec(firstresult=True)
def hess_load_model(name: str, weights: str, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
    """Build a model for the command line. Optional.

    Called once with ``--model NAME``, on the built-in adapters first; answer None when the name is not yours.
    `weights` is a hub id, the path of a ``.safetensors`` or ``.pt`` file, or ``random``. Return the model in eval mode.
    """
