"""The size a model family wants its images in, and how an image of another shape gets there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, sqrt

from .exceptions import SceneError


@dataclass(frozen=True)
class Placement:
    """Where an image of one shape ends up: scaled to `height x width`, then cut or padded to `rows x columns`.

    Attributes:
        height: rows after scaling.
        width: columns after scaling.
        top: scaled row that becomes row 0; negative where white rows are added above.
        left: scaled column that becomes column 0; negative likewise.
        rows: rows of the result.
        columns: columns of the result.
    """

    height: int
    width: int
    top: int
    left: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Framing:
    """How a model family prepares its images.

    Attributes:
        multiple: image sides become multiples of this many pixels.
        resolution: the size that `mode` scales to, in pixels, which may be a fraction where it is the root of an
            area; None keeps the images' own size, up to whole multiples.
        mode: ``longest`` (the whole image, longest side at `resolution`), ``area`` (the whole image, at most
            ``resolution ** 2`` pixels), ``crop`` (width at `resolution`, rows beyond it cut off evenly above and
            below), ``pad`` (the whole image, longest side at `resolution`, white bars to a square).

    Raises:
        SceneError: an unknown mode, or a resolution below one multiple.
    """

    multiple: int = 1
    resolution: float | None = None
    mode: str = "longest"

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise SceneError(f"framing mode is {self.mode!r}, wanted one of {', '.join(MODES)}.")
        if self.multiple < 1 or (self.resolution is not None and not self.multiple <= self.resolution < inf):
            raise SceneError(
                f"images cannot have sides that are multiples of {self.multiple} at a resolution of "
                f"{self.resolution}; ask for a resolution of at least one multiple."
            )

    def place(self, height: int, width: int) -> Placement:
        """Tell where an image of `height x width` pixels ends up."""
        return _MODES[self.mode](self, height, width)

    def whole(self, pixels: float) -> int:
        """The nearest multiple to a number of pixels, at least one multiple."""
        return max(1, round(pixels / self.multiple)) * self.multiple

    def whole_below(self, pixels: float) -> int:
        """The largest multiple up to a number of pixels."""
        return int(pixels // self.multiple) * self.multiple


# The factor first and then the product, as upstream's loaders compute it: a side that falls exactly between two
# multiples is rounded by the last bit of it.


def _longest(framing: Framing, height: int, width: int) -> Placement:
    longest = max(height, width)
    target = framing.whole(longest) if framing.resolution is None else framing.whole_below(framing.resolution)
    factor = target / longest
    return _uncut(framing.whole(height * factor), framing.whole(width * factor))


def _area(framing: Framing, height: int, width: int) -> Placement:
    if framing.resolution is None:
        return _uncut(framing.whole(height), framing.whole(width))
    limit = round(framing.resolution**2)
    factor = sqrt(limit / (height * width))
    high, wide = height * factor, width * factor
    rows, columns = framing.whole(high), framing.whole(wide)
    while rows * columns > limit:
        # Shorten the side that is too long for the aspect; one multiple is the least a side can have.
        if columns > framing.multiple and (columns / rows > wide / high or rows == framing.multiple):
            columns -= framing.multiple
        else:
            rows -= framing.multiple
    return _uncut(rows, columns)


def _crop(framing: Framing, height: int, width: int) -> Placement:
    columns = framing.whole(width) if framing.resolution is None else framing.whole_below(framing.resolution)
    scaled = framing.whole(height * (columns / width))
    limit = scaled if framing.resolution is None else columns
    rows = min(scaled, limit)
    return Placement(scaled, columns, (scaled - rows) // 2, 0, rows, columns)


def _pad(framing: Framing, height: int, width: int) -> Placement:
    scaled = _longest(framing, height, width)
    side = max(scaled.rows, scaled.columns)
    return padded(scaled, side, side)


def _uncut(rows: int, columns: int) -> Placement:
    return Placement(rows, columns, 0, 0, rows, columns)


def padded(scaled: Placement, rows: int, columns: int) -> Placement:
    """The same placement with bars to `rows x columns`, evenly on both sides."""
    top, left = (rows - scaled.rows) // 2, (columns - scaled.columns) // 2
    return Placement(scaled.height, scaled.width, scaled.top - top, scaled.left - left, rows, columns)


_MODES: dict[str, Callable[[Framing, int, int], Placement]] = {
    "longest": _longest,
    "area": _area,
    "crop": _crop,
    "pad": _pad,
}
MODES = tuple(_MODES)
