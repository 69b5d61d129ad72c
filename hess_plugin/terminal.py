"""How the command line talks: mistakes as one sentence, progress on a terminal, warnings on one line."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from .exceptions import HessError

Progress = Callable[[str, int, int, str], None]


class Group(click.Group):
    """A group of commands that shows a user's mistake as one sentence and everything else as it is."""

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
    click.secho(
        "WARNING: random weights. Any profile or figure made with them means nothing about the real model.",
        fg="red",
        bold=True,
        err=True,
    )


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Show one progress bar a stage on standard error; silent when that is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (TextColumn("{task.fields[stage]}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, TextColumn("{task.fields[what]}"), console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def note(stage: str, done: int, total: int, what: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task("", stage=stage, what=what, total=total)
            bars.update(tasks[stage], completed=done, total=total, what=what)

        yield note
