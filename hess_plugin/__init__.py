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

if TYPE_CHECKING:  # `as` marks a re-export for type checkers
    from .adapting import Adapter as Adapter
    from .adapting import Family as Family
    from .adapting import JoinedLayers as JoinedLayers
    from .adapting import Replacement as Replacement
    from .auto.beginning import auto_patch as auto_patch
    from .calibration.calibrator import calibrate as calibrate
    from .calibration.errors import Errors as Errors
    from .calibration.errors import scene_errors as scene_errors
    from .exceptions import AdapterError as AdapterError
    from .exceptions import AmbiguousModel as AmbiguousModel
    from .exceptions import CalibrationError as CalibrationError
    from .exceptions import HessError as HessError
    from .exceptions import MissingDependency as MissingDependency
    from .exceptions import PatchError as PatchError
    from .exceptions import ProfileError as ProfileError
    from .exceptions import ProfileMismatch as ProfileMismatch
    from .exceptions import SceneError as SceneError
    from .exceptions import UnknownModel as UnknownModel
    from .framing import Framing as Framing
    from .geometry import Similarity as Similarity
    from .geometry import invert_rigid as invert_rigid
    from .geometry import quaternion_to_matrix as quaternion_to_matrix
    from .geometry import to_world as to_world
    from .geometry import unproject as unproject
    from .handle import Patch as Patch
    from .hookspecs import hookimpl as hookimpl
    from .interception import intercept as intercept
    from .loading import import_upstream as import_upstream
    from .loading import load_weights as load_weights
    from .patching import patch as patch
    from .patching import unpatch as unpatch
    from .plugins import get_plugin_manager as get_plugin_manager
    from .plugins import resolve_adapter as resolve_adapter
    from .predictions import Prediction as Prediction
    from .profiles import Profile as Profile
    from .report import PatchReport as PatchReport
    from .scenes.scene import Scene as Scene
    from .sites import Projection as Projection
    from .sites import Site as Site
    from .sites import TokenLayout as TokenLayout
    from .sites import fused_site as fused_site

_HOME = {
    "auto.beginning": ("auto_patch",),
    "adapting": ("Adapter", "Family", "JoinedLayers", "Replacement"),
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
    "framing": ("Framing",),
    "geometry": ("Similarity", "invert_rigid", "quaternion_to_matrix", "to_world", "unproject"),
    "handle": ("Patch",),
    "hookspecs": ("hookimpl",),
    "interception": ("intercept",),
    "loading": ("import_upstream", "load_weights"),
    "patching": ("patch", "unpatch"),
    "plugins": ("get_plugin_manager", "resolve_adapter"),
    "predictions": ("Prediction",),
    "profiles": ("Profile",),
    "report": ("PatchReport",),
    "scenes.scene": ("Scene",),
    "sites": ("Projection", "Site", "TokenLayout", "fused_site"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
