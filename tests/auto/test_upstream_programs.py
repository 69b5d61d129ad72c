"""The programs that upstream repositories ship, run as their users run them, with `hess-patch run` before them.

Stand-ins (standins/sitecustomize.py): random weights in small models, no graphics card. Programs and packages are
upstream's own; what is missing on this machine skips the test and is named.
"""

from __future__ import annotations

import filecmp
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Programs = Any  # of conftest.py
HERE = Path(__file__).resolve().parent
SNIPPET = """
import sys
import torch
from vggt.models.vggt import VGGT
from vggt.utils.load_fn import load_and_preprocess_images

model = VGGT.from_pretrained("facebook/VGGT-1B")
images = load_and_preprocess_images(sys.argv[2:])
with torch.no_grad():
    aggregated_tokens_list, ps_idx = model.aggregator(images[None])
    pose_enc = model.camera_head(aggregated_tokens_list)[-1]
    point_map, point_conf = model.point_head(aggregated_tokens_list, images[None], ps_idx)
    predictions = model(images)
torch.save([pose_enc, point_map, predictions["world_points"]], sys.argv[1])
"""


def checkout_with(variable: str, program: str) -> list[Any]:
    """The checkouts that have a program, as cases; a skipped one, with the reason, if none has."""
    places = [Path(path) for path in os.environ.get(variable, "").split(os.pathsep) if path]
    found = [pytest.param(path, id=path.name) for path in places if (path / program).exists()]
    reason = f"{variable} names no checkout that has {program}"
    return found or [pytest.param(None, id="missing", marks=pytest.mark.skip(reason=reason))]


