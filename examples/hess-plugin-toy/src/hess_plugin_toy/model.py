"""A toy reconstruction model, standing for somebody's own package: it knows nothing of hess-plugin."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Reconstruction(NamedTuple):
    """What the model returns for views ``[S, 3, H, W]``.

    Attributes:
        extrinsics: world to camera, ``[S, 3, 4]``, OpenCV axes.
        points: world points at half the patches' stride, ``[S, 2 H / 12, 2 W / 12, 3]``.
        certainty: of the points, logits ``[S, 2 H / 12, 2 W / 12]``.
    """

    extrinsics: Tensor
    points: Tensor
    certainty: Tensor


class SceneAttention(nn.Module):
    """Attention over the tokens of all views, with a layer each for queries, keys and values."""

    def __init__(self, dim: int, heads: int, *, spelled: bool) -> None:
        super().__init__()
        self.heads, self.width, self.spelled = heads, dim // heads, spelled
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``[B, N, C]`` to tokens ``[B, N, C]``."""
        q, k, v = (layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in self.layers())
        if self.spelled:
            mixed = (q @ k.mT * self.width**-0.5).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def layers(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The layers of queries, keys and values."""
        return self.q_proj, self.k_proj, self.v_proj


class SceneBlock(nn.Module):
    """Attention over the whole scene, then a small network for each token."""

    def __init__(self, dim: int, heads: int, *, spelled: bool) -> None:
        super().__init__()
        self.attention = SceneAttention(dim, heads, spelled=spelled)
        self.norm_in, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.network = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``[B, N, C]`` to tokens ``[B, N, C]``."""
        tokens = tokens + self.attention(self.norm_in(tokens))
        return tokens + self.network(self.norm_out(tokens))


class Toy(nn.Module):
    """Cameras and points of any number of views; its attention sees every view at once, in every block.

    The tokens of a view are its patches, row by row, then two for its pose; one for the scene closes the sequence.
    """

    patch, pose_tokens = 12, 2

    def __init__(self, *, spelled: bool = False, dim: int = 48, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, self.patch, self.patch)
        self.pose_token = nn.Parameter(torch.randn(1, self.pose_tokens, dim))
        self.scene_token = nn.Parameter(torch.randn(1, 1, dim))
        self.scene_blocks = nn.ModuleList(SceneBlock(dim, heads, spelled=spelled) for _ in range(depth))
        self.pose_head = nn.Linear(self.pose_tokens * dim, 9)
        self.point_head = nn.Linear(dim, 4 * 4)

    def forward(self, views: Tensor) -> Reconstruction:
        """Reconstruct views ``[S, 3, H, W]``, sides multiples of 12."""
        count, rows, columns = len(views), views.shape[-2] // self.patch, views.shape[-1] // self.patch
        if views.shape[-2] % self.patch or views.shape[-1] % self.patch:
            raise ValueError(f"sides have to be multiples of {self.patch}, not {tuple(views.shape[-2:])}")
        patches = self.embed(views).flatten(2).mT
        tokens = torch.cat([patches, self.pose_token.expand(count, -1, -1)], 1).flatten(0, 1)[None]
        tokens = torch.cat([tokens, self.scene_token], 1)
        for block in self.scene_blocks:
            tokens = block(tokens)
        tokens = tokens[0, :-1].unflatten(0, (count, -1))
        values = self.point_head(tokens[:, : -self.pose_tokens]).reshape(count, rows, columns, 2, 2, 4)
        values = values.transpose(2, 3).reshape(count, 2 * rows, 2 * columns, 4)
        return Reconstruction(
            _extrinsics(self.pose_head(tokens[:, -self.pose_tokens :].flatten(1))), values[..., :3], values[..., 3]
        )


def _extrinsics(numbers: Tensor) -> Tensor:
    """Rotations and shifts ``[S, 3, 4]`` of two directions and a shift each, ``[S, 9]``."""
    first, second, shift = numbers.split(3, -1)
    first = F.normalize(first, dim=-1)
    second = F.normalize(second - (first * second).sum(-1, keepdim=True) * first, dim=-1)
    third = torch.linalg.cross(first, second)
    return torch.stack([first, second, third, shift], -1)
