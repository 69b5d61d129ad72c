"""The gradient of both errors by every head's gate, scene by scene: what head pruning is decided on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pluggy
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from hess_plugin.calibration.errors import EPS
from hess_plugin.calibration.fisher import only_sites_require_grad
from hess_plugin.calibration.measuring import Protocol
from hess_plugin.calibration.ranks import Ranks
from hess_plugin.calibration.record import Findings, Record
from hess_plugin.calibration.rounds import Progress, measure_all
from hess_plugin.exceptions import CalibrationError, PatchError, ProfileError, ProfileMismatch
from hess_plugin.files import write_bytes
from hess_plugin.interception import is_patched
from hess_plugin.plugins import resolve_adapter
from hess_plugin.profiles import weights_fingerprint
from hess_plugin.scenes.image_set import ImageSet
from hess_plugin.scenes.scene import Scene
from hess_plugin.scoring import ERROR_NAMES
from hess_plugin.sites import Site

from .gates import GateMeasurer, gating

FORMAT_VERSION = 1
_METADATA_KEY = "hess_gate_gradients"


@dataclass(frozen=True, eq=False)
class GateGradients:
    """The derivative of each error by each gate, where all gates are 1, as autograd sees it.

    Camera heads that refine a pose step by step detach it in between, in VGGT and the demo model: of the camera error
    only what goes through the last step is seen, here as in the traces of `calibrate`.

    Attributes:
        adapter: name of the adapter that claimed the model.
        sites: names of the L sites in execution order.
        scenes: ids of the scenes, in order.
        camera: float64 ``[scenes, L, H]``, with sign; NaN throughout a scene without this error.
        points: likewise.
        fingerprint: `weights_fingerprint` of the model.
        metadata: how it was measured (eps, target, `Scene.digest` of each scene, ...), JSON types only.

    Raises:
        ProfileError: the parts do not fit together.
    """

    adapter: str
    sites: tuple[str, ...]
    scenes: tuple[str, ...]
    camera: Tensor
    points: Tensor
    fingerprint: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted = (len(self.scenes), len(self.sites))
        if not self.scenes or not self.sites:
            raise ProfileError(f"gate gradients need scenes and sites; there are {wanted} of them.")
        for name in ERROR_NAMES:
            values = getattr(self, name)
            if values.ndim != 3 or tuple(values.shape[:2]) != wanted or values.shape != self.camera.shape:
                raise ProfileError(
                    f"gate gradients {name!r} have shape {list(values.shape)}, wanted [scenes, L, H] = "
                    f"[{wanted[0]}, {wanted[1]}, H] with one H for both errors."
                )
            if values.dtype != torch.float64 or bool(values.isinf().any()):
                raise ProfileError(f"gate gradients {name!r} are not finite float64 numbers; measure them again.")

    @property
    def num_heads(self) -> int:
        """Heads H of every site."""
        return self.camera.shape[-1]

    def present(self, error: str) -> Tensor:
        """Gradients of the scenes that have an error (``camera`` or ``points``): ``[n, L, H]``, n may be 0."""
        values: Tensor = getattr(self, error)
        return values[~values.isnan().flatten(1).any(1)]

    def check(self, sites: Sequence[Site], fingerprint: str | None = None) -> None:
        """Check that the gradients belong to a model.

        Args:
            sites: the model's sites.
            fingerprint: the model's `weights_fingerprint`; None to allow other weights.

        Raises:
            ProfileMismatch: says the first difference.
        """
        for what, mine, theirs in (
            ("sites", self.sites, tuple(site.key for site in sites)),
            ("heads", (self.num_heads,) * len(sites), tuple(site.num_heads for site in sites)),
            ("weights", self.fingerprint, self.fingerprint if fingerprint is None else fingerprint),
        ):
            if mine != theirs:
                raise ProfileMismatch(
                    f"the gate gradients were measured with {what} {mine}, the model has {theirs}; measure them again."
                )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with JSON metadata, atomically."""
        header = {
            "format_version": FORMAT_VERSION,
            "adapter": self.adapter,
            "sites": list(self.sites),
            "scenes": list(self.scenes),
            "fingerprint": self.fingerprint,
            "metadata": dict(self.metadata),
        }
        tensors = {name: getattr(self, name).contiguous() for name in ERROR_NAMES}
        text = json.dumps(header, sort_keys=True)
        write_bytes(path, safetensors.torch.save(tensors, metadata={_METADATA_KEY: text}))

    @classmethod
    def load(cls, path: str | Path) -> GateGradients:
        """Read a file of `save`.

        Raises:
            ProfileError: the file is missing, damaged, something else, or of another format.
        """
        header, tensors = _read(Path(path))
        if header.get("format_version") != FORMAT_VERSION:
            raise ProfileError(
                f"{path} has format {header.get('format_version')} of gate gradients, this version reads "
                f"{FORMAT_VERSION}; measure them again."
            )
        try:
            return cls(
                adapter=str(header["adapter"]),
                sites=tuple(header["sites"]),
                scenes=tuple(header["scenes"]),
                camera=tensors["camera"],
                points=tensors["points"],
                fingerprint=str(header["fingerprint"]),
                metadata=dict(header["metadata"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ProfileError(f"{path} is incomplete: {error!r} is missing or wrong; measure again.") from error
        except ProfileError as error:
            raise ProfileError(f"{path}: {error}") from error


def gate_gradients(
    model: nn.Module,
    scenes: Iterable[Scene | ImageSet],
    *,
    eps: float = EPS,
    autocast: torch.dtype | None = None,
    memory: str = "lean",
    target: str = "auto",
    progress: Progress | None = None,
    adapter: str | None = None,
    manager: pluggy.PluginManager | None = None,
) -> GateGradients:
    """Differentiate the errors of every scene by the gates of all heads: one forward, two backward passes a scene.

    Scenes, errors and memory are those of `calibrate`, so that what is decided on the gradients has seen what HeSS
    has seen. The model is in eval mode meanwhile and is given back as it was.

    Args:
        model: a model that an adapter claims, not patched.
        scenes: as for `calibrate`; one that cannot be aligned is left out, with its reason in the metadata.
        eps: inlier distance of the point error, in units of the normalised scene.
        autocast: run the forward under autocast in this type; None for the model's own.
        memory: ``lean`` or ``plain``, as for `calibrate`.
        target: ``truth``, ``self`` or ``auto``, as for `calibrate`.
        progress: called as ``progress(done, total, scene)`` before each scene and once at the end.
        adapter: take this adapter instead of asking which one claims the model.
        manager: plugin manager; a fresh one by default.

    Returns:
        The gradients.

    Raises:
        CalibrationError: no scene gave a usable error, a gradient is not finite, or sites differ in heads.
        PatchError: the model is patched.
    """
    protocol = Protocol(eps=eps, autocast=autocast, memory=memory, target=target)
    chosen = resolve_adapter(model, adapter, manager)
    if is_patched(model):
        raise PatchError("this model is patched; remove the patch before measuring gate gradients.")
    sites = chosen.sites(model)
    if len({site.num_heads for site in sites}) != 1:
        heads = sorted({site.num_heads for site in sites})
        raise CalibrationError(f"sites have different numbers of heads ({heads}), wanted one number for all.")
    record = Record(None, {}, "")
    # No weight requires grad, the gates alone do; a caller under inference_mode gets gradients all the same.
    with torch.inference_mode(False), only_sites_require_grad(model, []), gating(chosen, sites) as gates:
        measurer = GateMeasurer(chosen, model, sites, protocol, gates)
        names = measure_all(measurer, scenes, record, Ranks(), progress)
    return _gathered(record.found, names, chosen.name, sites, protocol)


def _gathered(
    found: Findings, names: Sequence[str], adapter: str, sites: Sequence[Site], protocol: Protocol
) -> GateGradients:
    measured = [name for name in names if name in found.traces]
    if not measured:
        reason = next((found.skipped[name] for name in names), "there was no scene.")
        raise CalibrationError(f"none of {len(names)} scenes gave a usable error: {reason}")
    camera, points = (torch.stack([found.traces[name][error] for name in measured]) for error in ERROR_NAMES)
    return GateGradients(
        adapter=adapter,
        sites=tuple(site.key for site in sites),
        scenes=tuple(measured),
        camera=camera,
        points=points,
        fingerprint=weights_fingerprint(sites),
        metadata={
            "eps": protocol.eps,
            "autocast": None if protocol.autocast is None else str(protocol.autocast).removeprefix("torch."),
            "memory": protocol.memory,
            "target": found.facts[measured[0]]["target"],
            "digests": {name: found.digests[name] for name in measured},
            "skipped": {name: found.skipped[name] for name in names if name in found.skipped},
        },
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read header and tensors of a file."""
    if not path.is_file():
        raise ProfileError(f"{path} is not a file; give one written by GateGradients.save.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        header = json.loads(metadata[_METADATA_KEY])
    except (safetensors.SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise ProfileError(f"{path} is damaged or holds no gate gradients ({error!r}); measure them again.") from error
    if not isinstance(header, dict):
        raise ProfileError(f"{path} has a broken header; measure the gate gradients again.")
    return header, tensors
