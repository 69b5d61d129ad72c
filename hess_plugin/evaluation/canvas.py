"""Figures that touch none of the user's plotting state, written so that the same figures give the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hess_plugin.exceptions import HessError, MissingDependency
from hess_plugin.files import atomic_path


def new_figure(width: float, height: float) -> Any:
    """Make a figure, sizes in inches, without pyplot, whose global state and backend belong to the user.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency("pictures need matplotlib; pip install matplotlib.") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure as a PNG file, atomically.

    Raises:
        HessError: the name does not end in .png.
    """
    if Path(path).suffix.lower() != ".png":
        raise HessError(f"{path} cannot be written: pictures are PNG files; end the name with .png.")
    with atomic_path(path) as temporary:
        # No version inside: the same figures give the same file.
        figure.savefig(temporary, dpi=130, metadata={"Software": None})


def plain(text: str) -> str:
    """Text that matplotlib shows as it is: no formula between dollars, and no label hidden by an underscore."""
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")
