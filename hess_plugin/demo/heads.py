"""Prediction heads of the demo model: iteratively refined cameras, and dense maps with confidence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hess_plugin.demo.layers import Block, Mlp

_LARGEST_LOGIT = 8.0


class PatchReader(nn.Module):
    """Lets the special tokens of a frame read all tokens of that frame (cross-attention and an MLP)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 2 * dim)

    def forward(self, special: Tensor, tokens: Tensor) -> Tensor:
        """Special tokens `[N, R, C]` reading frame tokens `[N, P, C]`."""
        frames, count, dim = special.shape
        q = self.query(self.norm(special)).reshape(frames, count, self.num_heads, -1).transpose(1, 2)
        kv = self.key_value(self.norm(tokens)).reshape(frames, tokens.shape[1], 2, self.num_heads, -1)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(frames, count, dim)
        special = special + self.proj(read)
        return special + self.mlp(self.norm2(special))


class CameraHead(nn.Module):
    """Camera of every frame, refined a few times by a trunk that compares the frames.

    As upstream, each refinement sees the previous pose without gradient. Unlike upstream, where the camera
    token alone goes in, the special tokens first read the frame's patch tokens.
    """

    def __init__(self, token_dim: int, dim: int, num_heads: int, *, special: int, depth: int, iterations: int) -> None:
        super().__init__()
        self.iterations = iterations
        self.special = special
        self.token_norm = nn.LayerNorm(token_dim)
        self.token_proj = nn.Linear(token_dim, dim)
        self.readers = nn.ModuleList(PatchReader(dim, num_heads) for _ in range(2))
        self.merge = nn.Linear(special * dim, dim)
        self.embed_pose = nn.Linear(9, dim)
        self.empty_pose = nn.Parameter(torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]))
        self.trunk = nn.ModuleList(Block(dim, num_heads, 4.0) for _ in range(depth))
        self.trunk_norm = nn.LayerNorm(dim)
        self.pose_branch = nn.Linear(dim, 9)

    def forward(self, aggregated_tokens_list: list[Tensor], num_iterations: int | None = None) -> list[Tensor]:
        """Pose encodings `[B, S, 9]`, one per refinement, from the last `[B, S, P, 2C]` tokens."""
        tokens = aggregated_tokens_list[-1]
        batch, views = tokens.shape[:2]
        tokens = self.token_proj(self.token_norm(tokens)).flatten(0, 1)
        special = tokens[:, : self.special]
        for reader in self.readers:
            special = reader(special, tokens)
        cameras = self.merge(special.flatten(1)).reshape(batch, views, -1)
        pose = self.empty_pose.expand(batch, views, 9)
        poses: list[Tensor] = []
        for _ in range(self.iterations if num_iterations is None else num_iterations):
            hidden = cameras + self.embed_pose(pose)
            for block in self.trunk:
                hidden = block(hidden)
            pose = pose + self.pose_branch(self.trunk_norm(hidden)).float()
            poses.append(pose)
            pose = pose.detach()
        return poses


class DenseHead(nn.Module):
    """Per-pixel values and confidence (1 + exp) from patch tokens, at a stride.

    Args:
        token_dim: channels of the aggregated tokens.
        patch_size: of the aggregator.
        stride: of the output maps, in pixels; divides `patch_size`.
        channels: values per pixel.
        activation: `linear` or `exp`.
    """

    def __init__(self, token_dim: int, patch_size: int, stride: int, channels: int, activation: str) -> None:
        super().__init__()
        self.intermediate_layer_idx = (-1,)  # as upstream: the layers that are read
        self.patch_size = patch_size
        self.side = patch_size // stride
        self.channels = channels
        self.activation = activation
        self.norm = nn.LayerNorm(token_dim)
        self.mlp = Mlp(token_dim, token_dim, self.side**2 * (channels + 1))

    def forward(
        self, aggregated_tokens_list: list[Tensor], images: Tensor, patch_start_idx: int
    ) -> tuple[Tensor, Tensor]:
        """Values `[B, S, h, w, channels]` and confidence `[B, S, h, w]` for images `[B, S, 3, H, W]`."""
        tokens = aggregated_tokens_list[-1][:, :, patch_start_idx:]
        batch, views = tokens.shape[:2]
        rows, columns = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        maps = self.mlp(self.norm(tokens)).float()
        maps = maps.reshape(batch, views, rows, columns, self.side, self.side, self.channels + 1)
        maps = maps.transpose(3, 4).reshape(batch, views, rows * self.side, columns * self.side, -1)
        values = maps[..., :-1]
        if self.activation == "exp":
            values = values.clamp(max=_LARGEST_LOGIT).exp()
        return values, 1 + maps[..., -1].clamp(max=_LARGEST_LOGIT).exp()
