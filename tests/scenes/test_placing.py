"""Framing real tensors: images, cameras and depth move together, and as the upstream loaders move them."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from hess_plugin.framing import MODES, Framing, Placement
from hess_plugin.geometry import project, quaternion_to_matrix
from hess_plugin.scenes import ImageSet, Scene, SceneSource, View, read_scenes
from hess_plugin.scenes.placing import place


def position_image(height: int, width: int) -> Tensor:
    """An image `[3, H, W]` whose red tells the column and whose green the row: 0 at the left (upper) edge, 1 right."""
    columns, rows = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    return torch.stack([columns.expand(height, width), rows[:, None].expand(height, width), torch.zeros(height, width)])


def numbered_depth(height: int, width: int) -> Tensor:
    """Depth `[H, W]` that is another number in every pixel."""
    return 1 + torch.arange(height * width, dtype=torch.float32).view(height, width)


def camera(height: int, width: int, seed: int) -> Tensor:
    """Intrinsics `[3, 3]` with skew and a centre of their own."""
    a, b, c, d, e = torch.rand(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    rows = [[width * (0.5 + a), e, width * b], [0, height * (0.5 + c), height * d], [0, 0, 1]]
    return torch.tensor(rows, dtype=torch.float64)


def origin(pixel: Tensor, offset: int, side: int, scaled: int) -> Tensor:
    """The column of an image `side` wide that is seen at a column of the result: counted from the left edges."""
    return (pixel.double() + offset + 0.5) * side / scaled - 0.5


def inside(place: Placement, margin: int = 0) -> tuple[Tensor, Tensor]:
    """Which columns and rows of the result show the image, `margin` pixels away from its edges."""
    columns, rows = torch.arange(place.columns) + place.left, torch.arange(place.rows) + place.top
    return (
        (columns >= margin) & (columns < place.width - margin),
        (rows >= margin) & (rows < place.height - margin),
    )


SHAPES = st.tuples(st.integers(8, 90), st.integers(8, 90))
FRAMINGS = st.builds(
    lambda multiple, more, mode: Framing(multiple, None if more is None else multiple + more, mode),
    st.integers(1, 14),
    st.none() | st.integers(0, 90),
    st.sampled_from(MODES),
)


@settings(max_examples=150, deadline=None)
@given(shape=SHAPES, framing=FRAMINGS, seed=st.integers(0, 1000))
def test_a_world_point_stays_on_the_same_spot_of_the_image(shape: tuple[int, int], framing: Framing, seed: int) -> None:
    """Intrinsics, against positions counted by hand."""
    placement, before = framing.place(*shape), camera(*shape, seed)
    _, after, _ = place(placement, torch.zeros(1, 3, *shape), before[None], None)
    rng = torch.Generator().manual_seed(seed)
    c2w = torch.eye(4, dtype=torch.float64)
    c2w[:3, :3] = quaternion_to_matrix(torch.randn(4, generator=rng, dtype=torch.float64))
    c2w[:3, 3] = torch.randn(3, generator=rng, dtype=torch.float64)
    points = torch.randn(1, 20, 3, generator=rng, dtype=torch.float64) * 0.2 + c2w[:3, 3] + 2 * c2w[:3, 2]
    old, _ = project(points, before[None], c2w[None])
    new, _ = project(points, after, c2w[None])
    u = origin(new[..., 0], placement.left, shape[1], placement.width)
    v = origin(new[..., 1], placement.top, shape[0], placement.height)
    torch.testing.assert_close(torch.stack([u, v], -1), old, atol=1e-8, rtol=1e-9)


@settings(max_examples=150, deadline=None)
@given(shape=SHAPES, framing=FRAMINGS)
def test_every_pixel_shows_what_its_camera_says(shape: tuple[int, int], framing: Framing) -> None:
    """Image content against intrinsics: the ray of a pixel leads to the place in the old image that it shows."""
    placement, before = framing.place(*shape), camera(*shape, 5)
    images, after, _ = place(placement, position_image(*shape)[None], before[None], None)
    assert images.shape == (1, 3, placement.rows, placement.columns)
    # The filter reaches two pixels of the smaller image, and there is nothing beyond the edge to weigh.
    grow = max(1.0, placement.height / shape[0], placement.width / shape[1])
    columns, rows = inside(placement, margin=int(3 * grow) + 1)
    v, u = torch.meshgrid(rows.nonzero()[:, 0], columns.nonzero()[:, 0], indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], -1).double()
    old = pixels @ torch.linalg.inv(after[0]).T @ before.T
    for axis, (side, scaled) in enumerate([(shape[1], placement.width), (shape[0], placement.height)]):
        shown = images[0, axis, v, u].double() * side - 0.5
        # Scaled down, the filter's samples leave a ripple of 0.021 pixels of the result at most.
        torch.testing.assert_close(shown, old[..., axis], atol=0.025 * max(1.0, side / scaled), rtol=0)


@settings(max_examples=150, deadline=None)
@given(shape=SHAPES, framing=FRAMINGS)
def test_depth_is_that_of_the_nearest_pixel(shape: tuple[int, int], framing: Framing) -> None:
    placement, depth = framing.place(*shape), numbered_depth(*shape)
    _, _, moved = place(placement, torch.zeros(1, 3, *shape), torch.eye(3)[None], depth[None])
    assert moved is not None and moved.shape == (1, placement.rows, placement.columns)
    u = origin(torch.arange(placement.columns), placement.left, shape[1], placement.width)
    v = origin(torch.arange(placement.rows), placement.top, shape[0], placement.height)
    columns, rows = inside(placement)
    number = moved[0][rows][:, columns].long() - 1
    assert bool((number >= 0).all())
    assert float((number % shape[1] - u[columns]).abs().max()) <= 0.5 + 1e-4
    assert float((number // shape[1] - v[rows][:, None]).abs().max()) <= 0.5 + 1e-4


@settings(max_examples=150, deadline=None)
@given(shape=SHAPES, framing=FRAMINGS)
def test_bars_are_white_and_their_depth_is_not_known(shape: tuple[int, int], framing: Framing) -> None:
    placement = framing.place(*shape)
    images, _, depth = place(placement, torch.full((1, 3, *shape), 0.25), torch.eye(3)[None], torch.ones(1, *shape))
    columns, rows = inside(placement)
    image = rows[:, None] & columns
    assert depth is not None
    assert torch.equal(depth[0] == 1, image) and torch.equal(depth[0] == 0, ~image)
    assert bool((images[0, :, ~image] == 1).all())
    torch.testing.assert_close(images[0, :, image], torch.full_like(images[0, :, image], 0.25))
    if framing.mode != "pad":
        assert bool(image.all())


def test_what_has_its_size_already_is_untouched() -> None:
    image, depth, intrinsics = torch.rand(1, 3, 28, 42), torch.rand(1, 28, 42), camera(28, 42, 1)[None]
    for mode in ("longest", "crop"):
        moved = place(Framing(14, 42, mode).place(28, 42), image, intrinsics, depth)
        assert all(torch.equal(a, b) for a, b in zip((image, intrinsics, depth), moved, strict=True) if b is not None)


def test_sharp_edges_stay_within_range() -> None:
    """A bicubic filter overshoots at edges, and a scene's images lie in [0, 1]."""
    image = torch.zeros(1, 3, 40, 40)
    image[..., 20:] = 1
    moved, _, _ = place(Framing(14, 70).place(40, 40), image, torch.eye(3)[None], None)
    assert float(moved.min()) == 0 and float(moved.max()) == 1


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, more=st.tuples(st.integers(-60, 60), st.integers(-60, 60)), seed=st.integers(0, 99))
def test_images_are_scaled_as_pillow_scales_them(shape: tuple[int, int], more: tuple[int, int], seed: int) -> None:
    """Black and white, where overshoot is largest; but for Pillow's rounding to 8 bits after each axis."""
    if min(more) < 0:  # Pillow 13 changed which axis is first where the height shrinks more: one axis at a time
        more = (more[0], 0) if seed % 2 else (0, more[1])
    size = (max(4, shape[0] + more[0]), max(4, shape[1] + more[1]))
    pixels = 255 * np.random.default_rng(seed).integers(0, 2, (*shape, 3), dtype=np.uint8)
    wanted = np.array(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    scaled, _, _ = place(Placement(*size, 0, 0, *size), image, torch.eye(3)[None], None)
    difference = scaled[0].permute(1, 2, 0) * 255 - torch.from_numpy(wanted)
    assert float(difference.abs().max()) < 2


# ---------------------------------------------------------------- sequences of several sizes


def source_of(shapes: list[tuple[int, int]], depth: bool = True) -> SceneSource:
    """Cameras at one place, each with an image of its own size."""
    views = [
        View(
            f"{i}",
            lambda shape=shape: position_image(*shape),  # type: ignore[misc]
            torch.eye(4, dtype=torch.float64),
            camera(*shape, i),
            (lambda shape=shape: numbered_depth(*shape)) if depth else None,  # type: ignore[misc]
        )
        for i, shape in enumerate(shapes)
    ]
    return SceneSource("mixed", Path("/mixed"), lambda: views)


@settings(max_examples=60, deadline=None)
@given(shapes=st.lists(SHAPES, min_size=1, max_size=4), framing=FRAMINGS)
def test_a_sequence_of_several_sizes_gets_bars(shapes: list[tuple[int, int]], framing: Framing) -> None:
    scene = source_of(shapes).read(framing=framing)
    assert isinstance(scene, Scene) and scene.depth is not None
    each = [framing.place(*shape) for shape in shapes]
    size = (max(place.rows for place in each), max(place.columns for place in each))
    assert (scene.height, scene.width) == size
    for view, (shape, placement) in enumerate(zip(shapes, each, strict=True)):
        top, left = (size[0] - placement.rows) // 2, (size[1] - placement.columns) // 2
        alone, moved, depth = place(
            placement, position_image(*shape)[None], camera(*shape, view)[None], numbered_depth(*shape)[None]
        )
        box = (slice(top, top + placement.rows), slice(left, left + placement.columns))
        assert depth is not None and torch.equal(scene.images[view][(slice(None), *box)], alone[0])
        assert torch.equal(scene.depth[view][box], depth[0])
        moved[0, 0, 2] += left
        moved[0, 1, 2] += top
        torch.testing.assert_close(scene.intrinsics[view], moved[0])
        bars = torch.ones(size, dtype=torch.bool)
        bars[box] = False
        assert bool((scene.images[view][:, bars] == 1).all()) and bool((scene.depth[view][bars] == 0).all())


def test_points_are_seen_where_the_image_shows_them_in_a_mixed_sequence() -> None:
    """The whole way at once: size, bars, camera and depth of an upright and a wide image."""
    scene = source_of([(90, 40), (40, 90), (64, 64)]).read(framing=Framing(8, 48))
    assert isinstance(scene, Scene)
    known = scene.world_points()
    assert known is not None and scene.depth is not None
    for view, (height, width) in enumerate([(90, 40), (40, 90), (64, 64)]):
        points = known[0][view][known[1][view]].double()
        seen, z = project(points[None], camera(height, width, view)[None], scene.c2w[view : view + 1])
        number = z[0].round().long() - 1  # the depth of a pixel is its number, so it says where the point was
        assert float((seen[0, :, 0] - number % width).abs().max()) <= 0.5 + 1e-3
        assert float((seen[0, :, 1] - number // width).abs().max()) <= 0.5 + 1e-3


def test_views_without_depth_have_none_known_in_a_mixed_sequence() -> None:
    assert source_of([(20, 30), (30, 20)], depth=False).read(framing=Framing(10)).depth is None  # type: ignore[union-attr]


# ---------------------------------------------------------------- upstream's own loaders


def upstream_module(package: str, variable: str, file: str) -> Any:
    """One file of an upstream checkout as a module; skips the test where there is none."""
    places = [Path(path) for path in os.environ.get(variable, "").split(os.pathsep) if path]
    if not places and (spec := importlib.util.find_spec(package)) is not None:
        places = [Path(path).parent for path in spec.submodule_search_locations or []]
    if not places:
        pytest.skip(f"no upstream code: `{package}` is not importable and {variable} names no checkout")
    spec = importlib.util.spec_from_file_location(f"upstream_{package}", places[0] / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What upstream's loaders import and this project does not need, where it is not installed."""

    class ToTensor:
        def __call__(self, image: Image.Image) -> Tensor:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # the latter where it was built for another torch
        transforms = types.ModuleType("torchvision.transforms")
        transforms.ToTensor = ToTensor  # type: ignore[attr-defined]
        vision = types.ModuleType("torchvision")
        vision.transforms = transforms  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torchvision", vision)
        monkeypatch.setitem(sys.modules, "torchvision.transforms", transforms)
    for name, parts in {"cv2": (), "plyfile": ("PlyData", "PlyElement")}.items():
        if importlib.util.find_spec(name) is None:
            module = types.ModuleType(name)
            for part in parts:
                setattr(module, part, None)
            monkeypatch.setitem(sys.modules, name, module)


Write = Callable[..., list[Path]]


@pytest.fixture
def photographs(tmp_path: Path) -> Write:
    """Files of smooth random pictures with sharp edges in them."""

    def write(*shapes: tuple[int, int], mode: str = "RGB") -> list[Path]:
        files = []
        for i, (height, width) in enumerate(shapes):
            rng = np.random.default_rng(i)
            small = Image.fromarray(rng.integers(0, 256, (9, 7, len(mode)), dtype=np.uint8))
            picture = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
            picture[height // 3 : height // 2, width // 4 : width // 2] = 255 * (i % 2)
            files.append(tmp_path / f"{i}.png")
            Image.fromarray(picture).save(files[-1])
        return files

    return write


UPSTREAM_SHAPES = {
    "wide": [(480, 640), (480, 640)],
    "upright": [(640, 360), (640, 360)],
    "panorama": [(180, 1200), (180, 1200)],
    "network size": [(392, 518), (392, 518)],
    "small": [(60, 75), (60, 75)],
    "large": [(1080, 1920), (1080, 1920)],
    "a tie": [(678, 452), (678, 452)],
    "mixed": [(480, 640), (640, 480), (300, 301)],
}


@pytest.mark.upstream
@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("case", UPSTREAM_SHAPES)
def test_images_reach_vggt_as_by_its_own_loader(
    photographs: Write, stand_ins: None, tmp_path: Path, mode: str, case: str
) -> None:
    loader = upstream_module("vggt", "HESS_TEST_VGGT", "vggt/utils/load_fn.py")
    files = photographs(*UPSTREAM_SHAPES[case])
    wanted = loader.load_and_preprocess_images([str(file) for file in files], mode=mode)
    compare(read_scenes(f"images:{tmp_path}", framing=Framing(14, 518, mode))[0], wanted)


@pytest.mark.upstream
def test_transparent_images_reach_vggt_as_by_its_own_loader(
    photographs: Write, stand_ins: None, tmp_path: Path
) -> None:
    loader = upstream_module("vggt", "HESS_TEST_VGGT", "vggt/utils/load_fn.py")
    files = photographs((300, 400), (300, 400), mode="RGBA")
    wanted = loader.load_and_preprocess_images([str(file) for file in files], mode="crop")
    compare(read_scenes(f"images:{tmp_path}", framing=Framing(14, 518, "crop"))[0], wanted)


def compare(scene: Scene | ImageSet, wanted: Tensor) -> None:
    """The same picture but for upstream's rounding to 8 bits after each of two passes."""
    assert scene.images.shape == wanted.shape
    difference = (scene.images - wanted).abs()
    assert float(difference.max()) <= 2.01 / 255 and float(difference.mean()) < 0.5 / 255


@pytest.mark.upstream
@pytest.mark.parametrize("case", [case for case in UPSTREAM_SHAPES if case != "mixed"])
def test_images_reach_pi3_in_the_size_of_its_own_loader(
    photographs: Write, stand_ins: None, tmp_path: Path, case: str
) -> None:
    loader = upstream_module("pi3", "HESS_TEST_PI3", "pi3/utils/basic.py")
    photographs(*UPSTREAM_SHAPES[case])
    wanted = loader.load_images_as_tensor(str(tmp_path), verbose=False)
    scene = read_scenes(f"images:{tmp_path}", framing=Framing(14, 255_000**0.5, "area"))[0]
    assert scene.images.shape == wanted.shape
    # Upstream scales with another filter (Lanczos): the same picture, not the same pixels.
    assert float((scene.images - wanted).abs().mean()) < 1 / 255
