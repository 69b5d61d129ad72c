"""Every error this package raises on purpose, as one small tree."""

from __future__ import annotations


class HessError(Exception):
    """Base class: a mistake that can be told in one sentence, shown without a traceback on the command line."""


class UnknownModel(HessError):
    """No adapter claims the model, or no adapter has the requested name."""


class AmbiguousModel(HessError):
    """More than one adapter claims the model."""


class AdapterError(HessError):
    """An adapter answered a hook with something the core cannot use."""


class PatchError(HessError):
    """A model could not be patched, or a patched model was called in a way the patch does not cover."""


class ProfileError(HessError):
    """A profile file is missing, truncated or not a profile."""


class ProfileMismatch(ProfileError):
    """A profile was calibrated on another model than the one it is applied to."""


class SceneError(HessError):
    """A scene or a file of a scene is malformed."""


class CalibrationError(HessError):
    """A calibration could not produce a usable error or trace."""


class MissingDependency(HessError):
    """An optional package is needed for this step and is not installed."""
