"""Several processes share a calibration: the profile is that of one process, and whatever stops one stops all."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import nn

from hess_plugin import HessError, Profile, Scene, calibrate
from hess_plugin.calibration.harm import HarmSettings
from hess_plugin.calibration.launch import Launch, launch
from hess_plugin.calibration.ranks import RankLost, Ranks, RankStopped, launched
from hess_plugin.calibration.record import Findings
from hess_plugin.cli import main
from hess_plugin.commands import options
from hess_plugin.demo.model import TinyVGGT, TinyVGGTConfig
from hess_plugin.demo.rooms import make_scene
from hess_plugin.scenes.writing import write_folder

WORKER = Path(__file__).with_name("rank_worker.py")
ANY_DISTANCE = 1e6
GO_ON = "run the same command again to go on."
SHARED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for found in sockets:
            found.bind(("127.0.0.1", 0))
        return [int(found.getsockname()[1]) for found in sockets]


@contextlib.contextmanager
def started(commands: list[list[str]], log: Path, each: Callable[[int], dict[str, str]]) -> Iterator[Any]:
    """Run processes that write to `log`; none outlives the test."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as out:
        running = [
            subprocess.Popen(command, env={**environment, **each(i)}, stdout=out, stderr=out)
            for i, command in enumerate(commands)
        ]
        try:
            yield running
        finally:
            for process in running:
                process.kill()
                process.wait()


# ---------------------------------------------------------------- the function, in three, two and three ranks


class Told:
    """How every scenario of rank_worker ended in every rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outcomes = [json.loads((folder / f"outcome-{rank}.json").read_text()) for rank in range(3)]

    def of(self, name: str, key: str) -> list[Any]:
        return [outcome[name][key] for outcome in self.outcomes if name in outcome]

    def errors(self, name: str) -> list[tuple[str, str]]:
        return [tuple(error) for error in self.of(name, "error")]

    def profiles(self, name: str, ranks: int) -> list[bytes]:
        """The profile of every rank and the file, without the date."""
        paths = [self.folder / f"{name}-{rank}.hess" for rank in range(ranks)]
        return [undated(path) for path in [*paths, *self.folder.glob(f"{name}.hess")]]

    def kept(self, name: str) -> list[str]:
        """The scenes in the partial file."""
        data = (self.folder / f"{name}.hess.partial").read_bytes()
        return sorted(Findings.unpack(data)[0].digests)


def undated(path: Path) -> bytes:
    created = str(Profile.load(path).metadata["created"]).encode()
    data = path.read_bytes()
    assert data.count(created) == 1
    return data.replace(created, b"")


def make_model() -> TinyVGGT:
    torch.manual_seed(0)
    model = TinyVGGT(TinyVGGTConfig(dim=32, num_heads=4, depth=2, stem=16, camera_depth=1)).eval()
    nn.init.normal_(model.camera_head.pose_branch.weight, std=0.1)
    return model


def make_scenes() -> list[Scene]:
    """The scenes of rank_worker: in three ranks, rank 0 has the first and the fourth."""
    rooms = [make_scene(seed, views=3) for seed in (41, 42, 43, 44)]
    return [rooms[0], replace(rooms[1], depth=None, name="flat").subset([0, 1]), *rooms[1:]]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder = tmp_path_factory.mktemp("ranks")
    safetensors.torch.save_file(make_model().state_dict(), folder / "model.safetensors")
    (folder / "file").write_text("")
    (folder / "damaged.hess.partial").write_text("no record")
    ports = [str(port) for port in free_ports(3)]
    commands = [[sys.executable, str(WORKER), str(folder), str(rank), *ports] for rank in range(3)]
    log = folder / "log"
    with started(commands, log, lambda rank: {}) as running:
        codes = [process.wait(timeout=240) for process in running]
    assert codes == [0, 0, -signal.SIGKILL], log.read_text()
    return Told(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The profile that one process makes of all scenes, without the date."""
    path = tmp_path_factory.mktemp("alone") / "a.hess"
    calibrate(make_model(), make_scenes(), output=path, eps=ANY_DISTANCE)
    return undated(path)


@pytest.mark.slow
def test_any_number_of_ranks_makes_the_profile_of_one(told: Told, alone: bytes) -> None:
    assert told.profiles("two", ranks=2) == [alone] * 3
    assert told.profiles("three", ranks=3) == [alone] * 4


