"""Transformer parts of the demo model, with upstream VGGT's attribute names so that its adapter fits them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RotaryEmbedding2D(nn.Module):
    """Rotary position embedding over a (row, column) grid: half of the head dimension turns with each.

    Args:
        frequency: base of the geometric series of angular frequencies.
    """

    def __init__(self, frequency: float = 100.0) -> None:
        super().__init__()
        self.frequency = frequency

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Rotate tokens `[B, H, N, d]` (d a multiple of 4) by integer positions `[1 or B, N, 2]`."""
        quarter = tokens.shape[-1] // 4
        steps = torch.arange(quarter, device=tokens.device, dtype=torch.float32) / quarter
        angles = positions.unsqueeze(-1).float() * self.frequency ** (-steps)
        angles = torch.cat([angles, angles], dim=-1).flatten(-2).unsqueeze(1)
        cos, sin = angles.cos().to(tokens.dtype), angles.sin().to(tokens.dtype)
        row_a, row_b, column_a, column_b = tokens.chunk(4, dim=-1)
        turned = torch.cat([-row_b, row_a, -column_b, column_a], dim=-1)
        return tokens * cos + turned * sin


class Attention(nn.Module):
    """Multi-head self-attention: fused `qkv`, normalised queries and keys, optional rotary positions."""

    def __init__(self, dim: int, num_heads: int, rope: RotaryEmbedding2D | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(self.head_dim)
        self.k_norm = nn.LayerNorm(self.head_dim)
        self.proj = nn.Linear(dim, dim)
        self.rope = rope

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        """Attend over tokens `[B, N, C]` at positions `[1 or B, N, 2]` (none: no rotary embedding)."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if self.rope is not None and pos is not None:
            q, k = self.rope(q, pos), self.rope(k, pos)
        out = _attend(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))


class LayerScale(nn.Module):
    """A learned gain per channel."""

    def __init__(self, dim: int, init: float = 1.0) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the last axis."""
        return x * self.gamma


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, dim if out is None else out)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, rope: RotaryEmbedding2D | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, rope)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim)

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        """Tokens `[B, N, C]` to tokens `[B, N, C]`."""
        x = x + self.ls1(self.attn(self.norm1(x), pos=pos))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Overlapping patches through a two-layer network, plus the patch's place in the image.

    The place enters as waves of the normalised patch centre, not as a table, so any image size works.
    """

    def __init__(self, patch_size: int, dim: int, hidden: int, image_size: int, overlap: int = 3) -> None:
        super().__init__()
        self.img_size = (image_size, image_size)  # as upstream: the size the model is trained at
        self.stem = nn.Conv2d(3, hidden, patch_size + 2 * overlap, stride=patch_size, padding=overlap)
        self.act = nn.GELU(approximate="tanh")
        self.out = nn.Linear(hidden, dim)
        self.place = nn.Linear(16, dim)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[N, 3, H, W]` to patch tokens `[N, h * w, C]`, row by row."""
        features = self.stem(images)
        rows, columns = features.shape[-2:]
        return self.out(self.act(features.flatten(2).transpose(1, 2))) + self.place(
            _patch_places(rows, columns, images.device)
        )


def _patch_places(rows: int, columns: int, device: torch.device) -> Tensor:
    """Sines and cosines `[h * w, 16]` of the patch centres, which run over (-1, 1)."""
    y = (2 * torch.arange(rows, device=device) + 1) / rows - 1
    x = (2 * torch.arange(columns, device=device) + 1) / columns - 1
    centres = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)
    angles = centres.unsqueeze(-1) * (torch.pi / 2 * 2.0 ** torch.arange(4, device=device))
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention; in float32 under CPU autocast, because the bfloat16 backward is far slower."""
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    return F.scaled_dot_product_attention(q, k, v)
