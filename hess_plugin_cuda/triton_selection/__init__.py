"""Choosing blocks on a GPU without sorting, in Triton: `launch` starts the kernels, which are imported with it.

Rows of scores are cut by bisection on the bits of floats. Which rows and which chunks is for the caller to say.
"""

from __future__ import annotations

from .compilations import compiled_configurations

__all__ = ["compiled_configurations"]
