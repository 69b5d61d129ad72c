"""Calibration: alignment, errors and Fisher traces."""
