"""Real-valued masks for the heads that are kept, so that each layer gives what it gave (Kwon et al. 2022, mask tuning).

Layer after layer, from the first that lost a head, the masks ``m`` of the kept heads minimise

    | x' + sum_h m_h O_h + b  -  z |^2  +  damping * t * | m - 1 |^2

summed over calibration scenes: ``x'`` is the residual stream that enters the layer in the pruned model, the layers
before it already tuned, ``O_h`` what head h adds to it there, and ``z`` the residual stream behind the layer in the
original model; ``t`` is the mean of ``|O_h|^2``, so that damping has no unit. Only sums over tokens are kept, ``H x H``
numbers a layer. Where a model has no residual stream that can be found (see `projecting`), x' is left out and z is the
output of the projection in the original model.

Two things differ from the authors' program. An intercept that they fit and then drop is not fitted. They solve the
normal equations by damped LSMR, with a damping in units of activations; here they are solved exactly. As there, masks
outside of -10 to 10 end the tuning: that layer and all later ones keep masks of 0 and 1.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pluggy
import torch
from torch import Tensor, nn

from hess_plugin.calibration.fisher import only_sites_require_grad
from hess_plugin.exceptions import CalibrationError, PatchError
from hess_plugin.interception import is_patched
from hess_plugin.plugins import resolve_adapter
from hess_plugin.scenes.image_set import ImageSet
from hess_plugin.scenes.scene import Scene

from .projecting import Joint, joints
from .pruned import checked_mask, install

DAMPING = 1e-4
LIMIT = 10.0
_ROWS = 16384  # tokens turned into float64 at a time
_log = logging.getLogger(__name__)


@dataclass
class NormalEquations:
    """Sums over tokens of which a layer's masks are made, for K kept heads.

    Attributes:
        gram: ``<O_h, O_g>``, float64 ``[K, K]``.
        cross: ``<O_h, y - b>``, float64 ``[K]``.
        square: ``<y - b, y - b>``.
    """

    gram: Tensor
    cross: Tensor
    square: float = 0.0

    @classmethod
    def empty(cls, heads: int) -> NormalEquations:
        """Sums over nothing."""
        return cls(torch.zeros(heads, heads, dtype=torch.float64), torch.zeros(heads, dtype=torch.float64))

    def add(self, heads: Tensor, wanted: Tensor, weight: Tensor) -> None:
        """Add some tokens.

        Args:
            heads: outputs of the kept heads' attention, side by side, ``[n, K d]``.
            wanted: what the projection gave without its bias, ``[n, C]``.
            weight: the kept heads' columns of the projection, ``[C, K d]``.
        """
        count = len(self.cross)
        weight = weight.double()
        inner = weight.mT @ weight
        for x, y in zip(heads.split(_ROWS), wanted.split(_ROWS), strict=True):
            x, y = x.double(), y.double()
            # <X_h W_h^T, X_g W_g^T> = <X_h^T X_g, W_h^T W_g>: no head's output is ever projected alone.
            moments = (x.mT @ x) * inner
            self.gram += moments.unflatten(1, (count, -1)).unflatten(0, (count, -1)).sum((1, 3)).cpu()
            self.cross += ((y @ weight) * x).sum(0).unflatten(0, (count, -1)).sum(1).cpu()
            self.square += float(y.square().sum())

    def error(self, masks: Tensor) -> float:
        """Squared error of the layer's output with masks ``[K]``."""
        return float(masks @ self.gram @ masks - 2 * self.cross @ masks) + self.square

    def solve(self, damping: float) -> Tensor:
        """Masks ``[K]`` of least error, pulled towards 1 by the damping; their error is at most that of ones."""
        scale = float(self.gram.diagonal().mean())
        if scale == 0.0:
            return torch.ones_like(self.cross)
        system = self.gram / scale + damping * torch.eye(len(self.cross), dtype=torch.float64)
        return 1.0 + torch.linalg.solve(system, (self.cross - self.gram.sum(1)) / scale)


