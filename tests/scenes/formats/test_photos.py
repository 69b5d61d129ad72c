"""Plain folders of images: which files are a scene, in which order, and which way up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hess_plugin.exceptions import SceneError
from hess_plugin.scenes import Framing, ImageSet, Scene, read_folder, read_scenes, write_folder
from hess_plugin.scenes.formats.photos import SUFFIXES, natural
from hess_plugin.scenes.images import read_image

MakeScene = Callable[..., Scene]

# What EXIF orientation o says: the stored image is the upright one, moved like this (EXIF 2.3, table of tag 274).
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),  # the camera was turned by a quarter to the right
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


def pixels(seed: int = 0, height: int = 6, width: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def fill(folder: Path, *names: str) -> Path:
    """Images that differ, in files of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        Image.fromarray(pixels(seed)).save(folder / name, format="PNG")
    return folder


def read(folder: Path) -> ImageSet:
    (scene,) = read_scenes(f"images:{folder}")
    assert isinstance(scene, ImageSet)
    return scene


def seeds(scene: ImageSet) -> list[int]:
    """Which of the images of `fill` the scene holds, in its order."""
    made = [torch.from_numpy(pixels(seed)).permute(2, 0, 1).float() / 255 for seed in range(12)]
    return [next(i for i, one in enumerate(made) if torch.equal(one, image)) for image in scene.images]


def test_a_folder_is_a_scene_without_truth_in_natural_order(tmp_path: Path) -> None:
    fill(tmp_path / "trip", "img10.png", "img2.png", "IMG1.PNG", "img02.png", "img2b.png", "IMG11.png")
    scene = read(tmp_path / "trip")
    assert scene.name == "trip" and seeds(scene) == [2, 3, 1, 4, 0, 5]
    assert read_scenes(f"images:{tmp_path / 'trip'}", views=2)[0].views == 2


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=8), unique=True))
def test_any_names_have_one_order(names: list[str]) -> None:
    ordered = sorted(names, key=natural)
    assert ordered == sorted(reversed(names), key=natural) and sorted(ordered) == sorted(names)


@given(st.lists(st.integers(0, 10**12), unique=True), st.sampled_from(["img", "", "IMG_7_", "é٣-"]))
def test_numbers_are_ordered_by_value_with_and_without_zeros(numbers: list[int], front: str) -> None:
    names = [f"{front}{number:0{number % 5}d}.jpg" for number in numbers]
    assert sorted(names, key=natural) == [names[numbers.index(number)] for number in sorted(numbers)]


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_every_kind_of_file_is_read(tmp_path: Path, suffix: str) -> None:
    for seed in range(2):
        options = {"lossless": True} if suffix == ".webp" else {}
        Image.fromarray(pixels(seed)).save(tmp_path / f"{seed}{suffix}", **options)
        (tmp_path / f"{seed}{suffix}").rename(tmp_path / f"{seed}{suffix.upper()}")
    scene = read(tmp_path)
    assert scene.images.shape == (2, 3, 6, 9)
    if suffix not in (".jpg", ".jpeg"):
        assert seeds(scene) == [0, 1]