@pytest.mark.slow
def test_each_rank_reads_and_measures_its_own_scenes_only(told: Told) -> None:
    assert told.of("three", "read") == [["room-41", "room-43"], ["flat", "room-44"], ["room-42"]]
    assert told.of("two", "read") == [["room-41", "room-42", "room-44"], ["flat", "room-43"]]
    assert told.of("three", "measured") == [2, 2, 1]


@pytest.mark.slow
def test_bytes_of_any_length_are_exchanged(told: Told) -> None:
    assert [outcome["exchanged"] for outcome in told.outcomes] == [True] * 3


@pytest.mark.slow
def test_ranks_without_a_scene_get_the_profile_too(told: Told, tmp_path: Path) -> None:
    calibrate(make_model(), make_scenes()[:1], output=tmp_path / "a.hess", eps=ANY_DISTANCE)
    assert told.profiles("few", ranks=3) == [undated(tmp_path / "a.hess")] * 4
    assert told.of("few", "measured") == [1, 0, 0]


@pytest.mark.slow
def test_harm_curves_are_shared_like_traces(told: Told, tmp_path: Path) -> None:
    how: dict[str, Any] = {"eps": ANY_DISTANCE, "harm": HarmSettings(block_q=8, block_k=8)}
    assert calibrate(make_model(), make_scenes(), output=tmp_path / "a.hess", **how).has_harm
    assert told.profiles("harm", ranks=3) == [undated(tmp_path / "a.hess")] * 4
    assert told.of("harm", "measured") == [4, 3, 2]  # two forwards a scene, one where there is no error
    assert all("rank 1 has harm = {" in sentence for _, sentence in told.errors("other harm"))


@pytest.mark.slow
def test_a_rank_that_raises_stops_the_others_and_any_number_goes_on(told: Told, alone: bytes) -> None:
    failed, stopped = (
        ("MemoryError", "no more\nof it"),
        ("RankStopped", f"rank 1 stopped: MemoryError: no more of it; {GO_ON}"),
    )
    assert told.errors("raises") == [stopped, failed, stopped]  # in the first round, of three
    assert told.errors("raises again") == [stopped, failed]  # in the second, of two
    # Rank 0 had scene 1 of 5; then it measured 3 and, while rank 1 failed on 4, 5. Only 4 is left.
    assert told.of("raises again", "measured") == [2, 2]
    assert told.of("resumed", "measured") == [1, 0, 0]
    assert told.profiles("resumed", ranks=3) == [alone] * 3 and (told.folder / "raises.hess").exists()
    assert undated(told.folder / "raises.hess") == alone and not (told.folder / "raises.hess.partial").exists()


