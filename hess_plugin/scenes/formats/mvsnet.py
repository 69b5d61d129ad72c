"""MVSNet's layout, in which DTU and other sets for multi-view stereo are passed on.

Test form; the root is one scene or a folder of scenes:

    scan<N>/images/00000000.jpg, scan<N>/cams/00000000_cam.txt, scan<N>/pair.txt
    scan<N>/depth_gt/00000000.pfm                                   optional

Training form, DTU only, light L of 0 to 6:

    Rectified/scan<N>_train/rect_<VVV>_<L>_r5000.png                view VVV counts from 1, all other files from 0
    Cameras/train/00000000_cam.txt, or Cameras/; Cameras/pair.txt
    Depths_raw/scan<N>/depth_map_0000.pfm, depth_visual_0000.png    or Depths/scan<N>_train, of a quarter the size

DTU is in millimetres. Where the root, or the folder given as ``truth``, holds DTU's reference points, they are the
cloud; see `hess_plugin.scenes.formats.dtu`.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hess_plugin.exceptions import SceneError
from hess_plugin.scenes.formats.dtu import TEST_SCANS, read_truth, truth_cloud
from hess_plugin.scenes.formats.mvsnet_files import SCALES, read_camera, read_map, read_pairs
from hess_plugin.scenes.formats.textfiles import scene_folders
from hess_plugin.scenes.images import image_size, read_image
from hess_plugin.scenes.sources import SceneSource, View

OPTIONS = {
    "light": "of the training form, 0 to 6 (3)",
    "scans": "numbers joined by +, or test for the 22 scans of the benchmark (all)",
    "reference": "number of a view: only it and the views that pair.txt matches with it, best first (all views)",
    "sources": "how many of those matched views (all)",
    "scale": "times the image is larger than the map of its intrinsics: 1, 2 or 4 (told by the principal point)",
    "truth": "folder with DTU's Points and ObsMask (the root)",
}
_SCAN = re.compile(r"scan(\d+)(?:_train)?")
_IMAGES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class _Choice:
    """What the options say of a scene's views."""

    light: int
    reference: int | None
    sources: int | None
    scale: int | None


@dataclass(frozen=True)
class _Files:
    """The files of one view; `depth` may not exist."""

    image: Path
    camera: Path
    depth: Path
    mask: Path | None


def find_sources(
    root: Path,
    light: str = "3",
    scans: str = "",
    reference: str = "",
    sources: str = "",
    scale: str = "",
    truth: str = "",
) -> list[SceneSource]:
    """The scans at `root`, by number; folders of another name after them.

    Args:
        root: a folder of either form.
        light: of the training form.
        scans: which scans, ``1+4+9`` or ``test``; empty = all.
        reference: a view; empty = all views.
        sources: how many of the views matched with the reference; empty = all.
        scale: of the intrinsics; empty = found by `read_camera`.
        truth: folder with DTU's reference points; empty = the root, where they may be missing.

    Raises:
        SceneError: when there is no scene, a scan is missing or an option is wrong.
    """
    choice = _Choice(
        _whole("light", light, range(7)),
        _whole("reference", reference) if reference else None,
        _whole("sources", sources, range(1, 1000)) if sources else None,
        _whole("scale", scale, SCALES) if scale else None,
    )
    if choice.sources is not None and choice.reference is None:
        raise SceneError("MVSNet's option sources has no reference; say reference=VIEW, too.")
    folders = _folders(root)
    if scans:
        wanted = _wanted(scans)
        missing = sorted(wanted - {number for number in map(_number, folders) if number is not None})
        if missing:
            raise SceneError(f"Folder {root} has no scan{missing[0]}; restore it or choose others: scans=...")
        folders = [folder for folder in folders if _number(folder) in wanted]
    reference_points = Path(truth).expanduser() if truth else root
    return [_source(root, folder, choice, reference_points, bool(truth)) for folder in folders]


def _folders(root: Path) -> list[Path]:
    rectified = root / "Rectified"
    if rectified.is_dir():
        found = [child for child in rectified.iterdir() if child.is_dir() and _number(child) is not None]
        if not found:
            raise SceneError(f"Folder {rectified} holds no scan<N>_train; unpack the training images there.")
    else:
        found = scene_folders(root, _is_test_form, "images/ and cams/, nor has it Rectified/")
    numbers = {folder: _number(folder) for folder in found}
    return sorted(found, key=lambda folder: (numbers[folder] is None, numbers[folder] or 0, folder.name))


