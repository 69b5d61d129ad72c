"""Patching every model that a program builds, without a line of it changed."""
