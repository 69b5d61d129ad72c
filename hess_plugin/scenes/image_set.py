"""Images without ground truth, for what needs none."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hess_plugin.exceptions import SceneError
from hess_plugin.framing import Framing
from hess_plugin.scenes._checks import check_images
from hess_plugin.scenes.pictures import Pictures
from hess_plugin.scenes.placing import place


@dataclass(frozen=True, eq=False)
class ImageSet(Pictures):
    """Images of one scene of which nothing else is known, checked on construction.

    Attributes:
        name: shown in messages and recorded in profiles.
        images: `[S, 3, H, W]` float32 RGB in [0, 1].

    Raises:
        SceneError: naming the set and what is wrong.
    """

    name: str
    images: Tensor

    def __post_init__(self) -> None:
        check_images(self.name, self.images)

    def framed(self, framing: Framing) -> ImageSet:
        """The images at a size that a model takes."""
        none = torch.eye(3, dtype=torch.float64).expand(self.views, 3, 3)
        images, _, _ = place(framing.place(self.height, self.width), self.images, none, None)
        return replace(self, images=images)

    def digest(self) -> str:
        """A digest of the images: 16 hexadecimal digits, the same wherever they lie."""
        digest = hashlib.blake2b(digest_size=8)
        digest.update(f"images{tuple(self.images.shape)}".encode())
        digest.update(self.images.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> ImageSet:
        """The set with its images on `device`."""
        return replace(self, images=self.images.to(device))


def require_truth(scene: object, step: str) -> None:
    """Refuse images without ground truth.

    Raises:
        SceneError: `scene` is an `ImageSet`.
    """
    if isinstance(scene, ImageSet):
        raise SceneError(
            f"scene {scene.name!r} is images without ground truth, {step} needs true cameras; give data that has them."
        )
