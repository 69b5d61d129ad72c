"""One process of a training run of the demo model: its state, its schedule, and its checkpoints."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hess_plugin.demo.data import Batch, make_batch, training_rooms
from hess_plugin.demo.losses import training_losses
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.demo.optimizer import fast_type, make_optimizers, set_learning_rate
from hess_plugin.demo.validation import validate, validation_set


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a training run; the command line has the same names."""

    out: str
    steps: int = 4000
    views: int = 48
    learning_rate: float = 3e-3
    warmup: int = 80
    decay: float = 0.6
    processes: int = 2
    average_every: int = 8
    save_every: int = 160
    validate_every: int = 160
    validation_scenes: int = 64
    curriculum_views: int = 120_000
    device: str = "cpu"
    seed: int = 0


class Trainer:
    """One process of a training run."""

    def __init__(self, config: TrainConfig, rank: int = 0) -> None:
        self.config, self.rank = config, rank
        self.device = torch.device(config.device)
        torch.manual_seed(config.seed)
        self.model = TinyVGGT().to(self.device)
        self.matcher = nn.Linear(self.model.config.dim, 64).to(self.device)
        self.trained = nn.ModuleDict({"model": self.model, "matcher": self.matcher})
        self.average = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.dtype = fast_type(self.device)
        self.optimizers = make_optimizers(self.trained, self.dtype)
        self.step = 0
        self.out = Path(config.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = _Log(self.out / "training_log.txt") if rank == 0 else None
        self.validation: Batch | None = None
        self.running: dict[str, float] = {}

    @property
    def views_seen(self) -> int:
        """Training views of all processes so far."""
        return self.step * self.config.views * self.config.processes

    def run(self, abandoned: Callable[[], bool] = lambda: False) -> None:
        """Train to the last step, from the latest checkpoint if there is one, unless `abandoned`."""
        self.load()
        if self.log is not None:
            self.log.write(_banner(self.config, self.model, self.step))
        while self.step < self.config.steps and not abandoned():
            self.train_step()
            self.step += 1
            if self.step % self.config.average_every == 0 or self.step == self.config.steps:
                self.average_processes()
                self.update_average()
            if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                self.save()
            if self.step % self.config.validate_every == 0 or self.step == self.config.steps:
                self.validate()

    def train_step(self) -> None:
        """One update from freshly rendered rooms."""
        seen = self.views_seen
        batch = self.draw().to(self.device)
        rate = self.learning_rate()
        set_learning_rate(self.optimizers, rate)
        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            predictions = self.model(batch.images)
        losses = training_losses(predictions, batch, self.matcher)
        # The camera comes last: weighed heavily from the start, it stays at the mean and holds the rest back.
        early = min(1.0, seen / (1.5 * self.config.curriculum_views))
        loss = (
            (1 + 2 * early) * losses["camera"]
            + losses["points"]
            + losses["depth"]
            + (0.5 - 0.35 * early) * losses["match"]
        )
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        if torch.isfinite(norm):
            for optimizer in self.optimizers:
                optimizer.step()
        for name, value in losses.items():
            latest = value.item()
            self.running[name] = 0.98 * self.running.get(name, latest) + 0.02 * latest

    def draw(self) -> Batch:
        """The rooms of this step: few views on narrow sectors at first, many on wide ones later."""
        config, seen = self.config, self.views_seen
        progress = min(1.0, seen / config.curriculum_views)
        choices = (2, 2, 4, 4) if progress < 0.5 else (3, 4, 6, 8) if progress < 1 else (2, 4, 4, 6, 8, 8, 12)
        # The same number of views on every process, so that none waits for another.
        draw = torch.randint(len(choices), (), generator=torch.Generator().manual_seed(self.step + 10**6 * config.seed))
        views = choices[int(draw)]
        scenes = max(1, config.views // views)
        world = config.processes
        return make_batch(training_rooms(self.step, self.rank, world, scenes, views, 35 + 50 * progress, config.seed))

    def learning_rate(self) -> float:
        """Linear warm-up, constant, then linear to zero over the last part of the steps."""
        left = 1 - self.step / self.config.steps
        return self.config.learning_rate * min(1.0, (self.step + 1) / self.config.warmup, left / self.config.decay)

    @torch.no_grad()
    def average_processes(self) -> None:
        """Local SGD: set the parameters of all processes to their mean."""
        if self.config.processes == 1:
            return
        parameters = list(self.trained.parameters())
        flat = nn.utils.parameters_to_vector(parameters)
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat / self.config.processes, parameters)

    @torch.no_grad()
    def update_average(self) -> None:
        """Follow the parameters with an exponential mean over the last tenth of the run, at most."""
        horizon = min(0.1 * self.step + 2, 300.0)
        keep = (1 - 1 / horizon) ** self.config.average_every
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, 1 - keep)

    def validate(self) -> None:
        """Log how the averaged model does on the validation set."""
        if self.log is None:
            return
        if self.validation is None:
            self.validation = validation_set(self.config.validation_scenes).to(self.device)
        model = TinyVGGT(self.model.config).to(self.device)
        model.load_state_dict(self.average)
        rows = "  ".join(f"v{count} {validate(model, self.validation.first(count))}" for count in (4, 8))
        losses = " ".join(f"{name} {value:.3f}" for name, value in self.running.items())
        self.log.write(f"step {self.step} views {self.views_seen} lr {self.learning_rate():.1e} | {losses} | {rows}")

    def save(self) -> None:
        """Write this process's state; the step counts as saved once every process has written its own."""
        state = {
            "step": self.step,
            "trained": self.trained.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "running": self.running,
        }
        _write(self._state_path(self.step), lambda path: torch.save(state, path))
        if self.config.processes > 1:
            dist.barrier()
        if self.rank == 0:
            export_weights(self.average, self.out / "tiny_vggt.safetensors")
            _write(self.out / "latest", lambda path: path.write_text(f"{self.step}\n"))
        if self.config.processes > 1:
            dist.barrier()
        for old in self.out.glob(f"state-*-rank{self.rank}.pt"):
            if old != self._state_path(self.step):
                old.unlink()

    def load(self) -> None:
        """Go back to the latest checkpoint, if any."""
        latest = self.out / "latest"
        if not latest.exists():
            return
        state = torch.load(self._state_path(int(latest.read_text())), map_location=self.device, weights_only=True)
        self.step, self.average, self.running = state["step"], state["average"], state["running"]
        self.trained.load_state_dict(state["trained"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def _state_path(self, step: int) -> Path:
        return self.out / f"state-{step:07d}-rank{self.rank}.pt"


class _Log:
    """Appends lines with the seconds since this process began, to a file and to the screen."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, time.monotonic()

    def write(self, line: str) -> None:
        line = f"{time.monotonic() - self.start:7.0f} s  {line}"
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def export_weights(state: dict[str, Tensor], path: Path) -> None:
    """Write a model state as float16 safetensors, atomically."""
    from safetensors.torch import save_file

    half = {name: value.half().contiguous().cpu() for name, value in state.items()}
    _write(path, lambda temporary: save_file(half, str(temporary)))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    os.replace(temporary, path)


def _banner(config: TrainConfig, model: nn.Module, step: int) -> str:
    options = " ".join(f"--{f.name.replace('_', '-')} {getattr(config, f.name)}" for f in fields(config)[1:])
    parameters = sum(p.numel() for p in model.parameters())
    return (
        f"python -m hess_plugin.demo.train --out DIR {options} | from step {step} | "
        f"{parameters} parameters | "
        f"python {platform.python_version()} torch {torch.__version__} | {_processor()}, "
        f"{os.cpu_count()} CPUs, {torch.get_num_threads()} thread per process"
    )


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
