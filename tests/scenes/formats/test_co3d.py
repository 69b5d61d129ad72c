"""CO3D: files written to the documented format are read back, and every mistake in them is told by name."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from hess_plugin.demo.rooms import make_scene
from hess_plugin.exceptions import SceneError
from hess_plugin.geometry import project, quaternion_to_matrix
from hess_plugin.scenes import Scene, read_scenes
from hess_plugin.scenes.clouds import write_cloud
from hess_plugin.scenes.formats import co3d_frames, co3d_records
from hess_plugin.scenes.formats.co3d_frames import Frame, read_depth
from hess_plugin.scenes.formats.co3d_records import read_records

SCALE = 0.9381256699562073
SEQUENCE = "110_13051_23361"
Record = dict[str, Any]


def by_hand(point: Tensor, viewpoint: Record, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Where PyTorch3D sees a world point: pixels from the image's corner, and depth; straight from its definition."""
    rotation, shift = (torch.tensor(viewpoint[field], dtype=torch.float64) for field in ("R", "T"))
    x, y, z = (point @ rotation + shift).tolist()
    (fx, fy), (px, py) = viewpoint["focal_length"], viewpoint["principal_point"]
    left, up = fx * x / z + px, fy * y / z + py
    if viewpoint.get("intrinsics_format", "ndc_norm_image_bounds") == "ndc_isotropic":
        half = (min(width, height) / 2, min(width, height) / 2)
    else:
        half = (width / 2, height / 2)
    pixel = [width / 2 - left * half[0], height / 2 - up * half[1]]
    return torch.tensor(pixel, dtype=torch.float64), torch.tensor(z, dtype=torch.float64)


def viewpoint_of(c2w: Tensor, intrinsics: Tensor, size: tuple[int, int], form: str) -> Record:
    """The record of a camera, derived from the definition in `by_hand`."""
    height, width = size
    half = [min(size) / 2] * 2 if form == "ndc_isotropic" else [width / 2, height / 2]
    w2c = torch.linalg.inv(c2w.double())
    turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0]).double())
    centre = [
        (side / 2 - (float(intrinsics[i, 2]) + 0.5)) / unit
        for i, (side, unit) in enumerate(zip((width, height), half, strict=True))
    ]
    return {
        "R": (w2c[:3, :3].T @ turn).tolist(),
        "T": (turn @ w2c[:3, 3]).tolist(),
        "focal_length": [float(intrinsics[0, 0]) / half[0], float(intrinsics[1, 1]) / half[1]],
        "principal_point": centre,
        "intrinsics_format": form,
    }


def write_gzip(path: Path, records: object) -> None:
    path.write_bytes(gzip.compress(json.dumps(records).encode()))


def read_gzip(path: Path) -> Any:
    return json.loads(gzip.decompress(path.read_bytes()))


def write_category(
    root: Path, category: str, rooms: dict[str, Scene], form: str = "ndc_isotropic", **sequence: Any
) -> Path:
    """Write scenes as the sequences of one category, every second frame in the test split, the others in train."""
    folder = root / category
    frames, sequences, lists = [], [], {"train": [], "val": [], "test": []}  # type: ignore[var-annotated]
    for name, scene in rooms.items():
        for part in ("images", "depths", "depth_masks", "masks"):
            (folder / name / part).mkdir(parents=True)
        for view in range(scene.views):
            frames.append(write_frame(root, f"{category}/{name}", scene, view, form))
            lists["train" if view % 2 else "test"].append([name, view, frames[-1]["image"]["path"]])
        if scene.points is not None:
            write_cloud(folder / name / "pointcloud.ply", scene.points)
        cloud = {"path": f"{category}/{name}/pointcloud.ply", "quality_score": 1.0, "n_points": 5}
        sequences.append(
            {
                "sequence_name": name,
                "category": category,
                "video": None,
                "point_cloud": None if scene.points is None else cloud,
                "viewpoint_quality_score": 1.5,
                **sequence,
            }
        )
    write_gzip(folder / "frame_annotations.jgz", frames)
    write_gzip(folder / "sequence_annotations.jgz", sequences)
    (folder / "set_lists").mkdir()
    (folder / "set_lists" / "set_lists_fewview_dev.json").write_text(json.dumps(lists))
    return folder