def test_hidden_files_and_what_is_no_image_are_passed_over(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", ".hidden.png", "b.png", "._b.png")
    for name in ("notes.txt", "video.mp4", "poses.json"):
        (tmp_path / name).write_text("not an image")
    (tmp_path / "c.png").mkdir()
    assert seeds(read(tmp_path)) == [0, 2]


def test_folders_of_folders_are_scenes(tmp_path: Path) -> None:
    for name in ("room10", "room2", ".trash"):
        fill(tmp_path / name, "1.png", "2.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "readme.md").write_text("")
    assert read_scenes(f"images:{tmp_path}").names == ["room2", "room10"]
    (tmp_path / "link").symlink_to(tmp_path / "room2")
    assert read_scenes(f"images:{tmp_path}").names == ["link", "room2", "room10"]


def test_where_one_stands_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fill(tmp_path / "here", "1.png", "2.png"))
    assert read_scenes("images:.").names == ["here"]


def test_no_image_is_opened_before_a_scene_is_asked_for(tmp_path: Path) -> None:
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(b"not a picture")
    found = read_scenes(f"images:{tmp_path}")
    with pytest.raises(SceneError, match=r"Image file .*1\.jpg cannot be decoded"):
        found[0]


@pytest.mark.parametrize("names, sentence", [((), "holds no images, nor does a folder"), (("1.png",), r"only 1\.png")])
def test_too_few_images_are_told(tmp_path: Path, names: tuple[str, ...], sentence: str) -> None:
    folder = fill(tmp_path / "few", *names)
    with pytest.raises(SceneError, match=sentence):
        read_scenes(f"images:{folder}")
    with pytest.raises(SceneError, match=sentence):
        read_scenes(f"images:{tmp_path}")


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    fill(tmp_path, "1.png")
    with pytest.raises(SceneError, match="is not a folder"):
        read_scenes(f"images:{tmp_path / '1.png'}")


# ---------------------------------------------------------------- which way up


def save(path: Path, image: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(np.ascontiguousarray(image)).save(path, exif=exif.tobytes())


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_images_are_turned_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    for seed in range(2):
        save(tmp_path / f"{seed}{suffix}", STORED[orientation](pixels(seed)), orientation)
    assert seeds(read(tmp_path)) == [0, 1]


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    slope = np.broadcast_to(np.linspace(0, 255, 64, dtype=np.uint8)[:, None, None], (64, 32, 3))  # light below
    for name in ("1.jpg", "2.jpg"):
        save(tmp_path / name, STORED[6](slope), 6)
    image = read(tmp_path).images[0]
    assert image.shape == (3, 64, 32) and float(image[:, :8].mean()) < 0.2 < 0.8 < float(image[:, -8:].mean())


def test_images_with_known_cameras_are_left_as_their_cameras_saw_them(make_scene: MakeScene, tmp_path: Path) -> None:
    """Turned pixels would no longer fit the stored intrinsics and pose."""
    folder = write_folder(make_scene(), tmp_path / "made")
    before = read_folder(folder)
    for file in (folder / "images").iterdir():
        save(file, np.array(Image.open(file)), 6)
    assert torch.equal(read_folder(folder).images, before.images)


def test_a_broken_orientation_turns_nothing(tmp_path: Path) -> None:
    for name in ("1.jpg", "2.jpg"):
        Image.fromarray(pixels()).save(tmp_path / name, exif=b"Exif\0\0" + b"nonsense")
    assert torch.equal(read(tmp_path).images[0], read_image(tmp_path / "1.jpg"))


def test_an_orientation_that_does_not_exist_turns_nothing(tmp_path: Path) -> None:
    for seed in range(2):
        save(tmp_path / f"{seed}.png", pixels(seed), 9)
    assert seeds(read(tmp_path)) == [0, 1]


# ---------------------------------------------------------------- kinds of pixels


def test_what_is_transparent_is_laid_on_white(tmp_path: Path) -> None:
    image = np.zeros((1, 3, 4), dtype=np.uint8)  # black below
    image[0, :, 3] = [0, 128, 255]
    Image.fromarray(image).save(tmp_path / "rgba.png")
    assert (read_image(tmp_path / "rgba.png")[:, 0] * 255).round().tolist() == [[255, 127, 0]] * 3
    Image.fromarray(image[..., [0, 3]], mode=None).save(tmp_path / "la.png")
    assert torch.equal(read_image(tmp_path / "la.png"), read_image(tmp_path / "rgba.png"))
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8))
    palette = palette.convert("P")
    palette.save(tmp_path / "p.png", transparency=0)
    assert read_image(tmp_path / "p.png")[0, 0, 0] == 1 and read_image(tmp_path / "p.png")[0, 0, 1] < 1


def test_grey_is_three_times_the_same(tmp_path: Path) -> None:
    grey = pixels()[..., 0].copy()
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert torch.equal(read_image(tmp_path / "grey.png"), torch.from_numpy(grey).float().div(255).expand(3, 6, 9))


def test_a_bomb_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "1.png", "2.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(SceneError, match=r"Image file .*1\.png cannot be decoded \(Image size \(54 pixels\) exceeds"):
        read_scenes(f"images:{tmp_path}")[0]


def test_images_of_different_sizes_get_white_bars(tmp_path: Path) -> None:
    Image.fromarray(pixels(0, 40, 80)).save(tmp_path / "1.png")
    Image.fromarray(pixels(1, 80, 40)).save(tmp_path / "2.png")
    with pytest.raises(SceneError, match=r"2\.png is 80x40, the first image is 40x80"):
        read_scenes(f"images:{tmp_path}")[0]
    scene = read_scenes(f"images:{tmp_path}", framing=Framing(10, 80))[0]
    assert scene.images.shape == (2, 3, 80, 80)
    assert bool((scene.images[0, :, :20] == 1).all()) and bool((scene.images[0, :, 60:] == 1).all())
    assert torch.equal(scene.images[0, :, 20:60], read_image(tmp_path / "1.png"))
    assert torch.equal(scene.images[1, :, :, 20:60], read_image(tmp_path / "2.png"))
    assert bool((scene.images[1, :, :, :20] == 1).all()) and bool((scene.images[1, :, :, 60:] == 1).all())
