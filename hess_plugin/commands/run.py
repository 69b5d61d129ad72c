"""`hess-patch run`: somebody's own program, its models patched."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from hess_plugin.files import check_writable

from .options import COUNT, FILE, OUTPUT, selection_options
from .options import options as together
from .scoring import SCORE, score_options

# Defaults are left to `patch`, so that only what was given is handed on.
patch_options = together(
    click.option("--profile", type=FILE, help="Profile that divides budgets; without one they are uniform."),
    click.option("--any-weights", is_flag=True, help="Accept a profile that was calibrated on other weights."),
    score_options,
    click.option(
        "--sparsity",
        type=click.FloatRange(0, 1, max_open=True),
        help="Dropped share of patch-block pairs; 0.73 by default.",
    ),
    click.option(
        "--sparse-ratio", type=click.FloatRange(0, 1, max_open=True), help="rho of SparseVGGT, instead of a sparsity."
    ),
    click.option("--cdf-threshold", type=click.FloatRange(0, 1), help="tau of SparseVGGT, instead of a sparsity."),
    click.option(
        "--allocation",
        type=click.Choice(["uniform", "equal", "hess", "harm", "reverse", "uncapped", "random"]),
        help="How budgets are divided among heads; hess with a profile, else uniform by default. harm: over "
        "all layers at once, by curves that `calibrate --harm` measures.",
    ),
    click.option("--backend", metavar="NAME", help="Attention code; auto by default, which chooses."),
    click.option("--block-q", type=COUNT, help="Patch queries in a block; 128 by default."),
    click.option("--block-k", type=COUNT, help="Patch keys in a block; 64 by default."),
    selection_options,
    click.option(
        "--memory",
        type=click.Choice(["plain", "lean"]),
        help="lean runs heads and attention in chunks: less memory, the same outputs to rounding; plain by default.",
    ),
    click.option("--adapter", metavar="NAME", help="Adapter to use, where more than one claims a model."),
)


def _files(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    return [CompletionItem(begun, type="file")]


@click.command(
    short_help="Run your own program, its models patched.",
    context_settings={"allow_interspersed_args": False},  # the options of the command are its own
)
@patch_options
@click.option("--report", type=OUTPUT, help="JSON file to write: every patched model, measured sparsity by head.")
@click.option("--shell", is_flag=True, help="Print the variables that do it, for a shell to evaluate; run nothing.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, shell_complete=_files)
def run(command: tuple[str, ...], report: Path | None, shell: bool, **options: Any) -> None:
    """Run a program and patch every model it builds.

    COMMAND is what you would type without hess-patch, after two dashes:

    \b
      hess-patch run --sparsity 0.73 -- python demo.py --scene_dir kitchen
      hess-patch run --profile vggt.hess -- torchrun --nproc-per-node 2 eval.py
      eval "$(hess-patch run --shell --sparsity 0.73)"   # every later Python

    The program, its arguments, output and exit code are its own. What was patched, and the sparsity that was
    measured, is printed on standard error at its end. Without a profile, models are patched when they are built;
    with one, when its weights are loaded.
    """  # noqa: D301 (click wants the character)
    if not command and not shell:
        raise click.UsageError("COMMAND is missing: what you would type without hess-patch, as in: -- python demo.py.")
    if command and shell:
        raise click.UsageError("--shell prints variables and runs nothing; leave out the command.")
    wanted = _patch_arguments(options)
    from hess_plugin.auto.environment import OPTIONS, ROOT, TEMPORARY, environment_for, is_off, options_in_environment
    from hess_plugin.registration.files import name_files

    wanted = options_in_environment() | wanted  # a variable gives what the command leaves open
    _check(wanted)
    name_files(())  # paths that the program finds from any folder
    if report is not None:
        check_writable(report, ".json")
    if shell:
        _print_exports(environment_for(wanted, None if report is None else report.absolute()))
        return
    command = _resolved(command)
    if is_off():
        click.echo(f"hess-patch: {OPTIONS} is off: nothing will be patched.", err=True)
        _become(command, dict(os.environ))
    record = _fresh_record(report)
    root = {ROOT: str(os.getpid()), TEMPORARY: str(record) if report is None else ""}
    _become(command, {**os.environ, **environment_for(wanted, record), **root})


def _print_exports(variables: dict[str, str]) -> None:
    from hess_plugin.registration.files import VARIABLE

    files = {VARIABLE: os.environ[VARIABLE]} if VARIABLE in os.environ else {}  # --plugin put it there
    for name, value in {**variables, **files}.items():
        click.echo(f"export {name}={shlex.quote(value)}")


def _patch_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `patch`, JSON types: those that were given, checked as far as that goes without a model."""
    wanted = {name: value for name, value in options.items() if value is not None}
    wanted |= {"strict": False} if wanted.pop("any_weights") else {}
    context = click.get_current_context()
    chosen = [name for name in SCORE if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
    for name in SCORE:
        if name not in chosen:
            wanted.pop(name, None)
    profile = wanted.pop("profile", None)
    if "sparsity" in wanted and wanted.keys() & {"sparse_ratio", "cdf_threshold"}:
        raise click.UsageError("--sparsity and --sparse-ratio/--cdf-threshold were given; choose one of them.")
    if wanted.get("allocation") == "harm" and wanted.keys() & {"sparse_ratio", "cdf_threshold"}:
        raise click.UsageError("--allocation harm takes a --sparsity, no --sparse-ratio or --cdf-threshold.")
    if profile is None:
        needy = [f"--{name.replace('_', '-')}" for name in chosen]
        needy += ["--any-weights"] if "strict" in wanted else []
        needy += ["--allocation"] if wanted.get("allocation") not in (None, "uniform", "equal") else []
        if needy:
            raise click.UsageError(f"{needy[0]} needs a profile and none was given; add --profile.")
        return wanted
    return wanted | {"profile": str(profile.absolute())}


def _check(wanted: dict[str, Any]) -> None:
    """Refuse what every process of the program would refuse, before it runs for an hour."""
    if not wanted.keys() & {"profile", "backend", "pool_q", "pool_k"}:
        return  # click has looked at the others, and reading torch takes its time
    from hess_plugin.auto.beginning import check_options
    from hess_plugin.harm_curves import model_curves
    from hess_plugin.profiles import Profile

    options = dict(wanted)
    profile = options.pop("profile", None)
    loaded = Profile.load(profile) if isinstance(profile, str) else profile
    check_options(options, loaded)
    if loaded is not None and options.get("allocation") == "harm":
        model_curves(loaded, options.get("camera_weight"))


def _resolved(command: tuple[str, ...]) -> tuple[str, ...]:
    """The command as it can be executed; the name of a Python file means this Python."""
    first = command[0]
    if first.endswith(".py"):
        if not Path(first).is_file():
            raise click.UsageError(f"{first} does not exist; give the path of your program.")
        command = (sys.executable, *command)
    path = shutil.which(command[0])
    if path is None:
        found = Path(first)
        why = "it is a folder" if found.is_dir() else "it is not executable" if found.exists() else "no such program"
        raise click.UsageError(f"{first} cannot be run: {why}; give the command as you would type it.")
    if Path(path).name.startswith("python"):
        _check_flags(command)
    return command


def _check_flags(command: tuple[str, ...]) -> None:
    """Refuse the options of Python that keep the environment out."""
    words = iter(command[1:])
    for word in words:
        if not word.startswith("-") or word.startswith("--") or word == "-":
            return
        for place, letter in enumerate(word[1:], 1):
            if letter in "cm":
                return  # the rest is the program's
            if letter in "WX":
                if place == len(word) - 1:
                    next(words, None)
                break  # the rest of the word, or the next, is its value
            if letter in "IES":
                raise click.UsageError(
                    f"python {word} takes nothing from the environment, which is how models are found; leave out "
                    f"-{letter}, or call hess_plugin.auto_patch() in the program."
                )


def _fresh_record(report: Path | None) -> Path:
    """Where the processes note what they patched: an empty record in place of an earlier report, or a temporary one."""
    from hess_plugin.auto.record import begin_record

    if report is None:  # made by the first process that has something to note
        return Path(tempfile.gettempdir(), f"hess-patch-{secrets.token_hex(8)}.json")
    begin_record(report.absolute())
    return report.absolute()


def _become(command: tuple[str, ...], environment: dict[str, str]) -> None:
    """Put the program in the place of this process, so that signals, exit code and terminal are its own."""
    for name in ("SIGPIPE", "SIGXFSZ"):  # Python ignores them, and what is ignored stays so in the program
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by the shell
            stream.flush()
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        raise click.UsageError(f"{command[0]} cannot be run ({error.strerror}); check the command.") from error