def write_frame(root: Path, where: str, scene: Scene, view: int, form: str) -> Record:
    name = f"frame{2 * view + 1:06d}"  # as in the real data, the file's number is not the frame's
    files = {
        "image": f"{where}/images/{name}.jpg",
        "depth": f"{where}/depths/{name}.jpg.geometric.png",
        "depth_mask": f"{where}/depth_masks/{name}.png",
        "mask": f"{where}/masks/{name}.png",
    }
    pixels = (scene.images[view].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).save(root / files["image"], quality=100, subsampling=0)
    assert scene.depth is not None
    halves = (scene.depth[view] / SCALE).numpy().astype(np.float16)
    halves[0, :4] = [np.nan, np.inf, -np.inf, -1.0]
    Image.fromarray(halves.view(np.uint16)).save(root / files["depth"])
    known = np.ones(halves.shape, dtype=bool)
    known[1, :7] = False
    Image.fromarray(known).save(root / files["depth_mask"])
    foreground = np.full(halves.shape, 127, dtype=np.uint8)
    foreground[:, 20:] = 128
    Image.fromarray(foreground).save(root / files["mask"])
    viewpoint = viewpoint_of(scene.c2w[view], scene.intrinsics[view], (scene.height, scene.width), form)
    return {
        "sequence_name": where.partition("/")[2],
        "frame_number": view,
        "frame_timestamp": 0.1 * view,
        "image": {"path": files["image"], "size": [scene.height, scene.width]},
        "depth": {"path": files["depth"], "scale_adjustment": SCALE, "mask_path": files["depth_mask"]},
        "mask": {"path": files["mask"], "mass": 1.0},
        "viewpoint": viewpoint,
        "meta": {"frame_type": "dev_known", "frame_splits": [], "eval_batch_maps": []},
        "camera_name": None,
        "a_key_of_tomorrow": [{"sequence_name": "nobody", "text": '}, {"sequence_name": "'}],
    }


@pytest.fixture(scope="module")
def wide() -> Scene:
    """Six views of a room, 40 x 60: the two sides differ, as does the centre from the principal point."""
    scene = make_scene(5, views=6)
    assert scene.depth is not None
    intrinsics = scene.intrinsics.clone()
    intrinsics[:, 1, 2] -= 7
    points = torch.rand(30, 3)
    return replace(
        scene, images=scene.images[:, :, 7:47], depth=scene.depth[:, 7:47], intrinsics=intrinsics, points=points
    )


@pytest.fixture
def dataset(wide: Scene, tmp_path: Path) -> Path:
    """A category with one sequence."""
    write_category(tmp_path, "apple", {SEQUENCE: wide})
    return tmp_path


def read(root: Path, options: str = "") -> list[Scene]:
    found = read_scenes(f"co3d:{root},frames=1{options}")
    return [scene for scene in found if isinstance(scene, Scene)]


# ---------------------------------------------------------------- what is written is read back


