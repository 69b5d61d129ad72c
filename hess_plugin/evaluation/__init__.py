"""Evaluation: how well poses and points are predicted."""

from __future__ import annotations
