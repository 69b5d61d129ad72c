"""ETH3D's high-resolution multi-view scenes, as they are unpacked.

    <scene>/images/dslr_images/*.JPG                    with lens distortion
    <scene>/dslr_calibration_jpg/                       their COLMAP model, text, THIN_PRISM_FISHEYE
    <scene>/ground_truth_depth/dslr_images/*.JPG        not images: float32, row by row, of the distorted size,
                                                        metres, infinite = not known
    <scene>/images/dslr_images_undistorted/*.JPG        without distortion
    <scene>/dslr_calibration_undistorted/               their COLMAP model, PINHOLE
    <scene>/dslr_scan_eval/scan*.ply, scan_alignment.mlp    laser scans, and where each lies in the world frame

By default the distorted images are read, and undistorted here together with their depth. ``images=undistorted`` reads
the other set; its cameras stand in the same places, so it gets the same depth where the distorted calibration is
there, too. The root is one scene or a folder of scenes.
"""

from __future__ import annotations

import functools
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from hess_plugin.exceptions import SceneError
from hess_plugin.scenes.clouds import read_cloud
from hess_plugin.scenes.formats.colmap import read_undistorted
from hess_plugin.scenes.formats.colmap_model import is_model, registered_images
from hess_plugin.scenes.formats.distortion import Lens, Pinhole, undistort_depth
from hess_plugin.scenes.formats.textfiles import scene_folders, to_numbers, to_pose
from hess_plugin.scenes.sources import SceneSource, View

DISTORTED, UNDISTORTED = "dslr_calibration_jpg", "dslr_calibration_undistorted"
DEPTH = "ground_truth_depth"
ALIGNMENT = "dslr_scan_eval/scan_alignment.mlp"

OPTIONS = {"images": "distorted or undistorted: which set to read (the first that is there)"}


def find_sources(root: Path, images: str = "") -> list[SceneSource]:
    """The scenes at `root`, each named after its folder.

    Args:
        root: a scene or a folder of scenes.
        images: ``distorted`` or ``undistorted``; empty = distorted, where a scene has them.

    Raises:
        SceneError: when there is no scene or the option is wrong.
    """
    known = {"": (DISTORTED, UNDISTORTED), "distorted": (DISTORTED,), "undistorted": (UNDISTORTED,)}
    if images not in known:
        raise SceneError(f"ETH3D's option images is {images!r}, distorted or undistorted was wanted.")
    wanted = known[images]
    sources = []
    for scene in scene_folders(root, lambda folder: _first(folder, wanted) is not None, " or ".join(wanted)):
        model = _first(scene, wanted)
        assert model is not None  # what scene_folders went by
        alignment = scene / ALIGNMENT
        points = functools.partial(read_scans, alignment) if alignment.is_file() else None
        sources.append(SceneSource(scene.resolve().name, scene, functools.partial(_views, scene, model), points))
    return sources


def read_scans(alignment: Path) -> Tensor:
    """The laser scans that a MeshLab project names, in one world frame `[M, 3]` float32, metres.

    Args:
        alignment: the project: a ply file and its scan-to-world matrix for every scan.

    Raises:
        SceneError: when the project or a scan is damaged.
        MissingDependency: when Open3D is not installed.
    """
    try:
        meshes = list(ElementTree.parse(alignment).iter("MLMesh"))
    except (ElementTree.ParseError, OSError) as error:
        raise SceneError(f"Scene file {alignment} is not a MeshLab project ({error}); copy it again.") from error
    if not meshes:
        raise SceneError(f"Scene file {alignment} names no scan (MLMesh); copy it again.")
    clouds = []
    for mesh in meshes:
        name = mesh.get("filename")
        if not name:
            raise SceneError(f"Scene file {alignment}: an MLMesh has no filename; copy it again.")
        field = f"MLMatrix44 of {name}"
        pose = to_pose(alignment, field, to_numbers(alignment, field, (mesh.findtext("MLMatrix44") or "").split(), 16))
        if not (alignment.parent / name).is_file():
            raise SceneError(f"Cloud file {alignment.parent / name} does not exist, {alignment.name} names it.")
        scan = read_cloud(alignment.parent / name).double()
        clouds.append((scan @ pose[:3, :3].T + pose[:3, 3]).to(torch.float32))
    return torch.cat(clouds)


def _first(scene: Path, models: tuple[str, ...]) -> Path | None:
    return next((scene / name for name in models if is_model(scene / name)), None)


def _views(scene: Path, model: Path) -> list[View]:
    # Depth is recorded on the pixels of the distorted cameras, whichever images are read.
    lenses: dict[str, tuple[Path, Lens]] = {}
    if (scene / DEPTH).is_dir() and is_model(scene / DISTORTED):
        for posed in registered_images(scene / DISTORTED):
            lenses[PurePosixPath(posed.name).name] = (scene / DEPTH / posed.name, posed.lens)
    views = []
    for posed in registered_images(model):
        path = scene / "images" / posed.name
        pinhole, depth = posed.lens.pinhole, None
        file, lens = lenses.get(path.name, (None, None))
        if file is not None and lens is not None and file.is_file():
            depth = functools.partial(_depth, file, lens, pinhole)
        read = functools.partial(read_undistorted, path, posed.lens)
        views.append(View(str(path), read, posed.c2w, pinhole.intrinsics, depth))
    return views


def _depth(path: Path, lens: Lens, pinhole: Pinhole) -> Tensor:
    values = np.fromfile(path, dtype="<f4")
    if values.size != lens.height * lens.width or path.stat().st_size != 4 * values.size:
        raise SceneError(
            f"Depth file {path} has {path.stat().st_size} bytes, {lens.height}x{lens.width} float32 (height x width) "
            "were wanted; copy it again."
        )
    depth = torch.from_numpy(values.astype(np.float32)).view(lens.height, lens.width)
    if bool((depth < 0).any()):
        raise SceneError(f"Depth file {path} has negative values; copy it again.")
    return undistort_depth(torch.where(torch.isfinite(depth), depth, 0.0), lens, pinhole)
