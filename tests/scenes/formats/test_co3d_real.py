"""CO3D on real records, real images and files of the official writer; skipped where the samples are missing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d

from hess_plugin.calibration.neighbours import CloudIndex
from hess_plugin.scenes import Framing, Scene, View, read_scenes
from hess_plugin.scenes.formats.co3d_frames import Frame
from hess_plugin.scenes.images import read_image

HALF = 7
PAIRS = ((0, 1), (2, 3), (4, 5), (8, 9))


@pytest.fixture(scope="session")
def co3d(samples: Path) -> Path:
    if not (samples / "co3d").is_dir():
        pytest.skip(f"no folder co3d in {samples}: set HESS_TEST_SAMPLES to a folder that has one")
    return samples / "co3d"


# ---------------------------------------------------------------- files of the official writer


def test_files_of_the_official_writer_give_the_scenes_they_were_made_of(co3d: Path, real_scenes: Path) -> None:
    """Both intrinsics formats, depth with a scale, point clouds: against the scenes they were written from."""
    made = {"kitchen/100_1000_1001": "redkitchen-a", "kitchen/100_1000_1002": "redkitchen-d"}
    made["apple/200_2000_2001"] = "co3d-apple"
    found = read_scenes(f"co3d:{co3d / 'co3dv2_layout'},split=all,frames=1")
    truths = read_scenes(f"folder:{real_scenes}")
    assert set(found.names) == set(made)
    for i, name in enumerate(found.names):
        scene, truth = found[i], truths[truths.names.index(made[name])]
        assert isinstance(scene, Scene) and isinstance(truth, Scene)
        part = truth.subset(range(0, 2 * scene.views, 2))
        torch.testing.assert_close(scene.c2w, part.c2w, atol=1e-12, rtol=0)
        torch.testing.assert_close(scene.intrinsics, part.intrinsics, atol=1e-10, rtol=0)
        assert torch.equal(scene.images, part.images)
        if part.depth is None:
            assert scene.depth is None and scene.points is None
            continue
        assert scene.depth is not None and scene.points is not None and part.points is not None
        torch.testing.assert_close(scene.depth, part.depth, atol=2e-3, rtol=0)
        assert torch.equal(scene.points, part.points)


def test_depth_lies_on_the_point_cloud(co3d: Path) -> None:
    scene = read_scenes(f"co3d:{co3d / 'co3dv2_layout'},split=all,frames=1,category=kitchen", views=2)[0]
    assert isinstance(scene, Scene) and scene.points is not None
    known = scene.world_points()
    assert known is not None
    _, squared = CloudIndex(scene.points).nearest(known[0][known[1]][::50])
    assert float(squared.sqrt().median()) < 0.02  # metres; the cloud's own spacing is 12 mm


def test_the_protocol_of_the_papers_runs(co3d: Path) -> None:
    found = read_scenes(
        f"co3d:{co3d / 'co3dv2_layout'},split=all,frames=6", scenes=40, views=5, framing=Framing(14, 140)
    )
    for scene in found:
        assert isinstance(scene, Scene) and scene.views == 5
        assert scene.normalised().unit_length() == pytest.approx(1, abs=1e-5)


# ---------------------------------------------------------------- real records


def write_records(root: Path, category: str, records: list[dict[str, Any]]) -> None:
    folder = root / category
    (folder / "set_lists").mkdir(parents=True)
    names = sorted({record["sequence_name"] for record in records})
    sequences = [{"sequence_name": n, "category": category, "viewpoint_quality_score": 1.1} for n in names]
    lists = {"test": [[r["sequence_name"], r["frame_number"], r["image"]["path"]] for r in records]}
    (folder / "frame_annotations.jgz").write_bytes(gzip.compress(json.dumps(records).encode()))
    (folder / "sequence_annotations.jgz").write_bytes(gzip.compress(json.dumps(sequences).encode()))
    (folder / "set_lists" / "set_lists_fewview_dev.json").write_text(json.dumps(lists))


def test_real_records_are_understood(co3d: Path, tmp_path: Path) -> None:
    records = json.loads((co3d / "real_frame_records.json").read_text())
    for category in ("apple", "car"):
        write_records(tmp_path, category, [r for r in records if r["image"]["path"].startswith(category)])
    found = read_scenes(f"co3d:{tmp_path},frames=1")
    assert found.names == ["apple/110_13051_23361", "apple/540_79043_153212", "car/79_8257_17428"]
    for record in records:
        view = Frame(record, "told", tmp_path).view(foreground=True)
        height, width = record["image"]["size"]
        assert view.intrinsics is not None and view.depth is not None
        fx, fy = float(view.intrinsics[0, 0]), float(view.intrinsics[1, 1])
        # Phones have square pixels; halving the wrong side would give another focal length in one direction.
        assert fx == pytest.approx(fy, rel=1e-3) and 0.8 * max(height, width) < fx < 1.9 * max(height, width)
        centre = view.intrinsics[:2, 2] - torch.tensor([width - 1, height - 1]) / 2
        assert float(centre.abs().max()) < 1


def test_a_record_of_version_1_has_the_other_intrinsics(co3d: Path) -> None:
    records = json.loads((co3d / "real_frame_records.json").read_text())
    (old,) = [record for record in records if "intrinsics_format" not in record["viewpoint"]]
    view = Frame(old, "told", co3d).view()
    assert view.intrinsics is not None
    assert float(view.intrinsics[0, 0]) == pytest.approx(1148.20, abs=0.01)
    assert float(view.intrinsics[1, 1]) == pytest.approx(1148.20, abs=0.01)


# ---------------------------------------------------------------- real images, real cameras


def matches(first: Tensor, second: Tensor, count: int = 150) -> tuple[Tensor, Tensor]:
    """Pixels (u, v) `[n, 2]` of both images that show the same: corners found by correlation, there and back."""
    grey, other = first.mean(0), second.mean(0)
    v, u = corners(grey, count)
    best, there_v, there_u = find(patches(grey, v, u), other)
    _, back_v, back_u = find(patches(other, there_v, there_u), grey)
    same = (best > 0.85) & ((back_v - v).abs() <= 1) & ((back_u - u).abs() <= 1)
    return torch.stack([u, v], -1)[same].double(), torch.stack([there_u, there_v], -1)[same].double()


def corners(grey: Tensor, count: int) -> tuple[Tensor, Tensor]:
    dx, dy = torch.zeros_like(grey), torch.zeros_like(grey)
    dx[:, 1:-1], dy[1:-1] = grey[:, 2:] - grey[:, :-2], grey[2:] - grey[:-2]
    window = torch.ones(1, 1, 2 * HALF + 1, 2 * HALF + 1)
    xx, yy, xy = (conv2d(p[None, None], window, padding=HALF)[0, 0] for p in (dx * dx, dy * dy, dx * dy))
    score = (xx + yy) / 2 - (((xx - yy) / 2) ** 2 + xy**2).sqrt()
    inner = torch.zeros_like(score)
    inner[HALF:-HALF, HALF:-HALF] = score[HALF:-HALF, HALF:-HALF]
    peaks = torch.where(inner == max_pool2d(inner[None], 11, 1, 5)[0], inner, 0).flatten()
    best = peaks.topk(count).indices
    best = best[peaks[best] > 0]
    return best // grey.shape[1], best % grey.shape[1]


def patches(grey: Tensor, v: Tensor, u: Tensor) -> Tensor:
    cut = [grey[y - HALF : y + HALF + 1, x - HALF : x + HALF + 1] for y, x in zip(v.tolist(), u.tolist(), strict=True)]
    centred = torch.stack(cut) - torch.stack(cut).mean((1, 2), keepdim=True)
    return centred / centred.norm(dim=(1, 2), keepdim=True).clamp_min(1e-6)


def find(wanted: Tensor, grey: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    window = torch.ones(1, 1, 2 * HALF + 1, 2 * HALF + 1)
    mean = conv2d(grey[None, None], window)[0, 0] / window.numel()
    spread = (conv2d((grey * grey)[None, None], window)[0, 0] - window.numel() * mean**2).clamp_min(1e-4).sqrt()
    correlation = conv2d(grey[None, None], wanted[:, None])[0] / spread
    best, where = correlation.flatten(1).max(1)
    return best, where // correlation.shape[2] + HALF, where % correlation.shape[2] + HALF


def epipolar_distance(first: View, second: View, u: Tensor, v: Tensor) -> Tensor:
    """Pixels between the points `v` of the second view and the lines on which the cameras see the points `u`."""
    assert first.c2w is not None and second.c2w is not None
    assert first.intrinsics is not None and second.intrinsics is not None
    relative = torch.linalg.inv(second.c2w) @ first.c2w
    x, y, z = relative[:3, 3].tolist()
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    inverse = torch.linalg.inv(second.intrinsics).T
    fundamental = inverse @ cross @ relative[:3, :3] @ torch.linalg.inv(first.intrinsics)
    one = torch.ones(len(u), 1, dtype=torch.float64)
    lines = torch.cat([u, one], 1) @ fundamental.T
    return (lines * torch.cat([v, one], 1)).sum(1).abs() / lines[:, :2].norm(dim=1)


def test_real_matches_lie_on_the_epipolar_lines_of_real_cameras(co3d: Path) -> None:
    """And off them as soon as one convention is another: the test can tell."""
    files = sorted((co3d / "real_apple/images").iterdir())
    truth = np.load(co3d / "real_apple/gt_cameras.npz")
    flip = np.diag([-1.0, -1.0, 1.0])
    wrong = {
        "right": lambda v: v,
        "R of column vectors": lambda v: {**v, "R": v["R"].T},
        "axes of OpenCV": lambda v: {**v, "R": v["R"] @ flip, "T": v["T"] @ flip},
        "half of the longer side": lambda v: {**v, "focal_length": v["focal_length"] * 518 / 291},
        "half of each side": lambda v: {**v, "intrinsics_format": "ndc_norm_image_bounds"},
        "camera in the world": lambda v: {**v, "T": -v["T"] @ v["R"].T},
    }
    found = {(i, j): matches(read_image(files[i]), read_image(files[j])) for i, j in PAIRS}
    median = {}
    for name, change in wrong.items():

        def view(i: int, change: Any = change) -> View:
            record = {"R": truth["gtR"][i], "T": truth["gtT"][i], "focal_length": truth["gtFL"][i]}
            changed = change({**record, "principal_point": np.zeros(2), "intrinsics_format": "ndc_isotropic"})
            listed = {field: getattr(value, "tolist", lambda value=value: value)() for field, value in changed.items()}
            return Frame({"image": {"path": files[i].name, "size": [518, 291]}, "viewpoint": listed}, "", co3d).view()

        distances = [epipolar_distance(view(i), view(j), *found[i, j]) for i, j in PAIRS]
        median[name] = float(torch.cat(distances).median())
    assert min(len(points) for points, _ in found.values()) > 20
    assert median.pop("right") < 0.6
    assert min(median.values()) > 3, median
