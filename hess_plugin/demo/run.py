"""The demo: calibrate the shipped model on synthetic rooms, patch it, and measure what the patch costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hess_plugin import __version__
from hess_plugin.block_choice import choice_text
from hess_plugin.calibration.calibrator import calibrate
from hess_plugin.calibration.harm import HarmSettings
from hess_plugin.evaluation.arms import Arm
from hess_plugin.evaluation.comparison import compare
from hess_plugin.evaluation.metrics import MetricSettings
from hess_plugin.evaluation.plots import head_sensitivity_map, trade_off
from hess_plugin.evaluation.records import Measurement, write_csv
from hess_plugin.evaluation.statistics import Summary, summarise
from hess_plugin.evaluation.tables import comparison_table
from hess_plugin.files import write_bytes
from hess_plugin.machine import describe_machine
from hess_plugin.presets import DEFAULT, find_preset
from hess_plugin.profiles import Profile
from hess_plugin.settings import make_settings

from .model import load_demo_model
from .scenes import RoomScenes

SPARSITIES = (0.35, 0.55, 0.73, 0.85)
ALLOCATIONS = ("uniform", "hess", "reverse")
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class DemoSettings:
    """Size of the demo; the defaults fit in four minutes on two cores.

    Attributes:
        calibration: scenes to calibrate on.
        test: other scenes to measure on.
        views: images of a scene.
        sparsities: targets to measure at.
        block: patch tokens in a query or key block; the demo's sequences are short, so its blocks are small.
        preset: measured beside the method as published, and recorded in the profile; that method alone by default.
    """

    calibration: int = 32
    test: int = 40
    views: int = 16
    sparsities: tuple[float, ...] = SPARSITIES
    block: int = 8
    preset: str = DEFAULT

    @property
    def harm(self) -> HarmSettings | None:
        """How the preset has harm measured; None if it does not go by it."""
        return HarmSettings.of_preset(self.preset, block_q=self.block, block_k=self.block)

    def arms(self, profile: Profile) -> list[Arm]:
        """What is compared, at every sparsity: the allocations with blocks chosen as published, and the preset."""
        arms = [Arm("dense")]
        for sparsity in self.sparsities:
            arms += [Arm(name, sparsity, name, preset=DEFAULT) for name in ALLOCATIONS]
            if self.preset != DEFAULT:
                allocation = find_preset(self.preset, profile).allocation(profile, sparsity)
                arms.append(Arm(self.preset, sparsity, allocation, preset=self.preset))
        return arms


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured and where it wrote it."""

    profile: Profile
    rows: list[Measurement]
    summaries: list[Summary]
    protocol: str
    files: tuple[Path, ...]


def run_demo(output: str | Path, settings: DemoSettings | None = None, progress: Progress | None = None) -> DemoResult:
    """Calibrate, compare and write profile, CSV, table and pictures into a directory.

    Runs on one thread: the sequences are short, and on a busy machine waiting for a second thread costs more than
    it gives.

    Args:
        output: directory, made if missing; files of an earlier demo are replaced.
        settings: size of the demo.
        progress: called as ``progress(stage, done, total, what)``.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(Path(output), settings or DemoSettings(), progress or _silent)
    finally:
        torch.set_num_threads(threads)


def _silent(stage: str, done: int, total: int, what: str) -> None:
    """Tell nobody."""


def _run(folder: Path, settings: DemoSettings, note: Progress) -> DemoResult:
    paths = {name: folder / name for name in ("demo.hess", "results.csv", "table.md", "heads.png", "trade_off.png")}
    for path in paths.values():
        path.unlink(missing_ok=True)  # results of an earlier demo must not stand beside the new profile
    model = load_demo_model()
    # A calibration that was killed goes on from its partial file; a demo killed later calibrates again.
    profile = calibrate(
        model,
        RoomScenes("calibration", settings.calibration, settings.views),
        output=paths["demo.hess"],
        harm=settings.harm,
        preset=None if settings.preset == DEFAULT else settings.preset,
        metadata={"weights": "shipped", "data": "synthetic rooms, calibration seeds", "views": settings.views},
        progress=lambda done, total, scene: note("calibrate", done, total, scene),
    )
    head_sensitivity_map(profile, paths["heads.png"])
    protocol = _protocol(settings) + _preset_text(settings, profile)
    arms = settings.arms(profile)
    runs, done = settings.test * len(arms), iter(range(settings.test * len(arms) + 1))
    rows = compare(
        model,
        RoomScenes("test", settings.test, settings.views),
        arms,
        profile=profile,
        metrics=MetricSettings(clouds=False),  # the table does not show them
        block_q=settings.block,
        block_k=settings.block,
        progress=lambda scene, arm: note("measure", next(done), runs, f"{scene} {arm}"),
    )
    note("measure", runs, runs, "")
    summaries = summarise(rows)
    write_csv(paths["results.csv"], rows, _provenance(settings))
    write_bytes(paths["table.md"], f"{comparison_table(summaries)}\n\n{protocol}\n".encode())
    trade_off(summaries, paths["trade_off.png"], caption=protocol)
    return DemoResult(profile, rows, summaries, protocol, tuple(paths.values()))


def _provenance(settings: DemoSettings) -> dict[str, Any]:
    return {
        "hess_plugin": __version__,
        "machine": describe_machine(),
        "views": settings.views,
        "calibration_scenes": settings.calibration,
        "block_q": settings.block,
        "block_k": settings.block,
        **({} if settings.preset == DEFAULT else {"preset": settings.preset}),
    }


def _protocol(settings: DemoSettings) -> str:
    return (
        f"Demo model on synthetic rooms: {settings.test} test scenes x {settings.views} views, profile from "
        f"{settings.calibration} other scenes, blocks {settings.block} x {settings.block}, mean ± standard error over "
        "scenes. AUC in points; ATE after Umeyama on camera centres, point error after Umeyama on the points of the "
        "same pixels, trimmed once, both in units of the mean distance of true points to the first camera; "
        f"seconds of one forward, too short a sequence to gain from skipping (benchmarks/end_to_end.py has longer "
        f"ones). hess-plugin {__version__}; {describe_machine()}."
    )


def _preset_text(settings: DemoSettings, profile: Profile) -> str:
    """What the preset does, if one is measured beside the method as published."""
    if settings.preset == DEFAULT:
        return ""
    made = make_settings(
        profile=profile, preset=settings.preset, block_q=settings.block, block_k=settings.block, sparsity=0.5
    )
    return f" {settings.preset}: {choice_text(made)}, budgets by {made.allocation}; the others choose by mass."