@pytest.mark.parametrize("form", ["ndc_isotropic", "ndc_norm_image_bounds"])
@pytest.mark.parametrize("upright", [False, True])
def test_a_room_is_read_back(wide: Scene, tmp_path: Path, form: str, upright: bool) -> None:
    truth = wide
    if upright:  # the camera rolled by a quarter: rows become columns
        roll = torch.tensor([[0.0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).double()
        swap = wide.intrinsics.clone()
        swap[:, 0, 0], swap[:, 1, 1] = wide.intrinsics[:, 1, 1], wide.intrinsics[:, 0, 0]
        swap[:, 0, 2], swap[:, 1, 2] = wide.intrinsics[:, 1, 2], wide.width - 1 - wide.intrinsics[:, 0, 2]
        assert wide.depth is not None
        truth = replace(
            wide,
            images=wide.images.rot90(1, (2, 3)),
            depth=wide.depth.rot90(1, (1, 2)),
            c2w=wide.c2w.double() @ roll,
            intrinsics=swap,
        )
    write_category(tmp_path, "apple", {SEQUENCE: truth}, form)
    (scene,) = read(tmp_path, ",split=all")
    assert scene.name == f"apple/{SEQUENCE}"
    torch.testing.assert_close(scene.c2w, truth.c2w.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(scene.intrinsics, truth.intrinsics.double(), atol=1e-4, rtol=0)
    assert float((scene.images - truth.images).abs().mean()) < 0.03
    assert scene.depth is not None and truth.depth is not None and scene.points is not None
    torch.testing.assert_close(scene.points, wide.points)
    torch.testing.assert_close(scene.depth[:, 2:], truth.depth[:, 2:], rtol=2**-10, atol=0)
    assert bool((scene.depth[:, 0, :4] == 0).all()) and bool((scene.depth[:, 0, 4:] > 0).all())
    assert bool((scene.depth[:, 1, :7] == 0).all()) and bool((scene.depth[:, 1, 7:] > 0).all())


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    form=st.sampled_from(["ndc_isotropic", "ndc_norm_image_bounds", None]),
)
def test_a_point_is_seen_where_pytorch3d_sees_it(seed: int, height: int, width: int, form: str | None) -> None:
    rng = torch.Generator().manual_seed(seed)
    numbers = torch.rand(4, generator=rng, dtype=torch.float64)
    rotation = quaternion_to_matrix(torch.randn(4, generator=rng, dtype=torch.float64))
    shift = torch.randn(3, generator=rng, dtype=torch.float64)
    viewpoint: Record = {
        "R": rotation.tolist(),
        "T": shift.tolist(),
        "focal_length": (0.5 + 3 * numbers[:2]).tolist(),
        "principal_point": (numbers[2:] - 0.5).tolist(),
    }
    if form is not None:
        viewpoint["intrinsics_format"] = form
    record = {"image": {"path": "a.jpg", "size": [height, width]}, "viewpoint": viewpoint}
    view = Frame(record, "told", Path("/")).view()
    assert view.c2w is not None and view.intrinsics is not None and view.depth is None
    away = torch.tensor([0.3, -0.2, 2.0], dtype=torch.float64) * (0.5 + numbers[:3])
    point = (away - shift) @ rotation.T  # the world point that PyTorch3D sees at `away`, in front of the camera
    pixels, depth = by_hand(point, viewpoint, height, width)
    seen, z = project(point[None, None], view.intrinsics[None], view.c2w[None])
    torch.testing.assert_close(seen[0, 0] + 0.5, pixels, atol=1e-7, rtol=1e-9)
    torch.testing.assert_close(z[0, 0], depth)


def test_every_half_float_is_read_as_what_its_bits_say(tmp_path: Path) -> None:
    words = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(words).save(tmp_path / "d.png")
    depth = read_depth(tmp_path / "d.png", 2.0, [])
    for word in [*range(0, 65536, 37), 0, 1, 0x3C00, 0x7BFF, 0x7C00, 0x7C01, 0x7E00, 0x8000, 0xBC00, 0xFC00]:
        sign, exponent, fraction = word >> 15, word >> 10 & 31, word & 1023
        value = fraction * 2.0**-24 if exponent == 0 else (1 + fraction / 1024) * 2.0 ** (exponent - 15)
        wanted = 0.0 if sign or exponent == 31 else 2 * value
        assert float(depth.flatten()[word]) == wanted, hex(word)


def test_foreground_keeps_depth_where_the_mask_is_above_one_half(dataset: Path) -> None:
    (whole,), (part,) = read(dataset), read(dataset, ",foreground=yes")
    assert whole.depth is not None and part.depth is not None
    assert bool((part.depth[..., :20] == 0).all()) and torch.equal(part.depth[..., 20:], whole.depth[..., 20:])
    assert bool((whole.depth[:, 2:, :20] > 0).all())


def test_a_frame_without_depth_or_depth_mask(dataset: Path) -> None:
    def change(frames: list[Record]) -> None:
        frames[0]["depth"] = None
        frames[2]["depth"]["mask_path"] = None

    edit(dataset, change)
    (scene,) = read(dataset)
    assert scene.depth is not None
    assert float(scene.depth[0].max()) == 0 and bool((scene.depth[1, 1:] > 0).all())


# ---------------------------------------------------------------- which sequences, which frames


def test_a_split_gives_its_frames_in_the_order_of_their_numbers(wide: Scene, dataset: Path) -> None:
    lists = dataset / "apple/set_lists/set_lists_fewview_dev.json"
    record = json.loads(lists.read_text())
    record["test"].reverse()
    lists.write_text(json.dumps(record))
    for options, views in (("", [0, 2, 4]), (",split=train", [1, 3, 5]), (",split=all", [0, 1, 2, 3, 4, 5])):
        (scene,) = read(dataset, options)
        torch.testing.assert_close(scene.c2w, wide.c2w[views].double(), atol=1e-6, rtol=0)
        assert float((scene.images - wide.images[views]).abs().mean()) < 0.03


def test_sequences_are_named_and_found_in_every_category(wide: Scene, tmp_path: Path) -> None:
    for category in ("bench", "apple", "car"):
        write_category(tmp_path, category, {"2_b": wide, "1_a": wide})
    (tmp_path / "notes").mkdir()
    (tmp_path / "LICENSE").write_text("")

    def names(where: Path, options: str = "") -> list[str]:
        return read_scenes(f"co3d:{where},frames=1{options}").names

    everything = [f"{category}/{name}" for category in ("apple", "bench", "car") for name in ("1_a", "2_b")]
    assert names(tmp_path) == everything
    assert names(tmp_path, ",category=car+apple") == everything[:2] + everything[4:]
    assert names(tmp_path / "bench") == everything[2:4]


def test_a_category_is_found_where_one_stands(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dataset / "apple")
    assert read(Path("."))[0].views == 3
    monkeypatch.chdir(dataset)
    assert read(Path("apple"))[0].name == f"apple/{SEQUENCE}"


def test_sequences_of_poor_quality_or_few_frames_are_left_out(wide: Scene, tmp_path: Path) -> None:
    rooms = {name: wide for name in ("good", "poor", "unrated", "far", "short")}
    folder = write_category(tmp_path, "apple", rooms)
    sequences = read_gzip(folder / "sequence_annotations.jgz")
    sequences[1]["viewpoint_quality_score"], sequences[2]["viewpoint_quality_score"] = 0.5, None
    write_gzip(folder / "sequence_annotations.jgz", sequences)

    def change(frames: list[Record]) -> None:
        for frame in frames:
            if frame["sequence_name"] == "far" and frame["frame_number"] == 4:
                frame["viewpoint"]["T"] = [9e4, 2e4, 0.0]

    edit(tmp_path, change)
    lists = folder / "set_lists/set_lists_fewview_dev.json"
    record = json.loads(lists.read_text())
    record["test"] = [entry for entry in record["test"] if entry[0] != "short" or entry[1] < 4]
    lists.write_text(json.dumps(record))

    def names(options: str) -> list[str]:
        return [name.partition("/")[2] for name in read_scenes(f"co3d:{tmp_path}{options}").names]

    assert names(",frames=3") == ["good"]
    assert names(",frames=2") == ["good", "short"]
    assert names(",frames=3,quality=0.49") == ["good", "poor"]
    assert names(",frames=3,quality=any") == ["good", "poor", "unrated"]
    assert names(",frames=3,split=train") == ["far", "good", "short"]  # the camera that is off is in test
    with pytest.raises(SceneError, match=r"2 have a viewpoint_quality_score up to 0\.5, 3 fewer than 50 frames, 0 no"):
        read_scenes(f"co3d:{tmp_path}")


def test_no_image_is_opened_before_a_scene_is_asked_for(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    for name in ("read_image", "read_words", "read_mask"):
        original = getattr(co3d_frames, name)
        monkeypatch.setattr(co3d_frames, name, lambda path, original=original: opened.append(path) or original(path))
    found = read_scenes(f"co3d:{dataset},frames=1", views=2)
    assert len(found) == 1 and not opened
    assert found[0].views == 2 and len(opened) == 6  # image, depth and depth mask of two views, not of three


def test_annotations_are_parsed_once(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = gzip.open
    monkeypatch.setattr(
        gzip, "open", lambda path, *rest, **more: opened.append(path.name) or original(path, *rest, **more)
    )
    found = read_scenes(f"co3d:{dataset},frames=1")
    assert found[0].name == found[0].name
    assert sorted(opened) == ["frame_annotations.jgz", "sequence_annotations.jgz"]


# ---------------------------------------------------------------- the annotation files


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(
        st.dictionaries(
            st.text(max_size=5),
            st.recursive(st.none() | st.integers() | st.text(max_size=9), lambda child: st.lists(child, max_size=3)),
            max_size=4,
        ),
        max_size=7,
    ),
    piece=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
)
def test_records_read_by_the_piece_are_those_read_at_once(
    tmp_path: Path, records: list[Record], piece: int, indent: int | None, ascii_only: bool
) -> None:
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(co3d_records, "_PIECE", piece)
        text = json.dumps(records, indent=indent, ensure_ascii=ascii_only)
        (tmp_path / "a.jgz").write_bytes(gzip.compress(text.encode("utf-8", "surrogatepass")))
        try:
            text.encode()
        except UnicodeEncodeError:
            with pytest.raises(SceneError, match="is cut short or not gzip"):
                list(read_records(tmp_path / "a.jgz"))
            return
        found = list(read_records(tmp_path / "a.jgz"))
    assert [record for record, _ in found] == records
    assert [json.loads(text) for _, text in found] == records


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), packed=st.booleans())
def test_a_file_cut_anywhere_is_told(tmp_path: Path, data: st.DataObject, packed: bool) -> None:
    whole = json.dumps([{"sequence_name": "a", "frame_number": i} for i in range(9)]).encode()
    whole = gzip.compress(whole) if packed else whole
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    (tmp_path / "a.jgz").write_bytes(cut if packed else gzip.compress(cut))
    with pytest.raises(SceneError, match="download it again"):
        list(read_records(tmp_path / "a.jgz"))


@pytest.mark.parametrize("text", ["{}", "[1]", "[{}", "[{},]", "[{}{}]", "[{}] x", "[{}, 1]", "", "null", '[{"a": }]'])
def test_what_is_not_a_list_of_records_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.jgz").write_bytes(gzip.compress(text.encode()))
    with pytest.raises(SceneError, match=r"a\.jgz is not a JSON list of records"):
        list(read_records(tmp_path / "a.jgz"))


def test_a_broken_record_does_not_hold_the_rest_of_a_long_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(co3d_records, "_PIECE", 100)
    monkeypatch.setattr(co3d_records, "_LONGEST", 1000)
    reads: list[int] = []
    original = gzip.open

    def counted(*arguments: Any, **options: Any) -> Any:
        file = original(*arguments, **options)
        read = file.read
        file.read = lambda size: reads.append(size) or read(size)
        return file

    monkeypatch.setattr(gzip, "open", counted)
    (tmp_path / "a.jgz").write_bytes(gzip.compress(b'[{"a": 1}, {"a": oops}' + b', {"a": 2}' * 100_000 + b"]"))
    with pytest.raises(SceneError, match="broken after 1"):
        list(read_records(tmp_path / "a.jgz"))
    assert len(reads) < 20


# ---------------------------------------------------------------- mistakes


def edit(root: Path, change: Callable[[list[Record]], object]) -> None:
    file = root / "apple/frame_annotations.jgz"
    frames = read_gzip(file)
    change(frames)
    write_gzip(file, frames)


def put(value: object, *keys: str) -> Callable[[Path], object]:
    """Replace one field of frame 2."""

    def change(frames: list[Record]) -> None:
        part = frames[2]
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value

    return lambda root: edit(root, change)


def drop(*keys: str) -> Callable[[Path], object]:
    """Take one field of frame 2 out."""

    def change(frames: list[Record]) -> None:
        part = frames[2]
        for key in keys[:-1]:
            part = part[key]
        del part[keys[-1]]

    return lambda root: edit(root, change)


def sequence(field: str, value: object) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        records = read_gzip(root / "apple/sequence_annotations.jgz")
        records[0][field] = value
        write_gzip(root / "apple/sequence_annotations.jgz", records)

    return change


def lists(text: str) -> Callable[[Path], object]:
    return lambda root: (root / "apple/set_lists/set_lists_fewview_dev.json").write_text(text)


def cut(name: str, keep: float) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[: int(len(data) * keep)])

    return change