@pytest.fixture
def photographs(programs: Programs) -> Path:
    """Four smooth images of one size."""
    folder = programs.folder / "scene" / "images"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(4):
        coarse = Image.fromarray(generator.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        coarse.resize((320, 240), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def run_twice(programs: Programs, checkout: Path, needs: tuple[str, ...], program: object, *arguments: object) -> str:
    """Run a program alone and patched at sparsity 0, which has to say the same; return what hess-patch said."""
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"the program imports {', '.join(missing)}, not installed here")
    path = os.pathsep.join([str(HERE / "standins"), str(checkout), os.environ.get("PYTHONPATH", "")])
    builders = HERE.parent / "adapters" / "conftest.py"
    variables = {"PYTHONPATH": path.strip(os.pathsep), "HESS_TEST_BUILDERS": str(builders)}
    plain = programs.plain(sys.executable, program, *arguments, variables=variables)
    assert plain.code == 0, plain.error[-2000:]
    keep(programs.folder / "out", programs.folder / "plain")
    dense = programs.patched(sys.executable, program, *arguments, options=("--sparsity", 0), variables=variables)
    assert dense.code == 0 and steady(dense.output) == steady(plain.output) and dense.error == plain.error
    assert different(programs.folder / "out", programs.folder / "plain") == []
    sparse = programs.patched(sys.executable, program, *arguments, options=("--sparsity", 0.6), variables=variables)
    assert sparse.code == 0, sparse.error[-2000:]
    assert different(programs.folder / "out", programs.folder / "plain") != []
    return str(sparse.said[0])


def steady(output: str) -> str:
    """What a program prints, without the seconds in it."""
    return re.sub(r"[\d.e-]+ ?(seconds|s\b)", "seconds", output)


def keep(written: Path, copy: Path) -> None:
    """Set what a program has written aside."""
    written.rename(copy)
    written.mkdir()


def different(first: Path, second: Path) -> list[str]:
    """Files of two folders that are not the same, byte for byte."""
    listed = [
        sorted(str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()) for top in (first, second)
    ]
    names = listed[0]
    assert names and names == listed[1]
    return [name for name in names if not filecmp.cmp(first / name, second / name, shallow=False)]


@pytest.mark.upstream
@pytest.mark.parametrize("checkout", checkout_with("HESS_TEST_VGGT", "vggt"))
def test_the_snippet_of_vggts_readme(programs: Programs, photographs: Path, checkout: Path) -> None:
    """Parts of the model called one by one, then the whole model."""
    (programs.folder / "out").mkdir()
    program = programs.write("snippet.py", SNIPPET)
    images = sorted(photographs.iterdir())
    said = run_twice(programs, checkout, ("torchvision", "einops"), program, "out/predictions.pt", *images)
    assert "(adapter vggt, 2 sites): 2 forwards, measured sparsity 0.6000 (0.6 asked for)" in said


@pytest.mark.upstream
@pytest.mark.parametrize("checkout", checkout_with("HESS_TEST_VGGT", "demo_colmap.py"))
def test_vggts_demo_colmap(programs: Programs, photographs: Path, checkout: Path) -> None:
    """Weights by load_state_dict, the aggregator called by itself, a COLMAP model written."""
    import pycolmap

    if not pycolmap.__version__.startswith("3.10"):
        pytest.skip(f"upstream writes COLMAP models with pycolmap 3.10, this one is {pycolmap.__version__}")
    out = programs.folder / "out"
    out.mkdir()
    (programs.folder / "scene" / "sparse").symlink_to(out)
    needs = ("torchvision", "trimesh", "hydra", "einops")
    arguments = ("--scene_dir", "scene", "--conf_thres_value", 0)
    said = run_twice(programs, checkout, needs, checkout / "demo_colmap.py", *arguments)
    assert "VGGT" in said or "Small" in said
    assert "(adapter vggt, 2 sites): 1 forward, measured sparsity 0.6000" in said


@pytest.mark.upstream
@pytest.mark.parametrize("checkout", checkout_with("HESS_TEST_PI3", "example.py"))
def test_pi3s_example(programs: Programs, photographs: Path, checkout: Path) -> None:
    (programs.folder / "out").mkdir()
    arguments = ("--device", "cpu", "--data_path", photographs, "--save_path", "out/points.ply")
    said = run_twice(programs, checkout, ("torchvision", "cv2", "plyfile"), checkout / "example.py", *arguments)
    assert "(adapter pi3, 2 sites): 1 forward, measured sparsity 0.6000" in said


@pytest.mark.slow
@pytest.mark.upstream
@pytest.mark.parametrize("checkout", checkout_with("HESS_TEST_PI3", "example_mm.py"))
def test_pi3xs_example_with_poses(programs: Programs, photographs: Path, checkout: Path) -> None:
    """Known poses add attention across views inside the model, which is no site and stays as it is."""
    (programs.folder / "out").mkdir()
    views = len(list(photographs.iterdir()))
    poses = np.tile(np.eye(4, dtype=np.float32), (views, 1, 1))
    poses[:, 0, 3] = np.arange(views)
    matrix = np.array([[300, 0, 160], [0, 300, 120], [0, 0, 1]], dtype=np.float32)
    conditions = programs.folder / "conditions.npz"
    np.savez(
        conditions,
        poses=poses,
        depths=np.ones((views, 240, 320), dtype=np.float32),
        intrinsics=np.tile(matrix, (views, 1, 1)),
    )
    arguments = ("--device", "cpu", "--data_path", photographs, "--save_path", "out/points.ply")
    needs = ("torchvision", "cv2", "plyfile")
    said = run_twice(programs, checkout, needs, checkout / "example_mm.py", *arguments)
    assert "(adapter pi3, 2 sites): 1 forward, measured sparsity 0.6000" in said


DA3_SNIPPET = """
import sys
import numpy
from depth_anything_3.api import DepthAnything3

model = DepthAnything3.from_pretrained("depth-anything/DA3-SMALL").to("cpu")
prediction = model.inference(sys.argv[2:], process_res=280)
numpy.savez(sys.argv[1], depth=prediction.depth, extrinsics=prediction.extrinsics)
"""
DA3_NEEDS = ("torchvision", "moviepy", "cv2", "omegaconf", "addict", "imageio", "trimesh")


@pytest.mark.upstream
@pytest.mark.parametrize("checkout", checkout_with("HESS_TEST_DA3", "depth_anything_3"))
def test_the_snippet_of_da3s_readme(programs: Programs, photographs: Path, checkout: Path) -> None:
    """The released small configuration at its own size; the reference view is chosen by content."""
    (programs.folder / "out").mkdir()
    program = programs.write("snippet.py", DA3_SNIPPET)
    said = run_twice(programs, checkout, DA3_NEEDS, program, "out/p.npz", *sorted(photographs.iterdir()))
    assert "(adapter da3, 4 sites): 1 forward, measured sparsity 0.6000" in said


@pytest.mark.slow
@pytest.mark.upstream
@pytest.mark.parametrize("checkout", checkout_with("HESS_TEST_DA3", "depth_anything_3"))
def test_the_command_of_da3(programs: Programs, photographs: Path, checkout: Path) -> None:
    """The command that the package installs; its `da3 images` ends in a NameError of its own (0.1.1)."""
    (programs.folder / "out").mkdir()
    program = programs.write("da3", "from depth_anything_3.cli import app\napp()\n")
    arguments = ("auto", photographs, "--export-dir", "out", "--device", "cpu", "--process-res", 280)
    more = ("--export-format", "mini_npz", "--model-dir", "depth-anything/DA3-SMALL", "--auto-cleanup")
    needs = (*DA3_NEEDS, "typer", "fastapi", "uvicorn")
    said = run_twice(programs, checkout, needs, program, *arguments, *more)
    assert "(adapter da3, 4 sites): 1 forward, measured sparsity 0.6000" in said
