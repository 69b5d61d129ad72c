"""One model, one scene and the adapter under test, and what several checks ask of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hess_plugin.adapting import Adapter
from hess_plugin.exceptions import AdapterError
from hess_plugin.handle import Patch
from hess_plugin.interception import SDPA
from hess_plugin.patching import patch
from hess_plugin.predictions import Prediction
from hess_plugin.registration.registry import one_line
from hess_plugin.scenes.scene import Scene
from hess_plugin.sites import Site

ANY_DISTANCE = 1e6
"""Inlier distance of the point error: random weights predict points far from the truth, so every point counts."""


class CannotTell(Exception):
    """A check that does not apply to this model, with the reason as its text."""


@dataclass(frozen=True)
class Case:
    """What the checks are about.

    Attributes:
        model: a small instance in eval mode.
        scene: a normalised scene, on the model's device.
        adapter: the adapter under test.
        block: patch tokens in a query or key block.
        sparsity: target of the sparse checks.
    """

    model: nn.Module
    scene: Scene
    adapter: Adapter
    block: int
    sparsity: float

    def sites(self) -> list[Site]:
        """The sites of the model."""
        return self.adapter.sites(self.model)

    def predict(self, model: nn.Module | None = None, images: Tensor | None = None) -> Prediction:
        """Predict without gradient; by default with the case's model, on the scene's images."""
        with torch.no_grad():
            return self.adapter.predict(
                self.model if model is None else model, self.scene.images if images is None else images
            )

    def predict_at(self, images: Tensor) -> Prediction:
        """Predict images of another size than the scene's.

        Raises:
            AdapterError: the model does not take a size that the family allows.
        """
        try:
            return self.predict(images=images)
        except (AdapterError, RuntimeError, ValueError, AssertionError) as error:
            raise AdapterError(
                f"{' x '.join(map(str, images.shape[-2:]))} pixels, sides multiples of "
                f"{self.adapter.family(self.model).framing.multiple} as the family says, failed "
                f"({one_line(error)[:160]}); give hess_describe_family the Framing(multiple=...) that the model takes"
            ) from error

    def patched(self, sparsity: float | None = None, **options: Any) -> Patch:
        """Patch the model through the adapter under test."""
        return patch(
            self.model,
            sparsity=self.sparsity if sparsity is None else sparsity,
            adapter=self.adapter.name,
            manager=self.adapter.manager,
            block_q=self.block,
            block_k=self.block,
            dense_from=1.0,  # totals are checked, on a GPU, too
            **options,
        )

    def other_sizes(self) -> list[Tensor]:
        """Images of one row, and of one column of multiples less than the scene's (more, where it has only one)."""
        images, multiple = self.scene.images, self.adapter.family(self.model).framing.multiple
        lower = _one_multiple_off(images.mT, multiple).mT
        return [lower, _one_multiple_off(images, multiple)]

    @contextmanager
    def watched(self, model: nn.Module, note: Callable[[str, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
        """Tell `note` the site's name, q, k and v of every attention call, which is answered as it always is."""
        undo = []
        try:
            for site in self.adapter.sites(model):
                undo.append(self.adapter.replace_attention(site, _noting(site.name, note)))
            yield
        finally:
            for replacement in undo:
                replacement.remove()

    def replaced_by_adapter(self, site: Site) -> bool:
        """Whether the adapter replaces this site's attention in its own way, or spells its forward out."""
        replacement = self.adapter.call("hess_replace_attention", site=site, attend=SDPA)
        if replacement is not None:
            replacement.remove()
        return replacement is not None

    def copy(self) -> nn.Module:
        """A copy of the model that a check may change."""
        return copy.deepcopy(self.model)


def difference(first: Prediction, second: Prediction) -> str | None:
    """Name the first field in which two predictions are not equal bit for bit."""
    for field in dataclasses.fields(Prediction):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if isinstance(a, Tensor) and not torch.equal(a, b):
            if a.shape != b.shape:
                return f"{field.name} has shape {list(b.shape)} instead of {list(a.shape)}"
            return f"{field.name} differs by {(a - b).abs().max().item():.2e}"
    return None


def finite(prediction: Prediction) -> bool:
    """Whether every number of a prediction is finite."""
    return all(bool(torch.isfinite(t).all()) for t in (prediction.c2w, prediction.points, prediction.confidence))


def _one_multiple_off(images: Tensor, multiple: int) -> Tensor:
    if images.shape[-1] > multiple:
        return images[..., :-multiple].contiguous()
    return torch.cat([images, images[..., :multiple]], -1)


def _noting(name: str, note: Callable[[str, Tensor, Tensor, Tensor], None]) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        note(name, query, key, value)
        return SDPA(query, key, value, *args, **kwargs)

    return attend
