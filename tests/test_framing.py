"""Sizes: multiples, limits, aspect, and the rules of the upstream loaders."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hess_plugin.exceptions import SceneError
from hess_plugin.framing import MODES, Framing, Placement, padded

SIDES = st.integers(1, 5000)
MULTIPLES = st.integers(1, 32)


@st.composite
def framings(draw: st.DrawFn, mode: str) -> Framing:
    multiple = draw(MULTIPLES)
    resolution = draw(st.none() | st.integers(multiple, 1200) | st.floats(multiple, 1200))
    return Framing(multiple, resolution, mode)


def exact(framing: Framing, height: int, width: int) -> tuple[float, float]:
    """Height and width that keep the aspect exactly, before any rounding to multiples."""
    if framing.resolution is None:
        if framing.mode == "area":
            return float(height), float(width)
        side = {"longest": max(height, width), "pad": max(height, width), "crop": width}[framing.mode]
        factor = framing.whole(side) / side
    elif framing.mode == "area":
        factor = math.sqrt(round(framing.resolution**2) / (height * width))
    else:
        side = width if framing.mode == "crop" else max(height, width)
        factor = framing.whole_below(framing.resolution) / side
    return height * factor, width * factor


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=300)
@given(data=st.data(), height=SIDES, width=SIDES)
def test_sides_are_multiples_and_the_aspect_is_kept(mode: str, data: st.DataObject, height: int, width: int) -> None:
    framing = data.draw(framings(mode))
    place = framing.place(height, width)
    for side in (place.height, place.width, place.rows, place.columns):
        assert side >= framing.multiple and side % framing.multiple == 0
    high, wide = exact(framing, height, width)
    if min(high, wide) < framing.multiple:
        return  # a side of less than one multiple becomes one: no rule keeps that aspect
    # Rounding moves a side by half a multiple; `area` may then shorten it by one more to stay below its limit.
    reach = framing.multiple * (1 if mode == "area" else 0.5) + 1e-6
    assert abs(place.height - high) <= reach and abs(place.width - wide) <= reach


@settings(max_examples=300)
@given(data=st.data(), height=SIDES, width=SIDES)
def test_limits_are_respected(data: st.DataObject, height: int, width: int) -> None:
    multiple = data.draw(MULTIPLES)
    resolution = data.draw(st.integers(multiple, 1200))
    largest = resolution // multiple * multiple
    longest, area, crop, pad = (Framing(multiple, resolution, mode).place(height, width) for mode in MODES)
    assert max(longest.rows, longest.columns) == largest
    assert area.rows * area.columns <= resolution**2
    assert (area.rows + multiple) * (area.columns + multiple) > resolution**2  # and not shortened without need
    assert crop.columns == largest and crop.rows <= largest
    assert (pad.rows, pad.columns) == (largest, largest)
    assert (pad.height, pad.width) == (longest.height, longest.width)


@settings(max_examples=300)
@given(data=st.data(), mode=st.sampled_from(MODES), height=SIDES, width=SIDES)
def test_what_is_cut_or_added_is_even_on_both_sides(data: st.DataObject, mode: str, height: int, width: int) -> None:
    place = data.draw(framings(mode)).place(height, width)
    over, under = place.height - place.rows - place.top, place.width - place.columns - place.left
    assert abs(over - place.top) <= 1 and abs(under - place.left) <= 1  # below and above, right and left
    if mode == "crop":
        assert place.top >= 0 and over >= 0 and (place.left, place.columns) == (0, place.width)
    elif mode == "pad":
        assert place.top <= 0 and place.left <= 0 and 0 in (place.top, place.left)
    else:
        assert (place.top, place.left, place.rows, place.columns) == (0, 0, place.height, place.width)


@given(data=st.data(), mode=st.sampled_from(["longest", "crop", "pad"]), height=SIDES, width=SIDES)
def test_framing_twice_changes_nothing(data: st.DataObject, mode: str, height: int, width: int) -> None:
    framing = data.draw(framings(mode))
    once = framing.place(height, width)
    again = framing.place(once.rows, once.columns)
    assert again == Placement(once.rows, once.columns, 0, 0, once.rows, once.columns)


@given(
    mode=st.sampled_from(["longest", "area", "crop"]),
    multiple=MULTIPLES,
    rows=st.integers(1, 60),
    columns=st.integers(1, 60),
)
def test_without_a_resolution_whole_multiples_stay(mode: str, multiple: int, rows: int, columns: int) -> None:
    height, width = rows * multiple, columns * multiple
    assert Framing(multiple, None, mode).place(height, width) == Placement(height, width, 0, 0, height, width)


# ---------------------------------------------------------------- upstream's rules, written out


def vggt_rule(height: int, width: int, crop: bool) -> tuple[int, int]:
    """VGGT: scaled height and width at 518; `crop` goes by the width, else by the longest side."""
    if crop or width >= height:
        return round(height * (518 / width) / 14) * 14, 518
    return 518, round(width * (518 / height) / 14) * 14


def pi3_rule(height: int, width: int) -> tuple[int, int]:
    """Pi3: height and width of at most 255 000 pixels, the side that is too long for the aspect cut first."""
    factor = math.sqrt(255_000 / (width * height))
    wide, high = width * factor, height * factor
    columns, rows = round(wide / 14), round(high / 14)
    while columns * 14 * rows * 14 > 255_000:
        if columns / rows > wide / high:
            columns -= 1
        else:
            rows -= 1
    return rows * 14, columns * 14


# Very long images come out below one patch upstream, and fail there.
LIKELY = st.tuples(st.integers(16, 6000), st.integers(16, 6000)).filter(lambda size: max(size) < 16 * min(size))
# Sizes whose exact value lies between two multiples: there the order of operations decides.
TIES = [(678, 452), (1350, 740), (370, 335), (55, 731), (76, 920), (83, 911), (83, 1154)]


@settings(max_examples=1000)
@given(LIKELY | st.sampled_from(TIES))
def test_sizes_are_those_of_upstream(size: tuple[int, int]) -> None:
    crop, pad = Framing(14, 518, "crop").place(*size), Framing(14, 518, "pad").place(*size)
    assert (crop.height, crop.width) == vggt_rule(*size, crop=True)
    assert (crop.rows, crop.top) == (min(crop.height, 518), max(crop.height - 518, 0) // 2)
    assert (pad.height, pad.width) == vggt_rule(*size, crop=False)
    assert (pad.rows, pad.columns) == (518, 518)
    assert (-pad.top, -pad.left) == ((518 - pad.height) // 2, (518 - pad.width) // 2)
    area = Framing(14, 255_000**0.5, "area").place(*size)
    assert (area.rows, area.columns) == pi3_rule(*size)


@pytest.mark.parametrize(
    "mode, size, wanted",
    [
        ("longest", (480, 640), (392, 518)),
        ("longest", (1920, 1080), (518, 294)),
        ("area", (480, 640), (434, 574)),
        ("area", (1080, 1920), (378, 672)),
        ("crop", (480, 640), (392, 518)),
        ("crop", (1920, 1080), (518, 518)),
        ("pad", (480, 640), (518, 518)),
    ],
)
def test_common_photographs(mode: str, size: tuple[int, int], wanted: tuple[int, int]) -> None:
    resolution = 255_000**0.5 if mode == "area" else 518
    place = Framing(14, resolution, mode).place(*size)
    assert (place.rows, place.columns) == wanted


# ---------------------------------------------------------------- the rest


@given(rows=SIDES, columns=SIDES, more=st.tuples(st.integers(0, 99), st.integers(0, 99)))
def test_bars_are_even(rows: int, columns: int, more: tuple[int, int]) -> None:
    place = padded(Placement(rows, columns, 0, 0, rows, columns), rows + more[0], columns + more[1])
    assert (place.height, place.width) == (rows, columns)
    assert (place.top, place.left) == (-(more[0] // 2), -(more[1] // 2))
    assert (place.rows, place.columns) == (rows + more[0], columns + more[1])


@pytest.mark.parametrize("mode", ["", "square", "Longest"])
def test_an_unknown_mode_names_those_there_are(mode: str) -> None:
    with pytest.raises(SceneError, match="wanted one of longest, area, crop, pad"):
        Framing(14, 518, mode)


@pytest.mark.parametrize(
    "multiple, resolution", [(14, 13), (14, 0), (14, -518), (0, None), (-1, 5), (14, math.nan), (14, math.inf)]
)
def test_impossible_sizes_are_refused(multiple: int, resolution: float | None) -> None:
    with pytest.raises(SceneError, match=f"multiples of {multiple} at a resolution of {resolution}"):
        Framing(multiple, resolution)
