"""The profile: raw sensitivity traces of every head, where they came from, and the scores made of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.numpy
import torch
from torch import Tensor, nn

from .exceptions import ProfileError, ProfileMismatch
from .files import write_bytes
from .harm_curves import HARM_NAMES, check_harm
from .scoring import ERROR_NAMES, ROWS, Scoring, head_scores, trace_name
from .sites import PROJECTIONS, Site

# Version 2 has traces through patch rows, 3 has harm curves or traces of attention outputs. What an older version can
# read is written for it.
FORMAT_VERSION = 3
_METADATA_KEY = "hess_profile"
HARM = "harm."
"""Before the names of harm curves where they lie beside traces."""


@dataclass(frozen=True)
class Profile:
    """What one calibration found, and everything needed to use it, check it and make it again.

    Attributes:
        adapter: name of the adapter that claimed the model.
        sites: names of the L sites in execution order.
        num_heads: heads H of every site.
        scenes: ids of the calibration scenes, in order.
        traces: squared gradient norm of each head by ``"<error>.<projection>"`` (errors ``camera`` and
            ``points``, projections ``q``, ``k``, ``v``), float64 ``[scenes, L, H]``; a scene that has no such
            error holds NaN throughout. ``tr F`` of HeSS, eq. 6, is the mean over scenes. Optionally, all six
            again as ``"<error>.<projection>.patch"``: the gradient that went through patch tokens' rows alone.
            Optionally ``"<error>.output"``: the squared gradient by each head's attention output, summed over patch
            tokens.
        harm: optionally what leaving out blocks of one head does to an error, to second order, at several kept shares
            of its block pairs: ``camera`` and ``points``, float64 ``[scenes, L, H, K]``, NaN throughout a scene that
            has no such error or too few blocks; ``shares``, the kept shares, ``[scenes, K]``, ascending.
        camera_weight: share of the camera trace in the score (lambda of HeSS, eq. 9).
        fingerprint: `weights_fingerprint` of the calibrated model.
        metadata: provenance (weights, resolution, dtype, versions, date, settings), JSON types only.
    """

    adapter: str
    sites: tuple[str, ...]
    num_heads: int
    scenes: tuple[str, ...]
    traces: Mapping[str, Tensor]
    camera_weight: float
    fingerprint: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    harm: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.scenes), len(self.sites), self.num_heads)
        wanted = {rows: {trace_name(e, p, rows) for e in ERROR_NAMES for p in PROJECTIONS} for rows in ROWS}
        outputs = {trace_name(error, "output", "all") for error in ERROR_NAMES}
        held = set(self.traces) - outputs if self.has_outputs else set(self.traces)
        if held not in (wanted["all"], wanted["all"] | wanted["patch"]):
            raise ProfileError(
                f"a profile holds the traces {sorted(wanted['all'])}, and none or all of {sorted(wanted['patch'])} and "
                f"of {sorted(outputs)}; this one has {sorted(self.traces)}."
            )
        if not self.scenes or not self.sites or self.num_heads < 1:
            raise ProfileError(f"a profile needs scenes, sites and heads; this one has {shape} of them.")
        for name, trace in self.traces.items():
            if tuple(trace.shape) != shape:
                raise ProfileError(
                    f"trace {name!r} has shape {list(trace.shape)}, wanted [scenes, L, H] = {list(shape)}."
                )
            if bool((trace < 0).any() | trace.isinf().any()):
                raise ProfileError(f"trace {name!r} holds a negative or infinite value; calibrate again.")
        if not 0.0 <= self.camera_weight <= 1.0:
            raise ProfileError(f"camera_weight is {self.camera_weight}, wanted a number from 0 to 1.")
        check_harm(self.harm, *shape)

    @property
    def has_harm(self) -> bool:
        """Whether harm curves were recorded, which ``allocation="harm"`` needs."""
        return bool(self.harm)

    @property
    def has_patch_rows(self) -> bool:
        """Whether the traces through patch rows were recorded, which ``rows="patch"`` needs."""
        return trace_name("camera", "q", "patch") in self.traces

    @property
    def has_outputs(self) -> bool:
        """Whether the traces of attention outputs were recorded, which ``projection="output"`` needs."""
        return all(trace_name(error, "output", "all") in self.traces for error in ERROR_NAMES)

    def scene_traces(self, error: str, projection: str = "q", rows: str = "all") -> Tensor:
        """Look up one trace of every scene: ``[scenes, L, H]``, NaN throughout a scene without this error.

        Raises:
            ProfileError: an unknown projection or rows, or the profile has no traces through patch rows or of outputs.
        """
        Scoring(projection=projection, rows=rows)
        if rows == "patch" and not self.has_patch_rows:
            raise ProfileError(
                "rows 'patch' needs traces through patch rows and this profile was calibrated without them; "
                "calibrate again, or take rows 'all'."
            )
        if projection == "output" and not self.has_outputs:
            raise ProfileError(
                "projection 'output' needs traces of attention outputs, which are measured with harm curves, and this "
                "profile was calibrated without them; calibrate again with --harm (calibrate(..., "
                "harm=HarmSettings())), or take projection 'q'."
            )
        return self.traces[trace_name(error, projection, rows)]

    def mean_traces(self, error: str, projection: str = "q", rows: str = "all") -> Tensor | None:
        """Average one trace over the scenes that have this error: ``[L, H]``, or None if no scene has it."""
        trace = self.scene_traces(error, projection, rows)
        measured = trace[~trace.isnan().flatten(1).any(1)]
        return measured.mean(0) if len(measured) else None

    def scores(
        self,
        camera_weight: float | None = None,
        projection: str = "q",
        normalisation: str = "sum",
        rows: str = "all",
    ) -> Tensor:
        """Compute the Head Sensitivity Score (HeSS, eq. 7 to 9) or one of its ablations, as `Scoring` describes.

        Returns:
            float64 ``[L, H]``, each row summing to 1.

        Raises:
            ProfileError: an unknown option, traces that were not recorded, or a layer without any gradient in
                the errors that the weight selects.
        """
        return head_scores(self, Scoring(camera_weight, projection, normalisation, rows))

    def with_camera_weight(self, camera_weight: float) -> Profile:
        """Copy the profile with another lambda, which needs no second calibration; the metadata say it was given."""
        metadata = {**self.metadata, "camera_weight_source": "given"}
        return dataclasses.replace(self, camera_weight=camera_weight, metadata=metadata)

    def check(self, sites: Sequence[Site], fingerprint: str | None = None) -> None:
        """Check that the profile belongs to a model.

        Args:
            sites: the model's sites.
            fingerprint: the model's `weights_fingerprint`; None to allow other weights.

        Raises:
            ProfileMismatch: says the first difference.
        """
        names = tuple(site.key for site in sites)
        if len(names) != len(self.sites):
            raise ProfileMismatch(
                f"the profile has {len(self.sites)} sites, the model {len(names)}; calibrate this model to get its own."
            )
        for index, (mine, theirs) in enumerate(zip(self.sites, names, strict=True)):
            if mine != theirs:
                raise ProfileMismatch(f"site {index} is {mine!r} in the profile and {theirs!r} in the model.")
        for site in sites:
            if site.num_heads != self.num_heads:
                raise ProfileMismatch(f"the profile has {self.num_heads} heads, {site.name} has {site.num_heads}.")
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise ProfileMismatch(
                f"the profile was calibrated on other weights ({self.fingerprint}, this model has {fingerprint}); "
                "calibrate this model, or pass strict=False (--any-weights) to use the profile all the same."
            )

    def save(self, path: str | Path) -> None:
        """Write the profile as safetensors with JSON metadata, atomically."""
        header = {
            "format_version": FORMAT_VERSION if self.has_harm or self.has_outputs else 2 if self.has_patch_rows else 1,
            "adapter": self.adapter,
            "sites": list(self.sites),
            "num_heads": self.num_heads,
            "scenes": list(self.scenes),
            "camera_weight": self.camera_weight,
            "fingerprint": self.fingerprint,
            "metadata": dict(self.metadata),
        }
        held = {**self.traces, **{f"{HARM}{name}": curves for name, curves in self.harm.items()}}
        tensors = {name: held[name].double().contiguous().numpy() for name in sorted(held)}
        text = json.dumps(header, sort_keys=True)
        write_bytes(path, safetensors.numpy.save(tensors, metadata={_METADATA_KEY: text}))

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile.

        Raises:
            ProfileError: the file is missing, truncated, no profile, or of a newer format.
        """
        header, tensors = _read(Path(path))
        version = header.get("format_version")
        if version not in range(1, FORMAT_VERSION + 1):
            raise ProfileError(
                f"{path} has profile format {version}, this version of hess-plugin reads 1 to {FORMAT_VERSION}; "
                "upgrade hess-plugin or calibrate again."
            )
        harm = {name: tensors.pop(f"{HARM}{name}") for name in HARM_NAMES if f"{HARM}{name}" in tensors}
        try:
            return cls(
                adapter=str(header["adapter"]),
                sites=tuple(header["sites"]),
                num_heads=int(header["num_heads"]),
                scenes=tuple(header["scenes"]),
                traces=tensors,
                camera_weight=float(header["camera_weight"]),
                fingerprint=str(header["fingerprint"]),
                metadata=dict(header["metadata"]),
                harm=harm,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ProfileError(f"{path} is not a complete profile: {error!r} is missing or wrong.") from error
        except ProfileError as error:
            raise ProfileError(f"{path}: {error}") from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read header and tensors of a profile file."""
    if not path.is_file():
        raise ProfileError(f"{path} is not a file; give a profile written by `hess-patch calibrate`.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError) as error:
        raise ProfileError(f"{path} is truncated or not a profile ({error}); calibrate again.") from error
    if _METADATA_KEY not in metadata:
        raise ProfileError(
            f"{path} is a safetensors file but not a profile; give one written by `hess-patch calibrate`."
        )
    try:
        header = json.loads(metadata[_METADATA_KEY])
    except json.JSONDecodeError as error:
        raise ProfileError(f"{path} has a broken header ({error}); calibrate again.") from error
    if not isinstance(header, dict):
        raise ProfileError(f"{path} has a broken header; calibrate again.")
    return header, tensors


def weights_fingerprint(sites: Sequence[Site]) -> str:
    """Digest the sites' projections, so that a profile knows the weights it was measured on.

    Only they are read (a tenth of VGGT-1B): a fine-tune that leaves them as they were has the same fingerprint.
    Values are rounded to bfloat16 first: the same checkpoint loaded in float32 or in bfloat16 has one
    fingerprint.

    Returns:
        16 hexadecimal digits.

    Raises:
        ProfileError: another tool has sharded the weights or moved them away.
    """
    digest = hashlib.blake2b(digest_size=8)
    for site in sites:
        named = {site.projections[projection].parameter: projection for projection in PROJECTIONS}
        for projection in named.values():
            weight = site.tensor(projection)
            sharded = hasattr(weight, "full_tensor")  # a DTensor, whose whole takes all processes to gather
            if sharded or weight.is_meta:
                raise ProfileError(
                    f"the weights of {site.name} are {'sharded' if sharded else 'on the meta device'} and cannot be "
                    "compared with a profile's; patch before another tool takes them away, or pass strict=False to "
                    "trust that they are the profile's."
                )
            digest.update(f"{site.key}{tuple(weight.shape)}".encode())
            digest.update(weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def model_digest(model: nn.Module) -> str:
    """Digest every parameter and buffer exactly; what `weights_fingerprint` is too forgiving for.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
