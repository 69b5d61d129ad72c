"""What an adapter tells the core about a model: where its global attention is and how its tokens lie."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .exceptions import AdapterError

PROJECTIONS = ("q", "k", "v")


@dataclass(frozen=True)
class Projection:
    """Where the rows of one projection (W_Q, W_K or W_V) lie.

    Attributes:
        parameter: name of the weight inside the site's module, for example ``"qkv.weight"``.
        start: first row of the projection in that weight; head ``h`` owns the ``head_dim`` rows
            from ``start + h * stride``.
        stride: rows from one head to the next; None for ``head_dim``. Where q, k and v of a head lie together
            (``[H, 3, d]``) it is three times that.
    """

    parameter: str
    start: int
    stride: int | None = None


@dataclass(frozen=True)
class Site:
    """One global-attention module of a model: the place where a head's budget is spent.

    Attributes:
        name: key of the module in ``model.named_modules()``.
        module: the attention module; its forward calls ``scaled_dot_product_attention`` exactly once.
        num_heads: heads H.
        head_dim: width d of a head.
        layout_module: name of the module whose inputs tell the token layout of this site (the smallest
            module a user may call on images); ``""`` is the model itself.
        projections: where W_Q, W_K and W_V are, by the letters ``q``, ``k``, ``v``.
        network: name of the module that holds all sites where people also hold it without what is around it (the
            ``model`` of Depth Anything 3); ``""`` is the model itself.
        output: name of the weight ``[C, H * d]`` inside the module that joins the heads' outputs (W_O, columns
            head-major); None where there is no such weight, and heads' outputs are then compared as they are.
    """

    name: str
    module: nn.Module
    num_heads: int
    head_dim: int
    layout_module: str
    projections: Mapping[str, Projection]
    network: str = ""
    output: str | None = None

    @property
    def key(self) -> str:
        """The name inside the network: what a profile calls the site, whoever is around it."""
        return self.name.removeprefix(f"{self.network}.") if self.network else self.name

    def weight(self, projection: str = "q") -> nn.Parameter:
        """Return the parameter that holds one projection (fused ``qkv`` holds all three).

        Raises:
            AdapterError: it is no parameter, but made of others.
        """
        weight, name = self.tensor(projection), self.projections[projection].parameter
        if not isinstance(weight, nn.Parameter):
            raise AdapterError(
                f"{self.name}.{name} is not a parameter but made of others, by torch.nn.utils.parametrize or a like "
                "tool; undo that first (parametrize.remove_parametrizations) and repeat it afterwards."
            )
        return weight

    def tensor(self, projection: str = "q") -> Tensor:
        """Return what the module computes that projection with: `weight`, or what is made in its place.

        Raises:
            AdapterError: there is no such tensor.
        """
        name = self.projections[projection].parameter
        found = self._find(name)
        if not isinstance(found, Tensor):
            raise AdapterError(
                f"{self.name}.{name} ({type(self.module).__name__}) is not a tensor but "
                f"{'missing' if found is None else 'a ' + type(found).__name__}; another tool replaced the layer (a "
                "quantised one keeps no weight to read); undo that first."
            )
        return found

    def output_weight(self) -> Tensor | None:
        """Return W_O ``[C, H * d]`` as it is now, or None where there is none of that shape to read."""
        weight = None if self.output is None else self._find(self.output)
        if not isinstance(weight, Tensor) or hasattr(weight, "full_tensor") or weight.is_meta:
            return None
        if not weight.is_floating_point():  # quantised: values without their scales
            return None
        return weight if weight.ndim == 2 and weight.shape[1] == self.num_heads * self.head_dim else None

    def _find(self, name: str) -> Any:
        found: Any = self.module
        for part in name.split("."):
            found = getattr(found, part, None)
        return found

    def head_rows(self, gradient: Tensor, projection: str = "q") -> Tensor:
        """View the rows of one projection in a gradient of its weight as ``[H, d, in_features]``."""
        found = self.projections[projection]
        stride = found.stride or self.head_dim
        rows = gradient[found.start :].unfold(0, self.head_dim, stride)[: self.num_heads]  # [H, in_features, d]
        return rows.movedim(-1, 1)


def fused_site(model: nn.Module, name: str, layout_module: str, network: str = "") -> Site:
    """Describe an attention module with one fused ``qkv`` linear layer, rows q | k | v, head-major.

    If it has a linear layer ``proj``, that is taken for the one that joins the heads.

    Raises:
        AdapterError: the module has no ``num_heads`` or no ``qkv`` weight of three equal parts.
    """
    module = model.get_submodule(name)
    num_heads, weight = getattr(module, "num_heads", None), getattr(getattr(module, "qkv", None), "weight", None)
    if not isinstance(num_heads, int) or not isinstance(weight, Tensor) or weight.shape[0] % (3 * num_heads):
        raise AdapterError(
            f"{name} ({type(module).__name__}) is not an attention module with `num_heads` and a fused `qkv` "
            "linear layer; describe it with hess_plugin.Site directly."
        )
    width = weight.shape[0] // 3
    projections = {letter: Projection("qkv.weight", i * width) for i, letter in enumerate(PROJECTIONS)}
    return Site(name, module, num_heads, width // num_heads, layout_module, projections, network, "proj.weight")


@dataclass(frozen=True)
class TokenLayout:
    """How the tokens of one global-attention sequence are arranged, frame after frame.

    A frame is ``leading`` special tokens, ``patches`` patch tokens in raster order, ``trailing`` special
    tokens; ``tail`` more special tokens may close the sequence. All counts are Python integers, so that
    reading a layout never waits for a device.

    Attributes:
        frames: number of views N.
        patches: patch tokens of one frame.
        leading: special tokens before the patches of each frame (camera and registers in VGGT).
        trailing: special tokens after the patches of each frame.
        tail: special tokens after the last frame.
        grid: patch rows and columns ``(h, w)`` if known; ``h * w == patches``.
    """

    frames: int
    patches: int
    leading: int = 0
    trailing: int = 0
    tail: int = 0
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.frames < 1 or self.patches < 1 or min(self.leading, self.trailing, self.tail) < 0:
            raise AdapterError(f"{self} is not a token layout: frames and patches are at least 1, others at least 0.")
        if self.grid is not None and self.grid[0] * self.grid[1] != self.patches:
            raise AdapterError(f"patch grid {self.grid} does not hold the {self.patches} patches of a frame.")

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one frame, special ones included."""
        return self.leading + self.patches + self.trailing

    @property
    def tokens(self) -> int:
        """Length of the whole sequence."""
        return self.frames * self.tokens_per_frame + self.tail

    @property
    def patch_tokens(self) -> int:
        """Patch tokens of the whole sequence."""
        return self.frames * self.patches

    @property
    def special_tokens(self) -> int:
        """Special tokens of the whole sequence."""
        return self.tokens - self.patch_tokens

    def patches_first(self, within: Tensor | None = None) -> Tensor:
        """Token indices ``[tokens]`` int64 on the CPU: every patch, frame by frame, then every special token.

        Args:
            within: order of the patches inside each frame, a permutation ``[patches]``; raster by default.
        """
        arange = functools.partial(torch.arange, device="cpu")
        within = arange(self.patches) if within is None else within
        starts = arange(self.frames)[:, None] * self.tokens_per_frame
        after = arange(self.leading + self.patches, self.tokens_per_frame)
        beside = torch.cat([arange(self.leading), after])
        tail = arange(self.tokens - self.tail, self.tokens)
        return torch.cat([(starts + self.leading + within).flatten(), (starts + beside).flatten(), tail])
