"""Image and depth files, read and written with checks that name the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hess_plugin.exceptions import MissingDependency, SceneError


def read_image(path: Path) -> Tensor:
    """An image file as `[3, H, W]` float32 RGB in [0, 1]; SceneError when it is missing or damaged."""
    image = _opened(path)
    # Pillow would clip 16-bit and float pixels to white without a word.
    if image.mode.startswith(("I", "F")):
        raise SceneError(f"Image file {path} has pixels of mode {image.mode}, 8-bit RGB was wanted.")
    pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32) / 255


def read_depth(path: Path, unit: float) -> Tensor:
    """A 16-bit depth file as `[H, W]` float32, its values times `unit`; 0 stays 0, "not known"."""
    image = _opened(path)
    # Pillow names 16-bit grey "I;16" (or "I;16B"); older versions widen 16-bit PNG to "I".
    if not image.mode.startswith("I"):
        raise SceneError(f"Depth file {path} has pixels of mode {image.mode}, 16-bit grey was wanted.")
    pixels = np.array(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise SceneError(f"Depth file {path} has values outside 0 ... 65535, 16-bit grey was wanted.")
    return torch.from_numpy(pixels).to(torch.float64).mul(unit).to(torch.float32)


def write_image(path: Path, image: Tensor) -> None:
    """Write `[3, H, W]` in [0, 1] as 8-bit RGB; the suffix chooses the file type, PNG loses nothing more."""
    pixels = (image.detach().cpu().double() * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    _pillow().fromarray(pixels.numpy()).save(path)


def write_depth(path: Path, depth: Tensor, unit: float) -> None:
    """Write z-depth `[H, W]` as 16-bit PNG in multiples of `unit`; known depth never rounds to 0."""
    steps = (depth.detach().cpu().double() / unit).round().clamp(max=65535)
    steps[(depth > 0).cpu() & (steps < 1)] = 1
    _pillow().fromarray(steps.numpy().astype(np.uint16)).save(path)


def _opened(path: Path) -> Any:
    """The decoded image of a file as a Pillow object, the file closed again."""
    pillow = _pillow()
    if not path.is_file():
        raise SceneError(f"Image file {path} does not exist; restore it or take its frame out of the scene.")
    try:
        with pillow.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for broken PNG chunks
        raise SceneError(f"Image file {path} cannot be decoded ({error}); copy it again.") from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependency("Reading images needs Pillow: pip install pillow.") from error
    return Image