def picture(name: str, pixels: Any) -> Callable[[Path], object]:
    return lambda root: Image.fromarray(pixels).save(root / name)


WHERE = f"apple/{SEQUENCE}"
TOLD = rf"frame_annotations.jgz: sequence {SEQUENCE}, frame 2: "
IMAGE, DEPTH = f"{WHERE}/images/frame000005.jpg", f"{WHERE}/depths/frame000005.jpg.geometric.png"
DEPTH_MASK, MASK = f"{WHERE}/depth_masks/frame000005.png", f"{WHERE}/masks/frame000005.png"
FRAMES, SEQUENCES = "apple/frame_annotations.jgz", "apple/sequence_annotations.jgz"
TURNED = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, -1.0]]

BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "frames cut": (cut(FRAMES, 0.7), "frame_annotations.jgz is cut short or not gzip"),
    "frames not gzip": (lambda r: (r / FRAMES).write_text("[]"), "frame_annotations.jgz is cut short or not gzip"),
    "frames not a list": (lambda r: write_gzip(r / FRAMES, {"a": 1}), "frame_annotations.jgz is not a JSON list"),
    "frames without names": (lambda r: write_gzip(r / FRAMES, [{}]), "frame_annotations.jgz: sequence_name of a"),
    "frame missing": (lambda r: edit(r, lambda f: f.pop(2)), "frame 2 is missing, .*fewview_dev.json names it"),
    "frame number a list": (put([4], "frame_number"), "frame 2 is missing, .*fewview_dev.json names it"),
    "other image": (put(f"{WHERE}/images/x.jpg", "image", "path"), TOLD + "image.path leads to .*x.jpg.*says 'apple"),
    "no image": (drop("image"), TOLD + "image is None, a record"),
    "image path a number": (put(5, "image", "path"), TOLD + "image.path is 5"),
    "no size": (drop("image", "size"), TOLD + "image.size is None"),
    "size of one": (put([40], "image", "size"), TOLD + r"image.size is \[40\]"),
    "size of words": (put(["40", "60"], "image", "size"), TOLD + "image.size is"),
    "size negative": (put([40, -60], "image", "size"), TOLD + "image.size is"),
    "size of width first": (put([60, 40], "image", "size"), TOLD + r"image.size is \[60, 40\].*is \[40, 60\]"),
    "image of another size": (picture(IMAGE, np.zeros((20, 30, 3), np.uint8)), TOLD + "image.size is"),
    "image missing": (lambda r: (r / IMAGE).unlink(), "Image file .*frame000005.jpg does not exist"),
    "image cut": (cut(IMAGE, 0.5), "Image file .*frame000005.jpg cannot be decoded"),
    "no viewpoint": (put(None, "viewpoint"), TOLD + "viewpoint is None"),
    "no R": (drop("viewpoint", "R"), TOLD + "viewpoint.R is not 3x3 numbers"),
    "R flat": (put([1.0] * 9, "viewpoint", "R"), TOLD + r"viewpoint.R has shape \[9\]"),
    "R of words": (put([["a"] * 3] * 3, "viewpoint", "R"), TOLD + "viewpoint.R is not 3x3 numbers"),
    "R ragged": (put([[1.0], [1.0, 2.0]], "viewpoint", "R"), TOLD + "viewpoint.R is not 3x3 numbers"),
    "R not finite": (put([[float("nan")] * 3] * 3, "viewpoint", "R"), TOLD + "viewpoint.R has values that are not"),
    "R scaled": (put([[2.0, 0, 0], [0, 2, 0], [0, 0, 2]], "viewpoint", "R"), TOLD + "viewpoint.R is no rotation"),
    "R mirrored": (put(TURNED, "viewpoint", "R"), TOLD + "viewpoint.R is no rotation.*determinant -1"),
    "T of two": (put([1.0, 2.0], "viewpoint", "T"), TOLD + r"viewpoint.T has shape \[2\]"),
    "T of words": (put("far", "viewpoint", "T"), TOLD + "viewpoint.T is not 3 numbers"),
    "T infinite": (put([0.0, float("-inf"), 0.0], "viewpoint", "T"), TOLD + "viewpoint.T has values that are not"),
    "focal zero": (put([0.0, 1.0], "viewpoint", "focal_length"), TOLD + r"viewpoint.focal_length is \[0.0, 1.0\]"),
    "focal one number": (put(2.0, "viewpoint", "focal_length"), TOLD + "viewpoint.focal_length has shape"),
    "no centre": (drop("viewpoint", "principal_point"), TOLD + "viewpoint.principal_point is not 2 numbers"),
    "unknown intrinsics": (put("px", "viewpoint", "intrinsics_format"), TOLD + "viewpoint.intrinsics_format is 'px'"),
    "null intrinsics": (put(None, "viewpoint", "intrinsics_format"), TOLD + "viewpoint.intrinsics_format is None"),
    "depth a list": (put([], "depth"), TOLD + r"depth is \[\], a record"),
    "depth path missing": (drop("depth", "path"), TOLD + "depth.path is None"),
    "scale missing": (drop("depth", "scale_adjustment"), TOLD + "depth.scale_adjustment is None"),
    "scale negative": (put(-1.0, "depth", "scale_adjustment"), TOLD + "depth.scale_adjustment is -1.0"),
    "scale not a number": (put(float("nan"), "depth", "scale_adjustment"), TOLD + "depth.scale_adjustment is nan"),
    "depth missing": (lambda r: (r / DEPTH).unlink(), "Depth file .*frame000005.jpg.geometric.png does not exist"),
    "depth cut": (cut(DEPTH, 0.5), "Depth file .*geometric.png cannot be decoded"),
    "depth of 8 bits": (picture(DEPTH, np.zeros((40, 60), np.uint8)), "Depth file .*mode L, 16-bit grey"),
    "depth of another size": (picture(DEPTH, np.zeros((20, 30), np.uint16)), "the depth .*frame000005.jpg.geometric"),
    "mask missing": (lambda r: (r / DEPTH_MASK).unlink(), "Mask file .*depth_masks/frame000005.png does not exist"),
    "mask in colour": (picture(DEPTH_MASK, np.zeros((40, 60, 3), np.uint8)), "Mask file .*mode RGB, 8-bit grey"),
    "mask of another size": (picture(DEPTH_MASK, np.zeros((9, 8), np.uint8)), "Mask file .*000005.png is 9x8, the"),
    "foreground mask missing": (lambda r: (r / MASK).unlink(), "Mask file .*masks/frame000005.png does not exist"),
    "foreground mask unnamed": (put(None, "mask"), TOLD + "mask is None, a record"),
    "sequences missing": (lambda r: (r / SEQUENCES).unlink(), "sequence_annotations.jgz does not exist"),
    "sequences cut": (cut(SEQUENCES, 0.6), "sequence_annotations.jgz is cut short"),
    "sequence unknown": (sequence("sequence_name", "other"), f"has no sequence {SEQUENCE}, the set lists name it"),
    "sequence of a number": (sequence("sequence_name", 3), "sequence_name of a record is 3"),
    "quality of words": (sequence("viewpoint_quality_score", "high"), f"viewpoint_quality_score of {SEQUENCE} is 'hi"),
    "cloud missing": (lambda r: (r / WHERE / "pointcloud.ply").unlink(), "point_cloud.path is 'apple/.*pointcloud.ply"),
    "cloud unnamed": (sequence("point_cloud", {}), "point_cloud.path is None"),
    "cloud cut": (cut(f"{WHERE}/pointcloud.ply", 0.8), "pointcloud.ply holds"),
    "list cut": (lists('{"test": ['), "set_lists_fewview_dev.json is not JSON"),
    "list of nothing": (lists("[]"), "set_lists_fewview_dev.json is a list"),
    "list without split": (lists('{"train": []}'), "has no split 'test'; it has: train"),
    "split not a list": (lists('{"test": 3}'), "test is not a list of frames"),
    "entry of two": (lists('{"test": [["a", 1]]}'), r"test has \['a', 1\]"),
    "entry in another order": (lists('{"test": [[1, "a", "b"]]}'), r"test has \[1, 'a', 'b'\]"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_told_with_sequence_frame_and_field(dataset: Path, case: str) -> None:
    damage, sentence = BROKEN[case]
    damage(dataset)
    with pytest.raises(SceneError, match=sentence) as raised:
        read(dataset, ",foreground=yes")
    assert str(dataset) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (",subset=fewview_test", "has no set list 'fewview_test', it has: fewview_dev, manyview_dev_0; choose"),
        (",split=dev", "has no split 'dev'; it has: train, val, test, and all of them: all"),
        (",category=pear+apple", "has no category 'pear'; it has: apple"),
        (",quality=good", "quality is 'good', a number or any"),
        (",quality=nan", "quality is 'nan', a number or any"),
        (",frames=0", "frames is '0', a whole number from 1 on"),
        (",frames=few", "frames is 'few', a whole number from 1 on"),
        (",foreground=maybe", "foreground is 'maybe', yes or no"),
        (",split=val", "No sequence of .* is left of split val of fewview_dev"),
        (",views=3", "set 'views'; the options of co3d are: subset, split, category, quality, frames, foreground"),
    ],
)
def test_a_wrong_option_says_what_there_is(dataset: Path, options: str, sentence: str) -> None:
    (dataset / "apple/set_lists/set_lists_manyview_dev_0.json").write_text("{}")
    with pytest.raises(SceneError, match=sentence):
        read_scenes(f"co3d:{dataset}{options}")


def test_a_folder_of_something_else_is_told(dataset: Path) -> None:
    with pytest.raises(SceneError, match="holds no CO3D category"):
        read_scenes(f"co3d:{dataset / WHERE}")
    with pytest.raises(SceneError, match="is not a folder"):
        read_scenes(f"co3d:{dataset / IMAGE}")
    (dataset / "apple/set_lists/set_lists_fewview_dev.json").unlink()
    with pytest.raises(SceneError, match="has no set list 'fewview_dev', it has none"):
        read_scenes(f"co3d:{dataset}")
