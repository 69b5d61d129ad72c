"""The loop over scenes: every rank measures one of its own, then all tell each other, until none has one left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import cast

from hess_plugin.exceptions import CalibrationError, SceneError
from hess_plugin.scenes.image_set import ImageSet
from hess_plugin.scenes.scene import Scene

from .measuring import Measurer
from .ranks import Ranks
from .record import Findings, Record

Progress = Callable[[int, int, str], None]
AnyScene = Scene | ImageSet


def scene_names(scenes: Iterable[AnyScene], ranks: Ranks) -> dict[str, str | int]:
    """Tell what can be told of scenes without reading them, for ranks to compare: their number and names.

    Raises:
        CalibrationError: several ranks are to share what can only be gone through from its beginning.
    """
    if ranks.size == 1:
        return {}
    if not isinstance(scenes, Sized) or not hasattr(scenes, "__getitem__"):
        raise CalibrationError(
            f"scenes is of type {type(scenes).__name__}, which {ranks.size} ranks cannot share; give a list, or a "
            "sequence that reads each scene when it is asked for."
        )
    names = getattr(scenes, "names", None)
    if names is None and isinstance(scenes, (list, tuple)):
        names = [scene.name for scene in scenes]
    return {"scenes": len(scenes), **{f"scene {i}": str(name) for i, name in enumerate(names or ())}}


def measure_all(
    measurer: Measurer, scenes: Iterable[AnyScene], record: Record, ranks: Ranks, progress: Progress | None
) -> list[str]:
    """Measure every scene that the record does not hold yet, whichever rank it falls to.

    Args:
        measurer: of the model.
        scenes: the same in every rank; each reads its own only.
        record: the same in every rank, with a file in rank 0; in the end all hold what all measured.
        ranks: who shares the work; a kill costs at most what is measured between two exchanges, a scene a rank.
        progress: as in `calibrate`, or None.

    Returns:
        The names of all scenes, in order.

    Raises:
        CalibrationError: two scenes have one name, or were measured against different targets.
        SceneError: a scene is malformed.
    """
    places: dict[str, int] = {}
    total = len(scenes) if isinstance(scenes, Sized) else 0
    own = _own(scenes, ranks)
    left = True
    while left:
        before = len(places)
        found = _next(own, measurer, record, places, progress, total)
        record.add(found or Findings())  # before the exchange: what rank 0 has is on disk, whoever dies meanwhile
        news = list(places.items())[before:]
        told = ranks.exchange((found or Findings()).pack(news=news, left=found is not None))
        left = found is not None
        for rank, data in enumerate(told):
            if rank == ranks.rank:
                continue
            theirs, header = Findings.unpack(data)
            for name, place in header["news"]:
                _place(places, name, place)
            record.add(theirs)
            left |= header["left"]
        _check_one_target(record, places)
    if progress is not None:
        progress(len(places), len(places), "")
    return sorted(places, key=places.__getitem__)


def _own(scenes: Iterable[AnyScene], ranks: Ranks) -> Iterator[tuple[int, AnyScene]]:
    """Read the scenes that fall to this rank, one after the other, each with its place among all."""
    if ranks.size == 1:
        return enumerate(scenes)
    sequence = cast("Sequence[AnyScene]", scenes)
    return ((place, sequence[place]) for place in range(ranks.rank, len(sequence), ranks.size))


def _next(
    own: Iterator[tuple[int, AnyScene]],
    measurer: Measurer,
    record: Record,
    places: dict[str, int],
    progress: Progress | None,
    total: int,
) -> Findings | None:
    """Go on to this rank's next scene that is not done yet and measure it; None when there is none."""
    for place, scene in own:
        done = len(places)
        _place(places, scene.name, place)
        if progress is not None:
            progress(done, total, scene.name)
        # Also finished scenes are read again: a scene that changed since must not keep its old traces.
        digest = scene.digest()
        if not record.found.done(scene.name, digest):
            return _measure(measurer, scene, digest)
    return None


def _place(places: dict[str, int], name: str, place: int) -> None:
    """Note a scene's place among all.

    Raises:
        CalibrationError: another scene has its name.
    """
    if name in places:
        raise CalibrationError(f"two scenes are called {name!r}; give every scene its own name.")
    places[name] = place


def _check_one_target(record: Record, places: Mapping[str, int]) -> None:
    """Refuse scenes measured against their truth beside others measured against the model's own prediction.

    Raises:
        CalibrationError: naming one of each.
    """
    named = {record.found.facts[name].get("target"): name for name in places if name in record.found.facts}
    if len(named) > 1:
        raise CalibrationError(
            f"{named['truth']} was measured against its ground truth and {named['self']}, which has none, against the "
            "model's own prediction, and traces of the two cannot be averaged; give scenes of one kind, or begin "
            "another calibration with the target truth or self for all."
        )


def _measure(measurer: Measurer, scene: AnyScene, digest: str) -> Findings:
    """Measure one scene; one that cannot be aligned is noted as skipped, with the reason."""
    found = Findings(digests={scene.name: digest})
    try:
        measured = measurer.measure(scene)
    except (CalibrationError, SceneError) as error:
        found.skipped[scene.name] = str(error)
    else:
        found.traces[scene.name], found.facts[scene.name] = measured.traces, measured.facts
    return found
