"""`hess-patch completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = {
    "bash": 'eval "$(hess-patch completion bash)"          # in ~/.bashrc',
    "zsh": 'eval "$(hess-patch completion zsh)"           # in ~/.zshrc',
    "fish": "hess-patch completion fish | source          # in ~/.config/fish/config.fish",
}


@click.command(
    short_help="Print what lets a shell complete commands and options.",
    epilog="\b\n" + "\n".join(SHELLS.values()),
)
@click.argument("shell", type=click.Choice(list(SHELLS)))
def completion(shell: str) -> None:
    """Print a script that lets a shell complete the commands, options and values of hess-patch."""
    group = click.get_current_context().find_root().command
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(group, {}, "hess-patch", "_HESS_PATCH_COMPLETE").source())
