"""``--plugin FILE``: an adapter in a file, for one command; before or after the command's name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from hess_plugin.exceptions import AdapterError
from hess_plugin.registration.files import VARIABLE, name_files


def _name(context: click.Context, parameter: click.Parameter, paths: tuple[Path, ...]) -> None:
    """Put the files into the environment, for every plugin manager here and in processes started from here."""
    if not paths or context.resilient_parsing:
        return
    before = os.environ.get(VARIABLE)
    try:
        name_files(paths)
    except AdapterError as error:
        raise click.BadParameter(str(error), context, parameter) from error
    context.find_root().call_on_close(lambda: _put_back(before))


def _put_back(before: str | None) -> None:
    """Undo for callers in the same process; a command line ends here anyway."""
    if before is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = before


plugin_option = click.option(
    "--plugin",
    "plugin_files",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    expose_value=False,
    callback=_name,
    help="Python file with an adapter, besides those installed; several allowed.",
)


def with_plugins(command: click.Command) -> Any:
    """Let a command that takes a model take ``--plugin`` as well: people type it on either side of its name."""
    if any(parameter.name == "model" for parameter in command.params) or command.name in ("plugins", "run"):
        return plugin_option(command)
    return command