@pytest.mark.slow
def test_a_scene_that_changed_is_measured_again_by_whom_it_falls_to(told: Told, tmp_path: Path) -> None:
    scenes = make_scenes()
    scenes[2] = replace(scenes[4], name=scenes[2].name)
    calibrate(make_model(), scenes, output=tmp_path / "a.hess", eps=ANY_DISTANCE)
    assert told.profiles("changed", ranks=3) == [undated(tmp_path / "a.hess")] * 4
    assert told.of("changed", "measured") == [1, 1, 1]  # the fourth, the fifth, and the changed third


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, origin, error, reason",
    [
        ("malformed", 1, ("SceneError", "Scene file cameras.json is not JSON."), "Scene file cameras.json is not JSON"),
        ("interrupted", 0, ("KeyboardInterrupt", ""), "interrupted"),
        (
            "full disk",
            0,
            ("OSError", "[Errno 28] No space left on device"),
            "OSError: [Errno 28] No space left on device",
        ),
    ],
)
def test_what_stops_one_rank_is_told_by_all(
    told: Told, name: str, origin: int, error: tuple[str, str], reason: str
) -> None:
    wanted = [("RankStopped", f"rank {origin} stopped: {reason}; {GO_ON}")] * 3
    wanted[origin] = error
    assert told.errors(name) == wanted
    assert not (told.folder / f"{name}.hess").exists()
    kept = {"malformed": ["flat", "room-41", "room-42", "room-43"], "interrupted": ["flat", "room-41", "room-42"]}
    assert told.kept(name) == kept.get(name, ["flat", "room-41", "room-42", "room-43", "room-44"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, sentence",
    [
        ("other eps", "rank 1 has eps = 1000001.0, rank 0 has 1000000.0; give every rank the same"),
        ("other names", "rank 2 has scene 0 = 'mine', rank 0 has 'room-41'; give every rank the same"),
        ("fewer scenes", "rank 2 has scene 4 = None, rank 0 has 'room-44'; give every rank the same"),
        ("other weights", "rank 2 has model_digest = '"),
        ("twice", "two scenes are called 'room-41'"),
        ("iterator", "scenes is of type list_iterator, which 3 ranks cannot share; give a list"),
        ("nothing", "none of 1 scenes gave a usable error: Scene flat has 2 views"),
    ],
)
def test_what_is_wrong_for_all_is_told_alike_by_all(told: Told, name: str, sentence: str) -> None:
    errors = told.errors(name)
    assert errors == [errors[0]] * 3
    assert errors[0][0] == "CalibrationError" and errors[0][1].startswith(sentence)
    if name not in {"twice", "nothing"}:
        assert told.of(name, "measured") == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name, sentence", [("damaged", "is damaged"), ("no folder", "cannot be written")])
def test_what_is_wrong_with_the_file_of_rank_0_stops_all_before_any_scene(told: Told, name: str, sentence: str) -> None:
    first, *others = told.errors(name)
    assert sentence in first[1] and others == [("RankStopped", f"rank 0 stopped: {first[1]}")] * 2
    assert told.of(name, "measured") == [0, 0, 0]


@pytest.mark.slow
def test_a_rank_that_is_gone_is_noticed_at_once(told: Told) -> None:
    for name, end in (("left", "was killed or cut off."), ("killed", f"was killed or cut off; {GO_ON}")):
        assert [kind for kind, _ in told.errors(name)[:2]] == ["RankLost"] * 2
        assert all(text.endswith(end) for _, text in told.errors(name)[:2])
        assert max(told.of(name, "seconds")) < 20


@pytest.mark.slow
def test_what_a_killed_rank_leaves_is_resumed_by_one_process(
    told: Told, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Rank 2 died in the second round; of that round rank 0 keeps its own scene.
    assert told.kept("killed") == ["flat", "room-41", "room-42", "room-43"]
    scenes, measured = [*make_scenes(), make_scene(45, views=3)], []
    model = make_model()
    model.register_forward_pre_hook(lambda *_: measured.append(1))
    calibrate(model, scenes, output=told.folder / "killed.hess", eps=ANY_DISTANCE)
    assert len(measured) == 2
    calibrate(make_model(), scenes, output=tmp_path / "a.hess", eps=ANY_DISTANCE)
    assert undated(told.folder / "killed.hess") == undated(tmp_path / "a.hess")


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    for seed in range(51, 61):
        write_folder(make_scene(seed, views=3), folder / f"room-{seed}")
    return f"folder:{folder}"


def command(data: str, output: Path) -> list[str]:
    return ["calibrate", "--model", "demo", "--data", data, "-o", str(output)]


def torchrun(count: int, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *arguments]


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until the first scene is on disk."""
    until = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_interrupted_and_resumed_commands_end_with_the_profile_of_one(data: str, tmp_path: Path) -> None:
    output, partial = tmp_path / "a.hess", tmp_path / "a.hess.partial"
    hess_patch = Path(sys.executable).with_name("hess-patch")

    # Three processes, started by hand; one is killed.
    environment = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    commands = [[str(hess_patch), *command(data, output)]] * 3
    log = tmp_path / "killed"
    with started(commands, log, lambda rank: {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}) as running:
        wait_for(partial, running[0])
        running[2].kill()
        assert [process.wait(timeout=60) for process in running] == [1, 1, -signal.SIGKILL]
    sentences = [line for line in log.read_text().splitlines() if line.startswith("Error: ")]
    assert len(sentences) == 2 and all("it was killed or cut off; run the same command" in line for line in sentences)
    assert "Traceback" not in log.read_text()
    first = Findings.unpack(partial.read_bytes())[0].digests

    # Two by torchrun, interrupted as by Ctrl-C.
    log = tmp_path / "interrupted"
    with started([torchrun(2, "-m", "hess_plugin.cli", *command(data, output))], log, lambda _: {}) as running:
        until = time.monotonic() + 120
        while len(second := Findings.unpack(partial.read_bytes())[0].digests) <= len(first):
            assert running[0].poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.01)
        running[0].send_signal(signal.SIGINT)
        assert running[0].wait(timeout=60) != 0
    assert f"Interrupted; {partial} holds the finished scenes; {GO_ON}" in log.read_text()
    assert log.read_text().count("Interrupted; ") == 1 and first.items() < second.items()

    # Two by torchrun, to the end.
    log = tmp_path / "whole"
    arguments = ["--no-python", str(hess_patch), *command(data, output)]
    with started([torchrun(2, *arguments)], log, lambda _: {}) as running:
        assert running[0].wait(timeout=240) == 0, log.read_text()
    assert log.read_text().count(f"wrote {output}") == 1 and not partial.exists()
    result = CliRunner().invoke(main, command(data, tmp_path / "one.hess"))
    assert result.exit_code == 0, result.output
    assert undated(output) == undated(tmp_path / "one.hess")


@pytest.mark.slow
def test_a_mistake_is_told_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    arguments = command(f"folder:{tmp_path / 'nowhere'}", tmp_path / "a.hess")
    with started([torchrun(3, "-m", "hess_plugin.cli", *arguments)], log, lambda _: {}) as running:
        assert running[0].wait(timeout=120) == 1
    assert [line for line in log.read_text().splitlines() if "nowhere does not exist" in line] == [
        line for line in log.read_text().splitlines() if line.startswith("Error: ")
    ]
    assert log.read_text().count("Error: Scene folder") == 1


@pytest.mark.slow
def test_a_rank_killed_under_torchrun_leaves_a_word_how_to_go_on(data: str, tmp_path: Path) -> None:
    partial, log = tmp_path / "a.hess.partial", tmp_path / "log"
    arguments = torchrun(2, "-m", "hess_plugin.cli", *command(data, tmp_path / "a.hess"))
    with started([arguments], log, lambda _: {}) as running:
        wait_for(partial, running[0])
        os.kill(rank_of(running[0].pid, 1), signal.SIGKILL)
        assert running[0].wait(timeout=60) == 1
    assert log.read_text().count(GO_ON) == 1 and partial.exists()


def rank_of(launcher: int, rank: int) -> int:
    """The process of a rank that torchrun started."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # others come and go
            ours = f"PPid:\t{launcher}\n" in (process / "status").read_text()
            if ours and f"\0LOCAL_RANK={rank}\0".encode() in (process / "environ").read_bytes():
                return int(process.name)
    raise AssertionError(f"{launcher} has no rank {rank}")


@pytest.mark.parametrize(
    "given, gpus, environment, wanted",
    [
        ("auto", True, SHARED, "cuda:1"),
        ("cuda", True, SHARED, "cuda:1"),
        ("cuda:0", True, SHARED, "cuda:0"),
        ("cpu", True, SHARED, "cpu"),
        ("auto", False, SHARED, "cpu"),
        ("auto", True, {}, "cuda"),
        ("auto", True, {**SHARED, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "cuda"),
    ],
)
def test_each_rank_takes_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, given: str, gpus: bool, environment: dict[str, str], wanted: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    for name in SHARED:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert options._own_device(given) == wanted


# ---------------------------------------------------------------- alone


def test_a_process_that_no_launcher_started_is_alone() -> None:
    assert launch({}) == launch({"WORLD_SIZE": "4"}) == launch({**SHARED, "WORLD_SIZE": "1"}) == Launch(0, 1, None)
    assert launch(SHARED) == Launch(1, 2, 1)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"RANK": "x"}, "RANK is 'x' in the environment, wanted a number"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1' in the environment"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '' in the environment"),
        ({"RANK": "2"}, "RANK is 2 in the environment beside WORLD_SIZE 2; start all 2 processes with torchrun"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is missing in the environment beside WORLD_SIZE 2"),
    ],
)
def test_an_environment_that_is_not_of_a_launcher_is_told(change: dict[str, str], sentence: str) -> None:
    with pytest.raises(HessError, match=sentence):
        launch({**SHARED, **change})


def test_processes_that_do_not_come_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime

    from hess_plugin.calibration import ranks

    monkeypatch.setattr(ranks, "_MEETING", datetime.timedelta(seconds=1))
    for name, value in {**SHARED, "RANK": "0", "MASTER_PORT": str(free_ports(1)[0])}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(
            HessError, match=r"the 2 processes could not all be connected at 127\.0\.0\.1:\d+ \(.*WORLD_SIZE"
        ),
        launched(),
    ):
        pytest.fail("there is no second process")
    with pytest.raises(HessError, match=r"torch\.distributed has no process group yet; call init"), Ranks.of_all():
        pytest.fail("there is no process group")


def test_alone_errors_are_as_they_were_raised() -> None:
    ranks = Ranks()
    with ranks.together(GO_ON):
        assert ranks.exchange(b"abc") == [b"abc"]
        ranks.agree({"a": [1, None, "x"]})
    for error in (ValueError("a"), KeyboardInterrupt(), RankLost("b"), RankStopped("c")):
        with pytest.raises(type(error)) as caught, ranks.together("hint"):
            raise error
        assert caught.value is error
    with ranks.together():  # it can be used again
        assert ranks.exchange(b"") == [b""] and not ranks.stopped
