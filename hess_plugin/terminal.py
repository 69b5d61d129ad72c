"""How the command line talks: mistakes as one sentence, progress on a terminal, warnings on one line."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import click

from .exceptions import HessError

if TYPE_CHECKING:
    from .calibration.ranks import Ranks

Progress = Callable[[str, int, int, str], None]


class Group(click.Group):
    """A group of commands that shows a user's mistake as one sentence and everything else as it is."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands in the order in which they were added: that of the work, not of the alphabet."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        shown = warnings.formatwarning
        try:
            with warnings.catch_warnings():
                warnings.formatwarning = _one_line_warning
                # Upstream VGGT calls a deprecated name in every forward; nothing the user can do about it.
                warnings.filterwarnings("ignore", message=r".*torch\.cuda\.amp\.autocast", category=FutureWarning)
                return super().invoke(ctx)
        except (HessError, OSError) as error:  # OSError: a disk that is full, a folder that is a file, ...
            if ctx.params.get("verbose") or isinstance(error, BrokenPipeError):
                raise
            raise click.ClickException(_sentence(error)) from error
        finally:
            warnings.formatwarning = shown


def _sentence(error: HessError | OSError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; check the path and your rights to it."
    return str(error)


def _one_line_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> str:
    return f"Warning: {' '.join(str(message).split())}\n"


def warn_random() -> None:
    """Say loudly that random weights prove nothing."""
    if not first_rank():
        return
    click.secho(
        "WARNING: random weights. Any profile or figure made with them means nothing about the real model.",
        fg="red",
        bold=True,
        err=True,
    )


def first_rank() -> bool:
    """Whether this process is the one that speaks, of those that torchrun started."""
    from .calibration.launch import launch

    return launch().rank == 0


@contextmanager
def one_voice() -> Iterator[Ranks]:
    """Run a command together with the other processes that torchrun started, if any; rank 0 tells what stopped all."""
    from .calibration.ranks import launched

    with launched() as ranks, _ended_by_launcher() if ranks.size > 1 and ranks.rank == 0 else nullcontext():
        try:
            with ranks.together():
                yield ranks
        except (click.ClickException, HessError, OSError) as error:
            if ranks.rank == 0 or not ranks.stopped or click.get_current_context().find_root().params.get("verbose"):
                raise
            raise SystemExit(getattr(error, "exit_code", 1)) from None


@contextmanager
def _ended_by_launcher() -> Iterator[None]:
    """Take SIGTERM as an interrupt: torchrun sends it to all that are left when one has died, with no word to them."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt("Ended by SIGTERM, which torchrun sends when another rank has died")

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        # On its way out; a signal that comes now must not cut off the sentence that is about to be printed.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def progress_bars(shown: bool = True) -> Iterator[Progress]:
    """Show one progress bar a stage on standard error; silent when that is not a terminal, or not to be `shown`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (TextColumn("{task.fields[stage]}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(
        *columns, TextColumn("{task.fields[what]}"), console=console, disable=not (shown and console.is_terminal)
    ) as bars:
        tasks: dict[str, Any] = {}

        def note(stage: str, done: int, total: int, what: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task("", stage=stage, what=what, total=total)
            bars.update(tasks[stage], completed=done, total=total, what=what)

        yield note


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show on standard error that something takes its time; silent when that is not a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield
