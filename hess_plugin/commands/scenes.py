"""`hess-patch convert`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from hess_plugin.exceptions import SceneError
from hess_plugin.files import check_writable
from hess_plugin.terminal import progress_bars

from .options import COUNT, FOLDER, options, scene_options

_SIZE = ("resolution", "multiple", "framing")


@click.command(short_help="Write scenes of any format as plain folders.")
@scene_options
@options(
    click.option("--resolution", type=COUNT, help="Image size in pixels; the images' own by default."),
    click.option("--multiple", type=COUNT, help="Make the images' sides multiples of this many pixels."),
    click.option(
        "--framing",
        type=click.Choice(["longest", "area", "crop", "pad"]),
        help="How images get there: whole by their longest side (default) or area, cropped, padded.",
    ),
)
@click.option("-o", "--output", required=True, type=FOLDER, help="Folder to write; one folder a scene in it.")
def convert(output: Path, scenes: int | None, **options: Any) -> None:
    """Write scenes of any format as folders that every command reads back as folder:DIR.

    A killed conversion goes on where it stopped: run the same command again.
    """
    check_writable(output / "scene")
    from hess_plugin.scenes.image_set import require_truth
    from hess_plugin.scenes.reading import read_scenes
    from hess_plugin.scenes.scene import Scene
    from hess_plugin.scenes.writing import write_folder

    found = read_scenes(
        options["data"], scenes=scenes, views=options["views"], seed=options["seed"], framing=_framing(options)
    )
    origin = {**options, "data": list(options["data"])}
    folders = [output / name for name in _folder_names(found.names)]
    missing = [i for i, folder in enumerate(folders) if not _is_finished(folder, origin)]
    try:
        with progress_bars() as note:
            for done, i in enumerate(missing):
                note("convert", done, len(missing), found.names[i])
                scene = found[i]
                require_truth(scene, "converting")
                assert isinstance(scene, Scene)  # all that is left
                write_folder(scene, folders[i], origin=origin)
            note("convert", len(missing), len(missing), "")
    except KeyboardInterrupt:
        click.echo("\nInterrupted; finished scenes are kept; run the same command again to go on.", err=True)
        sys.exit(130)
    click.echo(
        f"wrote {len(missing)} scenes to {output} ({len(folders) - len(missing)} were there): --data folder:{output}"
    )


def _framing(options: dict[str, Any]) -> Any:
    """The size asked for, or None: the images as they are."""
    from hess_plugin.framing import Framing

    if all(options[name] is None for name in _SIZE):
        return None
    return Framing(options["multiple"] or 1, options["resolution"], options["framing"] or "longest")


def _folder_names(names: Sequence[str]) -> list[str]:
    """One folder name for each scene: folder:DIR looks one level down and a name may hold any character."""
    result = [re.sub(r"[^\w.+-]+", "_", name).lstrip(".") or "scene" for name in names]
    first: dict[str, str] = {}
    for name, folder in zip(names, result, strict=True):
        if first.setdefault(folder, name) != name:
            raise SceneError(
                f"Scenes {first[folder]} and {name} would both be written as {folder}; give them different outputs."
            )
    return result


def _is_finished(folder: Path, origin: dict[str, Any]) -> bool:
    """Whether this very command wrote the scene before; a folder of anything else is left alone."""
    from hess_plugin.scenes.formats.folder import CAMERAS

    if not folder.exists():
        return False
    try:
        record = json.loads((folder / CAMERAS).read_text(encoding="utf-8"))
        same = record.get("origin") == origin
    except (OSError, ValueError, AttributeError):
        same = False
    if not same:
        raise SceneError(
            f"Scene folder {folder} exists and is not what these options write; remove it or write elsewhere."
        )
    return True


@click.command(short_help="List the formats of scenes and their options.")
def formats() -> None:
    """List the formats of scenes that --data reads, and their options."""
    from hess_plugin.scenes.reading import FORMATS

    width = max(len(name) for name in FORMATS)
    for name, form in FORMATS.items():
        click.echo(f"{name:{width}}  {form.layout}")
        for option, meaning in form.options.items():
            click.echo(f"{'':{width}}  ,{option}=...  {meaning}")
