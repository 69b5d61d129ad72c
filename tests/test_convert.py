"""`hess-patch convert`: scenes of any format come back from the folders it writes; mistakes are one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from hess_plugin.cli import main
from hess_plugin.demo.rooms import make_scene
from hess_plugin.framing import Framing
from hess_plugin.geometry import project
from hess_plugin.scenes import Scene, SceneSource, View, read_scenes, write_folder
from hess_plugin.scenes.reading import FORMATS, SceneFormat

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run `hess-patch convert` in an empty folder."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, ["convert", *map(str, arguments)], prog_name="hess-patch")

    return run


@pytest.fixture(scope="module")
def rooms() -> list[Scene]:
    """Three rooms, one of them with points."""
    made = [make_scene(seed, views=4) for seed in (41, 42, 43)]
    return [made[0], replace(made[1], points=torch.rand(20, 3)), made[2]]


@pytest.fixture(scope="module")
def data(rooms: list[Scene], tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("scenes")
    for i, room in enumerate(rooms):
        write_folder(room, root / f"room{i}")
    return f"folder:{root}"


def read(folder: str) -> list[Scene]:
    return [scene for scene in read_scenes(f"folder:{folder}") if isinstance(scene, Scene)]


def assert_same(one: Scene, other: Scene) -> None:
    """Equal but for 8 bits of colour and 16 of depth."""
    assert torch.equal(one.c2w, other.c2w) and torch.equal(one.intrinsics, other.intrinsics)
    torch.testing.assert_close(one.images, other.images, atol=0.51 / 255, rtol=0)
    assert one.depth is not None and other.depth is not None
    torch.testing.assert_close(one.depth, other.depth, atol=float(other.depth.max()) / 65000, rtol=0)
    assert torch.equal(one.depth > 0, other.depth > 0)
    assert (one.points is None) == (other.points is None)
    if one.points is not None and other.points is not None:
        torch.testing.assert_close(one.points, other.points)


def assert_one_sentence(result: Result, *words: str, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    sentence = result.stderr.partition("Error: ")[2].strip()
    assert sentence and "\n" not in sentence and "Traceback" not in result.output
    for word in words:
        assert word in sentence, sentence


def written() -> list[str]:
    return sorted(str(path) for path in Path().glob("*/*"))


# ---------------------------------------------------------------- what works


def test_scenes_come_back_as_they_were(invoke: Invoke, data: str) -> None:
    result = invoke("--data", data, "-o", "out")
    assert result.exit_code == 0 and result.stderr == "" and "wrote 3 scenes to out" in result.stdout
    assert written() == ["out/room0", "out/room1", "out/room2"]
    for one, other in zip(read("out"), read(data.partition(":")[2]), strict=True):
        assert_same(one, other)


def test_views_size_and_scenes_are_those_a_command_would_read(invoke: Invoke, data: str) -> None:
    options = ("--scenes", 2, "--views", 3, "--seed", 5, "--resolution", 45, "--multiple", 10, "--framing", "longest")
    assert invoke("--data", data, *options, "-o", "new/out").exit_code == 0
    wanted = read_scenes(data, scenes=2, views=3, seed=5, framing=Framing(10, 45))
    assert sorted(path.name for path in Path("new/out").iterdir()) == wanted.names
    for one, other in zip(read("new/out"), wanted, strict=True):
        assert isinstance(other, Scene) and (one.views, one.height, one.width) == (3, 40, 40)
        assert_same(one, other)


@pytest.mark.parametrize(
    "options, framing",
    [
        (("--multiple", 14), Framing(14)),
        (("--resolution", 50), Framing(1, 50)),
        (("--framing", "pad", "--resolution", 30), Framing(1, 30, "pad")),
    ],
)
def test_sizes_left_out_are_the_images_own(
    invoke: Invoke, rooms: list[Scene], tmp_path: Path, options: tuple[object, ...], framing: Framing
) -> None:
    wide = rooms[0]
    assert wide.depth is not None
    wide = replace(wide, images=wide.images[:, :, :40], depth=wide.depth[:, :40])
    write_folder(wide, tmp_path / "wide")
    assert invoke("--data", f"folder:{tmp_path / 'wide'}", *options, "-o", "out").exit_code == 0
    (one,) = read("out")
    placement = framing.place(40, 60)
    assert (one.height, one.width) == (placement.rows, placement.columns)


def test_points_are_still_seen_at_their_pixels(invoke: Invoke, rooms: list[Scene], data: str) -> None:
    """Cameras and depth after another size and two files: the depth of each pixel lies on the original surface."""
    assert invoke("--data", data, "--framing", "crop", "--resolution", 42, "--multiple", 14, "-o", "out").exit_code == 0
    small, whole = read("out")[0], rooms[0]
    known = small.world_points()
    assert known is not None and whole.depth is not None
    pixels, depth = project(known[0].double(), whole.intrinsics.double(), whole.c2w.double())
    u, v = pixels.round().long().unbind(-1)
    view = torch.arange(small.views)[:, None, None].expand_as(u)
    truth = whole.depth[view, v.clamp(0, 59), u.clamp(0, 59)].double()
    assert float(((depth - truth).abs() / truth).quantile(0.9)) < 0.03


def test_names_with_slashes_become_folders_that_are_found(
    invoke: Invoke, rooms: list[Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, rooms, ["apple/1_2 (a)", "../.hidden/..", "...", "ä+b-c.d"])
    assert invoke("--data", "made:.", "-o", "out").exit_code == 0
    assert written() == ["out/_.hidden_..", "out/apple_1_2_a_", "out/scene", "out/ä+b-c.d"]
    assert len(read("out")) == 4 and not Path(".hidden").exists()


def test_several_specs_and_equal_names(invoke: Invoke, rooms: list[Scene], data: str) -> None:
    write_folder(rooms[2], Path("other/room0"))
    result = invoke("--data", data, "--data", "folder:other", "-o", "out")
    assert result.exit_code == 0, result.output
    names = [path.name for path in sorted(Path("out").iterdir())]
    assert len(names) == len(read("out")) == 4 and {"folder_other_room0", "room1", "room2"} < set(names)


def offer(monkeypatch: pytest.MonkeyPatch, rooms: list[Scene], names: list[str]) -> list[str]:
    """Register a format `made` with scenes of these names; returns the list of names that are read."""
    reads: list[str] = []

    def source(name: str, room: Scene) -> SceneSource:
        def views() -> list[View]:
            reads.append(name)
            return [
                View(f"{i}", lambda i=i: room.images[i], room.c2w[i].double(), room.intrinsics[i].double())  # type: ignore[misc]
                for i in range(room.views)
            ]

        return SceneSource(name, Path(name), views)

    found = [source(name, rooms[i % len(rooms)]) for i, name in enumerate(names)]
    monkeypatch.setitem(FORMATS, "made", SceneFormat(lambda root: found, "anything", {}))
    return reads


# ---------------------------------------------------------------- running again


def test_finished_scenes_are_not_read_again(
    invoke: Invoke, rooms: list[Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = offer(monkeypatch, rooms, ["a", "b", "c"])
    assert invoke("--data", "made:.", "-o", "out").exit_code == 0 and reads == ["a", "b", "c"]
    shutil.rmtree("out/b")
    reads.clear()
    result = invoke("--data", "made:.", "-o", "out")
    assert result.exit_code == 0 and reads == ["b"] and "wrote 1 scenes to out (2 were there)" in result.stdout
    reads.clear()
    assert invoke("--data", "made:.", "--scenes", 2, "-o", "out").exit_code == 0 and reads == []


def test_an_interrupted_conversion_goes_on(invoke: Invoke, rooms: list[Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    reads = offer(monkeypatch, rooms, ["a", "b", "c"])
    original = write_folder

    def stop(scene: Scene, path: Path, **options: Any) -> Path:
        if scene.name == "b":
            raise KeyboardInterrupt
        return original(scene, path, **options)

    with monkeypatch.context() as patcher:
        patcher.setattr("hess_plugin.scenes.writing.write_folder", stop)
        result = invoke("--data", "made:.", "-o", "out")
    assert result.exit_code == 130 and "run the same command again" in result.stderr
    assert written() == ["out/a"] and len(read("out")) == 1
    reads.clear()
    assert invoke("--data", "made:.", "-o", "out").exit_code == 0
    assert reads == ["b", "c"] and written() == ["out/a", "out/b", "out/c"]


@pytest.mark.parametrize(
    "other", [("--views", 2), ("--seed", 1), ("--resolution", 30), ("--framing", "pad"), ("--multiple", 2)]
)
def test_scenes_of_another_command_are_not_taken_for_these(
    invoke: Invoke, data: str, other: tuple[object, ...]
) -> None:
    assert invoke("--data", data, "--scenes", 1, "-o", "out").exit_code == 0
    (before,) = Path("out").iterdir()
    stamp = before.stat().st_mtime_ns
    result = invoke("--data", data, *other, "-o", "out")
    assert_one_sentence(result, f"Scene folder {before} exists", "remove it or write elsewhere")
    assert list(Path("out").iterdir()) == [before] and before.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("content", ["", "[]", '{"origin": 3}', '{"format": "scene-v1"}', None])
def test_a_folder_of_something_else_is_left_alone(invoke: Invoke, data: str, content: str | None) -> None:
    Path("out/room1").mkdir(parents=True)
    if content is not None:
        Path("out/room1/cameras.json").write_text(content)
    assert_one_sentence(invoke("--data", data, "-o", "out"), "Scene folder out/room1 exists")
    assert written() == ["out/room1"]


def test_what_was_asked_for_is_kept_with_the_scene(invoke: Invoke, data: str) -> None:
    assert invoke("--data", data, "--views", 2, "--multiple", 7, "-o", "out").exit_code == 0
    origin = json.loads(Path("out/room0/cameras.json").read_text())["origin"]
    assert origin == {"data": [data], "views": 2, "seed": 0, "resolution": None, "multiple": 7, "framing": None}


# ---------------------------------------------------------------- mistakes


def test_images_without_truth_are_refused(invoke: Invoke) -> None:
    Path("trip").mkdir()
    for i in range(2):
        Image.new("RGB", (20, 10)).save(f"trip/{i}.png")
    result = invoke("--data", "images:trip", "-o", "out")
    assert_one_sentence(result, "scene 'trip' is images without ground truth, converting needs true cameras")
    assert not Path("out").exists()


def test_names_that_become_one_are_refused_before_anything_is_read(
    invoke: Invoke, rooms: list[Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = offer(monkeypatch, rooms, ["a/b", "c", "a_b"])
    assert_one_sentence(invoke("--data", "made:.", "-o", "out"), "Scenes a/b and a_b would both be written as a_b")
    assert reads == [] and not Path("out").exists()


def test_a_broken_scene_is_named_and_those_before_it_are_kept(invoke: Invoke, rooms: list[Scene]) -> None:
    for name in ("a", "b"):
        write_folder(rooms[0], Path("data") / name)
    Path("data/b/images/000001.png").write_bytes(b"\x89PNG not quite")
    assert_one_sentence(invoke("--data", "folder:data", "-o", "out"), "data/b/images/000001.png cannot be decoded")
    assert written() == ["data/a", "data/b", "out/a"]


def test_images_of_several_sizes_need_a_framing(
    invoke: Invoke, rooms: list[Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    views = [
        View(f"{i}", lambda i=i: torch.rand(3, 20 + i, 30), torch.eye(4).double(), torch.eye(3).double())  # type: ignore[misc]
        for i in range(2)
    ]
    monkeypatch.setitem(
        FORMATS, "made", SceneFormat(lambda root: [SceneSource("a", Path("a"), lambda: views)], "anything", {})
    )
    assert_one_sentence(invoke("--data", "made:.", "-o", "out"), "is 21x30, the first image is 20x30")
    assert invoke("--data", "made:.", "--multiple", 10, "-o", "out").exit_code == 0


@pytest.mark.parametrize(
    "arguments, words, code",
    [
        (("--data", "{data}"), ("--output",), 2),
        (("-o", "out"), ("--data",), 2),
        (("--data", "{data}", "-o", "out", "--framing", "square"), ("--framing",), 2),
        (("--data", "{data}", "-o", "out", "--multiple", "0"), ("--multiple",), 2),
        (("--data", "{data}", "-o", "out", "--scenes", "0"), ("--scenes",), 2),
        (("--data", "{data}", "-o", "out", "--multiple", "20", "--resolution", "10"), ("multiples of 20", "of 10"), 1),
        (("--data", "co4d:/x", "-o", "out"), ("'co4d:/x'", "co3d", "images"), 1),
        (("--data", "folder:/no/where", "-o", "out"), ("/no/where does not exist",), 1),
        (("--data", "{data}", "-o", "file"), ("file",), 2),
        (("--data", "{data}", "-o", "file/out"), ("file",), 1),
    ],
)
def test_wrong_options_are_one_sentence_and_leave_nothing(
    invoke: Invoke, data: str, arguments: tuple[str, ...], words: tuple[str, ...], code: int
) -> None:
    Path("file").write_text("mine")
    assert_one_sentence(invoke(*(argument.format(data=data) for argument in arguments)), *words, code=code)
    assert [str(path) for path in Path().rglob("*")] == ["file"]


def test_formats_lists_every_format_and_option() -> None:
    from hess_plugin.scenes import FORMATS

    result = CliRunner().invoke(main, ["formats"])
    assert result.exit_code == 0
    for name, form in FORMATS.items():
        assert f"{name} " in result.output and all(f",{option}=" in result.output for option in form.options)


def test_the_readme_names_every_format_and_option() -> None:
    from hess_plugin.scenes import FORMATS

    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for name, form in FORMATS.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        assert form.layout in row and all(f"`{option}`" in row for option in form.options)
