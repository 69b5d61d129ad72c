"""One rank of those that test_ranks starts: goes through scenarios with the others and notes how each ended here.

Run as ``rank_worker.py FOLDER RANK PORT...``; FOLDER holds the model's weights.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch

from hess_plugin import Scene, SceneError, calibrate
from hess_plugin.calibration.harm import HarmSettings
from hess_plugin.calibration.ranks import Ranks, launched
from hess_plugin.demo.model import TinyVGGT, TinyVGGTConfig
from hess_plugin.demo.rooms import make_scene

EPS = 1e6
FOLDER = Path(sys.argv[1])
RANK, *PORTS = map(int, sys.argv[2:])
os.environ |= {"RANK": str(RANK), "LOCAL_RANK": str(RANK), "MASTER_ADDR": "127.0.0.1"}


def make_scenes() -> list[Scene]:
    """Four rooms, and one of two cameras and no points, which gives no error."""
    rooms = [make_scene(seed, views=3) for seed in (41, 42, 43, 44)]
    return [rooms[0], replace(rooms[1], depth=None, name="flat").subset([0, 1]), *rooms[1:]]


class Rooms(Sequence[Scene]):
    """Scenes that note which of them were read here; reading `broken` fails."""

    def __init__(self, scenes: Sequence[Scene], broken: int | None = None) -> None:
        self.scenes, self.broken = scenes, broken
        self.names = [scene.name for scene in scenes]
        self.read: list[str] = []

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: Any) -> Any:
        if index == self.broken:
            raise SceneError("Scene file cameras.json is not JSON.")
        self.read.append(self.names[index])
        return self.scenes[index]


class Worker:
    """What one rank needs for all scenarios."""

    def __init__(self) -> None:
        self.scenes = make_scenes()
        self.model = TinyVGGT(TinyVGGTConfig(dim=32, num_heads=4, depth=2, stem=16, camera_depth=1)).eval()
        self.model.load_state_dict(safetensors.torch.load_file(FOLDER / "model.safetensors"))
        self.measured = 0
        self.at_forward: Callable[[int], None] = lambda count: None
        self.model.register_forward_pre_hook(lambda *_: self.forward())
        self.outcome: dict[str, Any] = {}

    def forward(self) -> None:
        self.measured += 1
        self.at_forward(self.measured)

    @contextlib.contextmanager
    def other_weights(self, here: bool) -> Iterator[None]:
        weight = self.model.camera_head.pose_branch.weight.data
        original = weight.clone()
        weight += int(here)
        yield
        weight.copy_(original)

    def run(
        self,
        name: str,
        scenes: Any = None,
        at_forward: Callable[[int], None] = lambda count: None,
        output: str | None = None,
        leaves: bool = False,
        **options: Any,
    ) -> None:
        scenes = Rooms(self.scenes) if scenes is None else scenes
        options = {"eps": EPS, "output": FOLDER / f"{output or name}.hess", **options}
        self.measured, self.at_forward = 0, at_forward
        started, error = time.monotonic(), None
        try:
            with Ranks.of_all() as ranks:
                if leaves:
                    return
                calibrate(self.model, scenes, ranks=ranks, **options).save(FOLDER / f"{name}-{RANK}.hess")
        except BaseException as problem:
            error = [type(problem).__name__, str(problem)]
        self.outcome[name] = {
            "error": error,
            "seconds": time.monotonic() - started,
            "measured": self.measured,
            "read": getattr(scenes, "read", None),
        }
        (FOLDER / f"outcome-{RANK}.json").write_text(json.dumps(self.outcome))


def payload(rank: int, turn: int) -> bytes:
    """Bytes that differ by rank and turn, of lengths from none to a megabyte."""
    generator = random.Random(f"{rank} {turn}")
    return generator.randbytes(generator.choice([0, 1, 8, 9, 1000, 1 << 20]))


def exchanged(count: int) -> bool:
    """Whether every rank gets what every rank gives."""
    with Ranks.of_all() as ranks, ranks.together():
        return all(
            ranks.exchange(payload(RANK, turn)) == [payload(rank, turn) for rank in range(count)] for turn in range(50)
        )


def fail(rank: int, forward: int) -> Callable[[int], None]:
    def at_forward(count: int) -> None:
        if rank == RANK and count == forward:
            raise MemoryError("no more\nof it")

    return at_forward


def die(rank: int, forward: int) -> Callable[[int], None]:
    def at_forward(count: int) -> None:
        if rank == RANK and count == forward:
            os.kill(os.getpid(), signal.SIGKILL)

    return at_forward


def interrupt(done: int, total: int, scene: str) -> None:
    if done and scene:
        raise KeyboardInterrupt


def fill_disk(done: int, total: int, scene: str) -> None:
    if not scene:
        raise OSError(28, "No space left on device")


def scenarios(worker: Worker) -> None:
    """Three ranks, then two, then three: each `launched` anew."""
    scenes = worker.scenes
    with processes(3):
        worker.outcome["exchanged"] = exchanged(3)
        worker.run("three")
        worker.run("few", scenes=scenes[:1])
        worker.run("harm", harm=HarmSettings(block_q=8, block_k=8))
        worker.run("other harm", harm=HarmSettings(block_q=8, block_k=16 if RANK == 1 else 8))
        worker.run("raises", at_forward=fail(rank=1, forward=1))
    with processes(2) as taking_part:
        if taking_part:
            worker.run("two")
            worker.run("raises again", output="raises", at_forward=fail(rank=1, forward=2))
    with processes(3):
        worker.run("resumed", output="raises")
        worker.run("begun", output="changed", progress=interrupt)
        worker.run("changed", scenes=Rooms([*scenes[:2], replace(scenes[4], name=scenes[2].name), *scenes[3:]]))
        worker.run("malformed", scenes=Rooms(scenes, broken=4))
        worker.run("interrupted", progress=interrupt)
        worker.run("full disk", progress=fill_disk)
        worker.run("other eps", eps=EPS + (RANK == 1))
        worker.run("other names", scenes=[replace(scenes[0], name="mine"), *scenes[1:]] if RANK == 2 else scenes)
        worker.run("fewer scenes", scenes=Rooms(scenes[:4] if RANK == 2 else scenes))
        worker.run("twice", scenes=[scenes[0], scenes[2], replace(scenes[3], name=scenes[0].name)])
        worker.run("iterator", scenes=iter(scenes))
        worker.run("nothing", scenes=[scenes[1]])
        worker.run("damaged")
        worker.run("no folder", output="file/a" if RANK == 0 else "a")
        with worker.other_weights(RANK == 2):
            worker.run("other weights")
        worker.run("left", leaves=RANK == 2)
        worker.run("killed", at_forward=die(rank=2, forward=2), scenes=Rooms([*scenes, make_scene(45, views=3)]))


@contextlib.contextmanager
def processes(count: int) -> Iterator[bool]:
    """Meet `count` processes at the next port; False for those that are not among them."""
    os.environ["WORLD_SIZE"] = str(count)
    os.environ["MASTER_PORT"] = str(PORTS.pop(0))
    if count <= RANK:
        yield False
        return
    with launched() as ranks:
        assert (ranks.rank, ranks.size) == (RANK, count)
        yield True


if __name__ == "__main__":
    scenarios(Worker())