def tuned_mask(
    model: nn.Module,
    scenes: Sequence[Scene | ImageSet],
    mask: Tensor,
    *,
    damping: float = DAMPING,
    autocast: torch.dtype | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    adapter: str | None = None,
    manager: pluggy.PluginManager | None = None,
) -> Tensor:
    """Tune the masks of the heads that a mask of 0 and 1 keeps.

    Two forwards a scene and layer, each as far as that layer. Images alone are enough. The model is in eval mode
    meanwhile and is given back as it was.

    Args:
        model: a model that an adapter claims, not patched.
        scenes: gone through once a layer, so a sequence; read one at a time.
        mask: ``[L, H]`` of 0 and 1.
        damping: above 0; see the module.
        autocast: run the forwards under autocast in this type; None for the model's own.
        progress: called as ``progress(done, total, what)`` before each layer and once at the end.
        adapter: take this adapter instead of asking which one claims the model.
        manager: plugin manager; a fresh one by default.

    Returns:
        float64 ``[L, H]``, 0 where the mask is.

    Raises:
        CalibrationError: scenes, mask or damping cannot be used, or a site's output projection is not found.
        PatchError: the model is patched, or the mask is not of its shape.
    """
    chosen = resolve_adapter(model, adapter, manager)
    if is_patched(model):
        raise PatchError("this model is patched; remove the patch before tuning masks.")
    sites = chosen.sites(model)
    tuned = checked_mask(mask, sites)
    _check(scenes, tuned, damping)
    layers = [i for i in range(_first_pruned(tuned), len(sites)) if bool(tuned[i].any())]
    device = sites[0].weight().device

    def predict(images: Tensor) -> object:
        with contextlib.nullcontext() if autocast is None else torch.autocast(device.type, autocast):
            return chosen.predict(model, images.to(device))

    with (
        only_sites_require_grad(model, []),
        torch.autocast(device.type, enabled=False),
        torch.inference_mode(),
    ):
        found = joints(chosen, model, sites, predict, scenes[0].images) if layers else []
        for done, layer in enumerate(layers):
            if progress is not None:
                progress(done, len(layers), sites[layer].name)
            kept = tuned[layer] != 0
            sums = NormalEquations.empty(int(kept.sum()))
            for scene in scenes:
                behind = found[layer].original(predict, scene.images)
                with install(chosen, sites, tuned):
                    heads, before = found[layer].entering(predict, scene.images)
                _add(sums, found[layer], kept.to(device), heads, behind - before)
            masks = sums.solve(damping)
            if not bool((masks.abs() <= LIMIT).all()):
                _log.warning("tuning ends at %s: a mask of %.3g is out of range", sites[layer].name, masks.abs().max())
                break
            tuned[layer, kept] = masks
    if progress is not None:
        progress(len(layers), len(layers), "")
    return tuned


def _add(sums: NormalEquations, joint: Joint, kept: Tensor, heads: Tensor, wanted: Tensor) -> None:
    """Add one scene: `heads` ``[B, N, H d]`` go in, `wanted` ``[B, N, C]`` is what they should add to the stream."""
    width = (len(kept), -1)
    if joint.projection.bias is not None:
        wanted = wanted - joint.gain * joint.projection.bias.double()
    weight = joint.gain[:, None] * joint.projection.weight.double()
    chosen = heads.flatten(0, -2).unflatten(1, width)[:, kept].flatten(1)
    sums.add(chosen, wanted.flatten(0, -2), weight.unflatten(1, width)[:, kept].flatten(1))


def _first_pruned(mask: Tensor) -> int:
    """Index of the first layer that lost a head; before it nothing differs from the original model."""
    lost = (mask == 0).any(1).tolist()
    return lost.index(True) if True in lost else len(lost)


def _check(scenes: Sequence[Scene | ImageSet], mask: Tensor, damping: float) -> None:
    if isinstance(scenes, (str, Scene, ImageSet)) or not hasattr(scenes, "__getitem__"):
        raise CalibrationError(
            f"scenes is of type {type(scenes).__name__}, wanted a sequence, as tuning goes through it once a layer; "
            "put scenes into a list."
        )
    if not len(scenes):
        raise CalibrationError("no scene was given to tune masks on; give the calibration scenes.")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise CalibrationError("the mask to be tuned holds values other than 0 and 1; give one that is not tuned yet.")
    if not damping > 0:
        raise CalibrationError(f"damping is {damping}, wanted a number above 0.")
