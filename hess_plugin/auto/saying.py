"""Saying something on standard error that must never stop the program that is running."""

from __future__ import annotations

import contextlib
import sys


def say(text: str) -> None:
    """Print one line of hess-patch; a program that has closed or replaced its standard error hears nothing."""
    with contextlib.suppress(Exception):
        sys.stderr.write(f"hess-patch: {text}\n")
