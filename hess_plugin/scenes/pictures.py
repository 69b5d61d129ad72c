"""What a scene and a set of images have in common: the images and their size."""

from __future__ import annotations

from torch import Tensor


class Pictures:
    """Number and size of ``images``, `[S, 3, H, W]`."""

    images: Tensor

    @property
    def views(self) -> int:
        """Number of images."""
        return int(self.images.shape[0])

    @property
    def height(self) -> int:
        """Rows of an image."""
        return int(self.images.shape[2])

    @property
    def width(self) -> int:
        """Columns of an image."""
        return int(self.images.shape[3])
