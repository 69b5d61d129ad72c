"""Bringing images, their intrinsics and their depth to another size together."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import interpolate, pad

from hess_plugin.framing import Placement

WHITE = 1.0


def place(
    placement: Placement, images: Tensor, intrinsics: Tensor, depth: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scale, then cut or pad.

    Images are resampled with an antialiased bicubic filter, depth by nearest pixel (a mean of two depths is a
    point in the air), intrinsics by the half-pixel rule ``u' + .5 = (u + .5) * width / W``. Bars are white in
    images and "not known" in depth.

    Args:
        placement: of images of this shape.
        images: ``[S, 3, H, W]`` in [0, 1].
        intrinsics: ``[S, 3, 3]`` in pixels.
        depth: ``[S, H, W]``, or None.

    Returns:
        The same three at ``placement.rows x placement.columns``.
    """
    height, width = int(images.shape[-2]), int(images.shape[-1])
    intrinsics = intrinsics.clone()
    size = (placement.height, placement.width)
    if size != (height, width):
        images = _scaled(images, height, placement.width)
        images = _scaled(images, *size)
        if depth is not None:
            depth = interpolate(depth[:, None], size, mode="nearest-exact")[:, 0]
        intrinsics[:, 0] *= placement.width / width
        intrinsics[:, 1] *= placement.height / height
        intrinsics[:, 0, 2] += 0.5 * placement.width / width - 0.5
        intrinsics[:, 1, 2] += 0.5 * placement.height / height - 0.5
    intrinsics[:, 0, 2] -= placement.left
    intrinsics[:, 1, 2] -= placement.top
    return _boxed(images, placement, WHITE), intrinsics, None if depth is None else _boxed(depth, placement, 0.0)


def _scaled(images: Tensor, height: int, width: int) -> Tensor:
    """Scale along one axis; the other has its length already.

    The filter overshoots at sharp edges. Pillow, by which upstream's loaders scale, takes the columns first and cuts
    the overshoot off before it takes the rows; cut only at the end, bright corners come out otherwise. (From release
    13 on it takes the rows first where they shrink more: there, and only in such corners, the two differ.)
    """
    if (height, width) == tuple(images.shape[-2:]):
        return images
    return interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)


def _boxed(maps: Tensor, placement: Placement, fill: float) -> Tensor:
    """Cut ``[..., h, w]`` to the placement's box; what lies outside of the image is filled."""
    bottom = placement.top + placement.rows - placement.height
    right = placement.left + placement.columns - placement.width
    margins = [-placement.left, right, -placement.top, bottom]
    return maps if not any(margins) else pad(maps, margins, value=fill)
