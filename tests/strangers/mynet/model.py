"""The model of the adapter guide, as somebody's own checkout: blocks that alternate between one frame and all."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Block(nn.Module):
    order = "qkv"

    def __init__(self, width: int = 32, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = (parts[self.order.index(letter)] for letter in "qkv")
        return x + self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v)


class SpelledOut(Block):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


class OtherOrder(Block):
    order = "kvq"


class Twofold(nn.Module):
    """Attends inside a frame and then across frames, with two layers or, for those who look at it, with one."""

    def __init__(self) -> None:
        super().__init__()
        self.within, self.across = Block(), Block()
        self.frames = 0  # the model says how many

    @property
    def num_heads(self) -> int:
        return self.across.num_heads

    @property
    def qkv(self) -> nn.Linear:
        return self.across.qkv

    def forward(self, x: Tensor) -> Tensor:
        frames = self.within(x.unflatten(1, (self.frames, -1)).flatten(0, 1))
        return self.across(frames.unflatten(0, (len(x), -1)).flatten(1, 2))


class MyNet(nn.Module):
    """Every odd block sees all frames; one special token leads each frame."""

    patch, special = 14, 1
    kind: type[nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, self.patch, self.patch)
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.mynet_blocks = nn.ModuleList(self.kind() if i % 2 else Block() for i in range(4))
        self.pose, self.point_head, self.depth_head = (nn.Linear(32, 3) for _ in range(3))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images [B, N, 3, H, W], sides multiples of the patch."""
        batch, views, _, height, width = images.shape
        patches = self.embed(images.flatten(0, 1)).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(patches), -1, -1), patches], 1)
        for i, block in enumerate(self.mynet_blocks):
            x = x.reshape(batch, -1, 32) if i % 2 else x.reshape(batch * views, -1, 32)
            if isinstance(block, Twofold):
                block.frames = views
            x = block(x)
        x = x.reshape(batch, views, -1, 32)
        c2w = torch.eye(4, device=x.device).repeat(batch, views, 1, 1)
        centre = torch.cat([self.pose(x[:, :, 0]), torch.ones_like(x[:, :, 0, :1])], -1)[..., None]
        points = self.point_head(x[:, :, 1:]).unflatten(2, (height // self.patch, width // self.patch))
        return {"c2w": torch.cat([c2w[..., :3], centre], -1), "points": points, "conf": torch.ones_like(points[..., 0])}


class SpelledOutNet(MyNet):
    kind = SpelledOut


class OtherOrderNet(MyNet):
    kind = OtherOrder


class TwofoldNet(MyNet):
    kind = Twofold
