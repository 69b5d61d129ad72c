"""The command line `hess-patch`: the group of its commands."""

from __future__ import annotations

import sys

import click

from hess_plugin import __version__
from hess_plugin.commands.bench import bench
from hess_plugin.commands.calibration import calibrate
from hess_plugin.commands.checking import check
from hess_plugin.commands.completion import completion
from hess_plugin.commands.demo import demo
from hess_plugin.commands.doctor import doctor
from hess_plugin.commands.evaluation import evaluate
from hess_plugin.commands.models import plugins, sites
from hess_plugin.commands.plugin_option import plugin_option, with_plugins
from hess_plugin.commands.profiles import compare, show
from hess_plugin.commands.report import report
from hess_plugin.commands.run import run
from hess_plugin.commands.scenes import convert, formats
from hess_plugin.commands.sweep import sweep
from hess_plugin.commands.verification import verify
from hess_plugin.terminal import Group


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hess-patch")
@plugin_option
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def main(verbose: bool) -> None:
    """Make VGGT-family models fast: calibrate once, patch, run, undo."""
    started = sys.modules.get("hess_plugin.auto.starting")
    if started is not None:  # where a shell has the variables of `run --shell`
        started.stand_aside()


for _command in (
    demo,
    calibrate,
    show,
    compare,
    verify,
    evaluate,
    sweep,
    report,
    bench,
    doctor,
    run,
    sites,
    plugins,
    check,
    formats,
    convert,
    completion,
):
    main.add_command(with_plugins(_command))


if __name__ == "__main__":
    main(prog_name="hess-patch")
