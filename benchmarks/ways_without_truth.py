"""What may stand in for the residuals of a prediction where its ground truth is not known.

A residual is a pair, in units of the surface: of points `[n, 3]` and of camera centres `[S, 3]`, float64. Used by
ground_truth_free.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import hess_plugin
from hess_plugin.calibration.self_target import Surface, displace, take_out_similarity
from hess_plugin.calibration.umeyama import trimmed_umeyama
from hess_plugin.predictions import Prediction

BLOCK = 8
Residual = tuple[Tensor, Tensor]
Predict = Callable[[nn.Module, Tensor], Prediction]


def drawn(surface: Surface, generator: torch.Generator) -> Iterator[tuple[str, Residual]]:
    """Residuals from a generator: independent, smooth within a view, or of whole views."""
    views, count = len(surface.centres), len(surface.at)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    yield "white noise", (normal(count, 3), normal(views, 3))
    # A random field over viewing directions, its waves about a sixth of an image long, and another for each view.
    ray = surface.at - surface.centres[surface.views]
    phase = (ray / ray.norm(dim=-1, keepdim=True)) @ (12 * normal(3, 32)) + 2 * math.pi * torch.rand(
        32, generator=generator, dtype=torch.float64
    )
    yield (
        "smooth depth noise",
        ((phase.cos() * normal(views, 32)[surface.views]).mean(-1, True) * ray, normal(views, 3)),
    )
    yield "views displaced", displace(surface, normal(views, 7))


@dataclass
class Target:
    """Another prediction of some views: points `[s, h, w, 3]`, centres `[s, 3]`, views `[s]`."""

    points: Tensor
    centres: Tensor
    views: Tensor

    def residual(self, prediction: Prediction, unit: float) -> Residual:
        """What is left after the target is aligned to the prediction; zero for views that it lacks."""
        points, centres = prediction.points.detach(), prediction.centres.detach()
        similarity, _ = trimmed_umeyama(self.points.reshape(-1, 3), points[self.views].reshape(-1, 3))
        left = torch.zeros_like(points), torch.zeros_like(centres)
        left[0][self.views] = (points[self.views] - similarity.apply(self.points)) / unit
        left[1][self.views] = (centres[self.views] - similarity.apply(self.centres)) / unit
        return left[0].flatten(0, 2).double(), left[1].double()


def perturbed(
    model: nn.Module, predict: Predict, images: Tensor, generator: torch.Generator
) -> Iterator[tuple[str, list[Target]]]:
    """Predictions of changed inputs, or of a changed model, as targets for the unchanged prediction."""
    views = len(images)

    def whole(prediction: Prediction, order: Tensor | None = None) -> Target:
        back = torch.arange(views) if order is None else order.argsort()
        return Target(prediction.points[back], prediction.centres[back], torch.arange(views))

    noise = torch.randn(images.shape, generator=generator)
    yield "pixel noise 0.1", [whole(predict(model, (images + 0.1 * noise).clamp(0, 1)))]
    gain, shift = torch.randn(2, views, 3, 1, 1, generator=generator)
    yield (
        "colours of each image changed",
        [whole(predict(model, (images * (1 + 0.2 * gain) + 0.05 * shift).clamp(0, 1)))],
    )
    order = torch.randperm(views, generator=generator)
    yield "images in another order", [whole(predict(model, images[order]), order)]
    mirrored, mirror = predict(model, images.flip(-1)), torch.tensor([-1.0, 1.0, 1.0])
    yield "images mirrored", [Target(mirrored.points.flip(2) * mirror, mirrored.centres * mirror, torch.arange(views))]
    halves = [(torch.arange(first, views, 2), predict(model, images[first::2])) for first in (0, 1)]
    yield "half of the views", [Target(half.points, half.centres, which) for which, half in halves]
    for sparsity in (0.5, 0.73):
        with hess_plugin.patch(model, sparsity=sparsity, block_q=BLOCK, block_k=BLOCK):
            sparse = whole(predict(model, images))
        yield f"attention at sparsity {sparsity:g}", [sparse]
    for share in (0.03, 0.1):
        changed = copy.deepcopy(model)
        for weight in changed.parameters():
            weight += share * weight.std(correction=0) * torch.randn(weight.shape, generator=generator)
        yield f"weights changed by {100 * share:g} %", [whole(predict(changed, images))]


def along_normals(surface: Surface, residual: Residual, longest: float | None = None) -> Residual:
    """Keep of point residuals what leads off the surface; leave out the long ones, as the point error does."""
    size = (residual[0] * surface.normals).sum(-1, keepdim=True)
    if longest is not None:
        size = size.where(size.abs() < longest, 0.0)
    return size * surface.normals, residual[1]


def aligned(surface: Surface, residual: Residual) -> Residual:
    """Take the best similarity out of residuals in all directions."""
    points, cameras = residual
    origin = surface.at.mean(0)

    def fields(at: Tensor) -> Tensor:
        eye, away = torch.eye(3, dtype=torch.float64).expand(len(at), 3, 3), at - origin
        turns = torch.linalg.cross(eye, away[:, None].expand(-1, 3, -1)).mT
        return torch.cat([eye, turns, away[..., None]], dim=2)

    there = fields(surface.at)
    common = torch.linalg.lstsq(there.flatten(0, 1), points.flatten()[:, None]).solution
    return points - (there @ common)[..., 0], cameras - (fields(surface.centres) @ common)[..., 0]


def fitted(surface: Surface, residual: Residual) -> Residual:
    """What the kept way makes of a displacement: along normals, the similarity taken out."""
    size, cameras = take_out_similarity(surface, (residual[0] * surface.normals).sum(-1), residual[1])
    return size[:, None] * surface.normals, cameras


class OneHead:
    """Attention in which one head, or none, keeps the 27 % of its patch blocks with the largest pooled attention."""

    head: int | None = None
    special, tokens = 5, 41  # of a frame of the demo model

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Answer one attention call on q, k, v ``[1, H, N, d]``."""
        attend = torch.nn.functional.scaled_dot_product_attention
        output = attend(query, key, value)
        if self.head is None:
            return output
        count, width = query.shape[-2:]
        patch = torch.arange(count).view(-1, self.tokens)[:, self.special :].flatten()
        q, k, v = (part[0, self.head] for part in (query, key, value))
        pooled_q, pooled_k = (part[patch].view(-1, BLOCK, width).mean(1) for part in (q, k))
        chosen = (pooled_q @ pooled_k.T).topk(round(0.27 * len(pooled_k)), dim=1).indices
        blocks = torch.zeros(len(pooled_q), len(pooled_k), dtype=torch.bool).scatter_(1, chosen, True)
        mask = torch.ones(count, count, dtype=torch.bool)
        mask[patch[:, None], patch] = blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        output = output.clone()
        output[0, self.head] = attend(q[None], k[None], v[None], attn_mask=mask[None])[0]
        return output