def _is_test_form(folder: Path) -> bool:
    return (folder / "images").is_dir() and (folder / "cams").is_dir()


def _number(folder: Path) -> int | None:
    found = _SCAN.fullmatch(folder.resolve().name)
    return None if found is None else int(found[1])


def _source(root: Path, folder: Path, choice: _Choice, truth: Path, required: bool) -> SceneSource:
    number, points = _number(folder), None
    if number is not None and (required or truth_cloud(truth, number).is_file()):
        points = functools.partial(read_truth, truth, number)
    name = folder.resolve().name if number is None else f"scan{number}"
    return SceneSource(name, folder, functools.partial(_views, root, folder, choice), points)


def _views(root: Path, folder: Path, choice: _Choice) -> list[View]:
    if _is_test_form(folder):
        files, pairs = _test_files(folder), folder / "pair.txt"
    else:
        files, pairs = _training_files(root, folder, choice.light), root / "Cameras" / "pair.txt"
    if choice.reference is not None:
        files = _matched(pairs, files, choice.reference, choice.sources)
    return [_view(view, choice.scale) for view in files.values()]


def _test_files(folder: Path) -> dict[int, _Files]:
    files = {}
    for image in sorted(path for path in (folder / "images").iterdir() if path.suffix.lower() in _IMAGES):
        if not image.stem.isdigit():
            raise SceneError(f"Image file {image} is not named by the number of its view; rename it or remove it.")
        camera, depth = folder / "cams" / f"{image.stem}_cam.txt", folder / "depth_gt" / f"{image.stem}.pfm"
        files[int(image.stem)] = _Files(image, camera, depth, None)
    return files


def _training_files(root: Path, folder: Path, light: int) -> dict[int, _Files]:
    name = re.compile(rf"rect_(\d+)_{light}_r5000\.png")
    found = {int(match[1]) - 1: path for path in folder.iterdir() if (match := name.fullmatch(path.name))}
    if not found:
        raise SceneError(f"Folder {folder} has no image rect_*_{light}_r5000.png of light {light}; choose another.")
    scan = f"scan{_number(folder)}"
    maps = [root / "Depths_raw" / scan, root / "Depths" / scan, root / "Depths" / f"{scan}_train"]
    depths = next((path for path in maps if path.is_dir()), maps[0])
    files = {}
    for view in sorted(found):
        cameras = [root / "Cameras" / middle / f"{view:08d}_cam.txt" for middle in ("train", "")]
        camera = next((path for path in cameras if path.is_file()), cameras[0])
        mask = depths / f"depth_visual_{view:04d}.png"
        files[view] = _Files(found[view], camera, depths / f"depth_map_{view:04d}.pfm", mask)
    return files


def _matched(pairs: Path, files: dict[int, _Files], reference: int, sources: int | None) -> dict[int, _Files]:
    """The reference and the views matched with it, best first, at most `sources` of them."""
    known = read_pairs(pairs)
    if reference not in known:
        raise SceneError(f"Pair file {pairs} has no view {reference}; choose one of its views as reference.")
    chosen = [reference, *known[reference][:sources]]
    missing = [view for view in chosen if view not in files]
    if missing:
        raise SceneError(f"Pair file {pairs} names view {missing[0]}, which has no image; restore it.")
    return {view: files[view] for view in chosen}


def _view(files: _Files, scale: int | None) -> View:
    height, width = image_size(files.image)  # a few bytes: the camera file does not say what its intrinsics are of
    c2w, intrinsics = read_camera(files.camera, height, width, scale)
    depth: functools.partial[Tensor] | None = None
    if files.depth.is_file():
        mask = files.mask if files.mask is not None and files.mask.is_file() else None
        depth = functools.partial(read_map, files.depth, mask, height, width)
    return View(str(files.image), functools.partial(read_image, files.image), c2w, intrinsics, depth)


def _wanted(scans: str) -> set[int]:
    return set(TEST_SCANS) if scans == "test" else {_whole("scans", number) for number in scans.split("+")}


def _whole(option: str, text: str, allowed: range | tuple[int, ...] = range(100_000)) -> int:
    if not text.isdigit() or int(text) not in allowed:
        known = f"{allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) else ", ".join(map(str, allowed))
        raise SceneError(f"MVSNet's option {option} is {text!r}, a whole number was wanted: {known}.")
    return int(text)
