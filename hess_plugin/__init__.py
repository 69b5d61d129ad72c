"""Head-sensitivity-guided block-sparse global attention for VGGT-family models, without a fork.

    import hess_plugin
    with hess_plugin.patch(model, profile="vggt.hess", sparsity=0.73) as patch:
        predictions = model(images)

Importing this package imports nothing heavy: each name below is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .adapting import Adapter, Family, Replacement
    from .calibration.calibrator import calibrate
    from .calibration.errors import Errors, scene_errors
    from .exceptions import (
        AdapterError,
        AmbiguousModel,
        CalibrationError,
        HessError,
        MissingDependency,
        PatchError,
        ProfileError,
        ProfileMismatch,
        SceneError,
        UnknownModel,
    )
    from .geometry import Similarity, invert_rigid, quaternion_to_matrix, unproject
    from .hookspecs import hookimpl
    from .loading import import_upstream, load_weights
    from .patching import Patch, patch, unpatch
    from .plugins import get_plugin_manager, resolve_adapter
    from .predictions import Prediction
    from .profiles import Profile
    from .report import PatchReport
    from .scenes.scene import Scene
    from .sites import Projection, Site, TokenLayout, fused_site

_HOME = {
    "adapting": ("Adapter", "Family", "Replacement"),
    "calibration.calibrator": ("calibrate",),
    "calibration.errors": ("Errors", "scene_errors"),
    "exceptions": (
        "AdapterError",
        "AmbiguousModel",
        "CalibrationError",
        "HessError",
        "MissingDependency",
        "PatchError",
        "ProfileError",
        "ProfileMismatch",
        "SceneError",
        "UnknownModel",
    ),
    "geometry": ("Similarity", "invert_rigid", "quaternion_to_matrix", "unproject"),
    "hookspecs": ("hookimpl",),
    "loading": ("import_upstream", "load_weights"),
    "patching": ("Patch", "patch", "unpatch"),
    "plugins": ("get_plugin_manager", "resolve_adapter"),
    "predictions": ("Prediction",),
    "profiles": ("Profile",),
    "report": ("PatchReport",),
    "scenes.scene": ("Scene",),
    "sites": ("Projection", "Site", "TokenLayout", "fused_site"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = ["__version__", *sorted(_MODULE_OF)]  # noqa: PLE0604 (built from the table above)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
