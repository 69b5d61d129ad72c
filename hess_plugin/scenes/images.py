"""Image and depth files, read and written with checks that name the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hess_plugin.exceptions import MissingDependency, SceneError


def read_image(path: Path, *, upright: bool = False) -> Tensor:
    """An image file as `[3, H, W]` float32 RGB in [0, 1]; what is transparent is laid on white.

    Args:
        path: the file.
        upright: turn the image as its EXIF orientation says. Only for images without a known camera: the pixels
            that a camera was calibrated on are those in the file, and turned ones no longer fit its K and pose.

    Raises:
        SceneError: when the file is missing, damaged or not of 8 bits.
    """
    image = _opened(path, upright)
    # Pillow would clip 16-bit and float pixels to white without a word.
    if image.mode.startswith(("I", "F")):
        raise SceneError(f"Image file {path} has pixels of mode {image.mode}, 8-bit RGB was wanted.")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        # Converting straight to RGB would show the colours that were hidden, often black.
        image = image.convert("RGBA")
        white = _pillow().new("RGBA", image.size, (255, 255, 255, 255))
        image = _pillow().alpha_composite(white, image)
    pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32) / 255


def read_depth(path: Path, unit: float) -> Tensor:
    """A 16-bit depth file as `[H, W]` float32, its values times `unit`; 0 stays 0, "not known"."""
    pixels = read_words(path).astype(np.int64)
    return torch.from_numpy(pixels).to(torch.float64).mul(unit).to(torch.float32)


def read_words(path: Path) -> NDArray[np.uint16]:
    """The values `[H, W]` of a 16-bit grey depth file; SceneError when it is missing, damaged or of another kind."""
    image = _opened(path, kind="Depth")
    # Pillow names 16-bit grey "I;16" (or "I;16B"); older versions widen 16-bit PNG to "I".
    if not image.mode.startswith("I"):
        raise SceneError(f"Depth file {path} has pixels of mode {image.mode}, 16-bit grey was wanted.")
    pixels = np.array(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise SceneError(f"Depth file {path} has values outside 0 ... 65535, 16-bit grey was wanted.")
    return pixels.astype(np.uint16)


def read_mask(path: Path) -> NDArray[np.uint8]:
    """The values `[H, W]` of a black-and-white or 8-bit grey mask file: 0 ... 255; SceneError otherwise."""
    image = _opened(path, kind="Mask")
    if image.mode not in ("1", "L", "P"):
        raise SceneError(f"Mask file {path} has pixels of mode {image.mode}, 8-bit grey was wanted.")
    return np.array(image.convert("L"))


def read_reals(path: Path) -> NDArray[np.float32]:
    """The values `[H, W]` of a grey PFM file, top row first; SceneError when it is missing, damaged or another kind."""
    image = _opened(path, kind="Depth")
    if image.mode != "F":
        raise SceneError(f"Depth file {path} has pixels of mode {image.mode}, 32-bit float grey was wanted.")
    return np.array(image)


def image_size(path: Path) -> tuple[int, int]:
    """Rows and columns of an image file, from its first bytes; SceneError when it is missing or no image."""
    pillow = _pillow()
    if not path.is_file():
        raise SceneError(f"Image file {path} does not exist; restore it or take its frame out of the scene.")
    try:
        with pillow.open(path) as image:
            return int(image.height), int(image.width)
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise SceneError(f"Image file {path} cannot be decoded ({error}); copy it again.") from error


def write_image(path: Path, image: Tensor) -> None:
    """Write `[3, H, W]` in [0, 1] as 8-bit RGB; the suffix chooses the file type, PNG loses nothing more."""
    pixels = (image.detach().cpu().double() * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    _pillow().fromarray(pixels.numpy()).save(path)


def write_depth(path: Path, depth: Tensor, unit: float) -> None:
    """Write z-depth `[H, W]` as 16-bit PNG in multiples of `unit`; known depth never rounds to 0."""
    steps = (depth.detach().cpu().double() / unit).round().clamp(max=65535)
    steps[(depth > 0).cpu() & (steps < 1)] = 1
    _pillow().fromarray(steps.numpy().astype(np.uint16)).save(path)


def _opened(path: Path, upright: bool = False, kind: str = "Image") -> Any:
    """The decoded image of a file as a Pillow object, the file closed again."""
    pillow = _pillow()
    if not path.is_file():
        raise SceneError(f"{kind} file {path} does not exist; restore it or take its frame out of the scene.")
    try:
        with pillow.open(path) as image:
            image.load()
            return _turned(image) if upright else image
    # Pillow raises SyntaxError for broken PNG chunks, and an error of its own for what it takes for a bomb.
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise SceneError(f"{kind} file {path} cannot be decoded ({error}); copy it again.") from error


def _turned(image: Any) -> Any:
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependency("Reading images needs Pillow: pip install pillow.") from error
    return Image
