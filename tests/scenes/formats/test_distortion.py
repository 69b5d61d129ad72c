from __future__ import annotations

import sys
import types

import numpy as np
import pycolmap
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hess_plugin.exceptions import MissingDependency, SceneError
from hess_plugin.scenes.formats.distortion import Lens, Pinhole, undistort_depth, undistort_image

LENSES = {
    "SIMPLE_RADIAL": (50.0, 30.0, 22.0, 0.1),
    "RADIAL": (50.0, 30.0, 22.0, -0.1, 0.02),
    "OPENCV": (52.0, 51.0, 31.0, 22.5, -0.2, 0.05, 0.001, -0.002),
    "FULL_OPENCV": (51.7, 51.6, 31.9, 25.5, 0.26, -0.95, -0.005, 0.003, 1.16, 0.0, 0.0, 0.0),
    "OPENCV_FISHEYE": (50.0, 50.1, 32.0, 24.0, -0.02, 0.01, 0.002, -0.001),
    "THIN_PRISM_FISHEYE": (50.0, 50.1, 32.0, 24.0, -0.02, 0.01, 0.001, 0.001, 0.002, -0.001, 0.003, -0.003),
    "FOV": (50.0, 50.0, 32.0, 24.0, 0.5),
    "EUCM": (50.0, 50.0, 32.0, 24.0, 0.5, 1.1),
    "DIVISION": (50.0, 50.0, 32.0, 24.0, 0.1),
    "SIMPLE_FISHEYE": (50.0, 32.0, 24.0),
}


def random_image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("model", LENSES)
def test_images_are_those_of_colmap(model: str) -> None:
    """Size, intrinsics and every pixel, up to the rounding of COLMAP's 8 bits."""
    lens = Lens(model, 64, 48, LENSES[model])
    pixels = (255 * random_image(48, 64)).to(torch.uint8)
    camera = pycolmap.Camera(model=model, width=64, height=48, params=LENSES[model])
    bitmap, pinhole = pycolmap.undistort_image(
        pycolmap.UndistortCameraOptions(), pycolmap.Bitmap.from_array(pixels.permute(1, 2, 0).numpy()), camera
    )
    ours, theirs = undistort_image(pixels.float(), lens).permute(1, 2, 0).numpy(), bitmap.to_array().astype(np.float32)
    assert ours.shape == theirs.shape == (lens.pinhole.height, lens.pinhole.width, 3)
    k = lens.pinhole.intrinsics.numpy()
    k[:2, 2] += 0.5
    np.testing.assert_allclose(k, pinhole.calibration_matrix(), atol=1e-9)
    # COLMAP leaves black what lies outside the centres of the outermost pixels; here they reach half a pixel further.
    black = (theirs == 0).all(-1)
    assert black.mean() < 0.1 and np.abs(ours - theirs)[~black].max() < 0.51


@pytest.mark.parametrize(
    "model, params", [("PINHOLE", (50.0, 51.0, 30.2, 22.1)), ("SIMPLE_PINHOLE", (50.0, 32.0, 24.0))]
)
def test_a_pinhole_camera_is_left_alone(model: str, params: tuple[float, ...]) -> None:
    lens = Lens(model, 64, 48, params)
    image, depth = random_image(48, 64), random_image(48, 64)[0]
    assert undistort_image(image, lens) is image and undistort_depth(depth, lens) is depth
    fx, fy, cx, cy = params if len(params) == 4 else (params[0], *params)
    assert lens.pinhole == Pinhole(64, 48, fx, fy, cx - 0.5, cy - 0.5)


def test_no_distortion_at_all_is_a_pinhole_camera_too() -> None:
    lens = Lens("OPENCV", 64, 48, (50.0, 51.0, 30.2, 22.1, 0.0, 0.0, 0.0, 0.0))
    image = random_image(48, 64)
    assert undistort_image(image, lens) is image
    wider = Pinhole(80, 60, 50.0, 51.0, 37.7, 27.6)  # eight and six pixels more around the same camera
    torch.testing.assert_close(undistort_image(image, lens, wider)[:, 6:54, 8:72], image, atol=1e-5, rtol=0)


