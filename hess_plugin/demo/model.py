"""The demo model: a miniature of VGGT with the same structure, attribute names and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hess_plugin.demo.heads import CameraHead, DenseHead
from hess_plugin.demo.layers import Block, PatchEmbed, RotaryEmbedding2D

WEIGHTS = Path(__file__).parent / "weights" / "tiny_vggt.safetensors"
_MEAN, _STD = 0.45, 0.27


@dataclass(frozen=True)
class TinyVGGTConfig:
    """Sizes of the demo model."""

    dim: int = 128
    num_heads: int = 8
    depth: int = 4
    patch_size: int = 10
    num_registers: int = 4
    stem: int = 192
    image_size: int = 60
    stride: int = 2
    camera_depth: int = 3
    camera_iterations: int = 4


class Aggregator(nn.Module):
    """Patch embedding, then `depth` pairs of a per-frame and a global attention block."""

    def __init__(self, config: TinyVGGTConfig) -> None:
        super().__init__()
        dim, heads = config.dim, config.num_heads
        self.patch_size = config.patch_size
        self.patch_start_idx = 1 + config.num_registers
        self.depth = config.depth
        self.patch_embed = PatchEmbed(config.patch_size, dim, config.stem, config.image_size)
        # Index 0 of axis 1 is the first frame's token, index 1 that of all other frames.
        self.camera_token = nn.Parameter(0.1 * torch.randn(1, 2, 1, dim))
        self.register_token = nn.Parameter(0.1 * torch.randn(1, 2, config.num_registers, dim))
        self.rope = RotaryEmbedding2D()
        self.frame_blocks = nn.ModuleList(Block(dim, heads, rope=self.rope) for _ in range(config.depth))
        self.global_blocks = nn.ModuleList(Block(dim, heads, rope=self.rope) for _ in range(config.depth))

    def forward(self, images: Tensor) -> tuple[list[Tensor], int]:
        """Tokens of every pair of blocks.

        Args:
            images: `[B, S, 3, H, W]` in 0 to 1, H and W multiples of the patch size.

        Returns:
            A list of `[B, S, P, 2C]` (frame and global halves) and the index of the first patch token.
        """
        batch, views, _, height, width = images.shape
        patches = self.patch_embed((images.flatten(0, 1) - _MEAN) / _STD)
        special = torch.cat([self.camera_token, self.register_token], dim=2)
        special = torch.cat([special[:, :1], special[:, 1:].expand(-1, views - 1, -1, -1)], dim=1)
        special = special.expand(batch, -1, -1, -1).flatten(0, 1).to(patches.dtype)
        tokens = torch.cat([special, patches], dim=1)
        count, dim = tokens.shape[1:]
        frame_pos = self._positions(height // self.patch_size, width // self.patch_size, images.device)
        global_pos = frame_pos.repeat(1, views, 1)
        outputs = []
        for frame_block, global_block in zip(self.frame_blocks, self.global_blocks, strict=True):
            tokens = frame_block(tokens, pos=frame_pos)
            frame_tokens = tokens.reshape(batch, views, count, dim)
            tokens = global_block(tokens.reshape(batch, views * count, dim), pos=global_pos)
            outputs.append(torch.cat([frame_tokens, tokens.reshape(batch, views, count, dim)], dim=-1))
            tokens = tokens.reshape(batch * views, count, dim)
        return outputs, self.patch_start_idx

    def blocks(self) -> tuple[list[Block], list[Block]]:
        """The per-frame and the global blocks."""
        return cast("list[Block]", list(self.frame_blocks)), cast("list[Block]", list(self.global_blocks))

    def _positions(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Integer positions `[1, P, 2]`: special tokens at (0, 0), patches at (row, column) + 1."""
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(-1, 2) + 1
        special = torch.zeros(self.patch_start_idx, 2, dtype=grid.dtype)
        return torch.cat([special, grid]).unsqueeze(0).to(device)


class TinyVGGT(nn.Module):
    """A small VGGT: cameras, depth and world points of any number of views in one pass."""

    def __init__(self, config: TinyVGGTConfig | None = None) -> None:
        super().__init__()
        config = config or TinyVGGTConfig()
        self.config = config
        self.aggregator = Aggregator(config)
        self.camera_head = CameraHead(
            2 * config.dim,
            config.dim,
            config.num_heads,
            special=self.aggregator.patch_start_idx,
            depth=config.camera_depth,
            iterations=config.camera_iterations,
        )
        self.point_head = DenseHead(2 * config.dim, config.patch_size, config.stride, 3, "linear")
        self.depth_head = DenseHead(2 * config.dim, config.patch_size, config.stride, 1, "exp")
        self._initialise()

    def forward(self, images: Tensor) -> dict[str, Any]:
        """Predict every view in the first camera's frame, up to scale.

        Args:
            images: `[S, 3, H, W]` or `[B, S, 3, H, W]` in 0 to 1, H and W multiples of the patch size.

        Returns:
            `pose_enc` `[B, S, 9]` (translation, quaternion xyzw, vertical and horizontal field of view in
            radians; camera from world, OpenCV axes), `pose_enc_list` (one per refinement), `depth`
            `[B, S, h, w, 1]`, `world_points` `[B, S, h, w, 3]`, `depth_conf` and `world_points_conf`
            `[B, S, h, w]`, all maps at stride 2; `images` in eval mode, `patch_tokens` in training mode.
        """
        if images.dim() == 4:
            images = images.unsqueeze(0)
        tokens, patch_start_idx = self.aggregator(images)
        poses = self.camera_head(tokens)
        predictions: dict[str, Any] = {"pose_enc": poses[-1], "pose_enc_list": poses}
        for name, head in (("depth", self.depth_head), ("world_points", self.point_head)):
            if head is not None:  # as upstream, a head may be left out
                values, confidence = head(tokens, images=images, patch_start_idx=patch_start_idx)
                predictions |= {name: values, f"{name}_conf": confidence}
        if self.training:
            predictions["patch_tokens"] = [pair[:, :, patch_start_idx:] for pair in tokens]
        else:
            predictions["images"] = images
        return predictions

    @torch.no_grad()
    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5 * 0.6)
                nn.init.zeros_(module.bias)
        residual_gain = (4 * self.config.depth) ** -0.5
        dim = self.config.dim
        frame_blocks, global_blocks = self.aggregator.blocks()
        for block in (*frame_blocks, *global_blocks):
            block.attn.proj.weight *= residual_gain
            block.mlp.fc2.weight *= residual_gain
        for block in global_blocks:
            # Equal query and key weights: attention starts as a similarity kernel, as matching needs.
            attn = block.attn
            attn.qkv.weight[dim : 2 * dim] = attn.qkv.weight[:dim]
            attn.q_norm.weight.fill_(1.4)
            attn.k_norm.weight.fill_(1.4)
        nn.init.zeros_(self.camera_head.pose_branch.weight)
        for head in (self.point_head, self.depth_head):
            head.mlp.fc2.weight *= 0.3
            head.mlp.fc2.bias.zero_()


def load_demo_model(device: str | torch.device = "cpu", weights: Path | None = None) -> TinyVGGT:
    """The shipped, trained demo model in eval mode and float32.

    Args:
        device: where to put it.
        weights: another safetensors checkpoint of the same architecture.
    """
    from safetensors.torch import load_file

    model = TinyVGGT()
    state = load_file(str(weights or WEIGHTS))
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model.to(device).eval()