def brute_force(image: np.ndarray, lens: Lens, pinhole: Pinhole, nearest: bool) -> np.ndarray:
    camera = pycolmap.Camera(model=lens.model, width=lens.width, height=lens.height, params=lens.params)
    result = np.zeros((pinhole.height, pinhole.width))
    for row in range(pinhole.height):
        for column in range(pinhole.width):
            ray = np.array([(column - pinhole.cx) / pinhole.fx, (row - pinhole.cy) / pinhole.fy, 1.0])
            pixel = camera.img_from_cam(ray)
            if pixel is None or not (0 <= pixel[0] < lens.width and 0 <= pixel[1] < lens.height):
                continue
            if nearest:  # corner-origin pixels: the one the point lies in
                result[row, column] = image[int(pixel[1]), int(pixel[0])]
                continue
            for y in range(lens.height):
                for x in range(lens.width):
                    # A pixel's share falls to 0 at its neighbours' centres; the border is as its outermost centres.
                    u = min(max(pixel[0], 0.5), lens.width - 0.5)
                    v = min(max(pixel[1], 0.5), lens.height - 0.5)
                    share = max(0.0, 1 - abs(u - x - 0.5)) * max(0.0, 1 - abs(v - y - 0.5))
                    result[row, column] += share * image[y, x]
    return result


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_pixel_is_that_of_the_twin(data: st.DataObject) -> None:
    width, height = data.draw(st.integers(2, 8)), data.draw(st.integers(2, 8))
    focal = data.draw(st.floats(3, 12))
    bend = [data.draw(st.floats(-0.1, 0.1)) for _ in range(4)]
    model = data.draw(st.sampled_from(["OPENCV", "OPENCV_FISHEYE"]))
    lens = Lens(model, width, height, (focal, focal * 1.1, width / 2 + 0.2, height / 2 - 0.3, *bend))
    pinhole = Pinhole(
        data.draw(st.integers(1, 9)),
        data.draw(st.integers(1, 9)),
        0.8 * focal,
        0.9 * focal,
        data.draw(st.floats(0, 9)),
        3.0,
    )
    image = random_image(height, width, data.draw(st.integers(0, 99)))[:1]
    np.testing.assert_allclose(
        undistort_image(image, lens, pinhole)[0].numpy(), brute_force(image[0].numpy(), lens, pinhole, False), atol=1e-6
    )
    depth = torch.arange(1.0, height * width + 1).view(height, width)
    assert (undistort_depth(depth, lens, pinhole).numpy() == brute_force(depth.numpy(), lens, pinhole, True)).all()


def test_more_rows_than_are_mapped_at_a_time() -> None:
    lens = Lens("SIMPLE_RADIAL", 4, 700, (400.0, 2.0, 350.0, 0.05))
    image, depth = random_image(700, 4)[:1], torch.arange(1.0, 2801).view(700, 4)
    assert lens.pinhole.height > 600
    rows = torch.tensor([0, 255, 256, 511, 512, lens.pinhole.height - 1])
    for row in rows.tolist():
        p = lens.pinhole
        line = Pinhole(p.width, 1, p.fx, p.fy, p.cx, p.cy - row)
        assert torch.equal(undistort_depth(depth, lens)[row], undistort_depth(depth, lens, line)[0])
        torch.testing.assert_close(undistort_image(image, lens)[:, row], undistort_image(image, lens, line)[:, 0])


@pytest.mark.parametrize(
    "lens, sentence",
    [
        (Lens("OPENCVX", 64, 48, (1.0,)), "Camera model 'OPENCVX' is not one that COLMAP knows"),
        (Lens("INVALID", 64, 48, ()), "Camera model 'INVALID' is not one"),
        (Lens("OPENCV", 64, 48, (50.0, 50.0)), "64x48 with 2 parameters, wanted are a size and finite fx, fy"),
        (Lens("PINHOLE", 64, 48, (50.0, float("nan"), 1.0, 1.0)), "finite fx, fy, cx, cy"),
        (Lens("PINHOLE", 0, 48, (50.0, 50.0, 1.0, 1.0)), "is 0x48 with 4 parameters"),
        (Lens("EQUIRECTANGULAR", 64, 48, (64.0, 48.0)), "EQUIRECTANGULAR has no pinhole image"),
    ],
)
def test_a_camera_that_cannot_be_is_named(lens: Lens, sentence: str) -> None:
    with pytest.raises(SceneError, match=sentence):
        _ = lens.pinhole


def test_an_image_of_another_size_is_refused() -> None:
    lens = Lens("SIMPLE_RADIAL", 64, 48, LENSES["SIMPLE_RADIAL"])
    with pytest.raises(SceneError, match="The image is 48x63, its camera 48x64"):
        undistort_image(random_image(48, 63), lens)
    with pytest.raises(SceneError, match="The depth is 47x64, its camera 48x64"):
        undistort_depth(random_image(47, 64)[0], lens)


@pytest.mark.parametrize("module", [None, types.SimpleNamespace(__version__="3.10.0")], ids=["none", "old"])
def test_a_missing_pycolmap_is_named(monkeypatch: pytest.MonkeyPatch, module: object) -> None:
    monkeypatch.setitem(sys.modules, "pycolmap", module)
    sentence = "needs pycolmap: pip install" if module is None else "needs pycolmap 4.2, 3.10.0 is installed"
    with pytest.raises(MissingDependency, match=sentence):
        _ = Lens("FOV", 8, 8, (50.0, 50.0, 4.0, 4.0, 0.123)).pinhole
