"""Solid procedural textures: a few random waves in three octaves, sometimes over a checkerboard."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

# Per octave: wavelength range in metres, number of waves, amplitude.
_OCTAVES = ((1.2, 3.0, 4, 0.17), (0.5, 1.0, 4, 0.10), (0.2, 0.4, 2, 0.06))
_CHECKER_SHARE = 0.3


@dataclass(frozen=True)
class Texture:
    """A colour for every point of space.

    Attributes:
        base: mean colour `[3]`.
        waves: wave vectors `[K, 3]`, radians per metre.
        phases: `[K, 1]`, radians.
        amplitudes: `[K, 3]`, per colour channel.
        checker: radians per metre of the checkerboard, and its amplitude (0: none).
    """

    base: FloatArray
    waves: FloatArray
    phases: FloatArray
    amplitudes: FloatArray
    checker: tuple[float, float]

    def colours(self, points: FloatArray) -> FloatArray:
        """Colours `[3, n]` (about 0 to 1, not clipped) of the points `[3, n]` in metres."""
        colour = self.amplitudes.T @ np.sin(self.waves @ points + self.phases)
        colour += self.base[:, None]
        frequency, amplitude = self.checker
        if amplitude > 0:
            # The offset keeps axis-aligned walls off the zeros of the sine, where the sign is noise.
            signs = np.sin(points * np.float32(frequency) + np.float32(0.3)) > 0
            odd = np.logical_xor.reduce(signs, axis=0)
            colour += np.where(odd, np.float32(amplitude), np.float32(-amplitude))
        return colour


def random_texture(rng: np.random.Generator, scale: float = 1.0) -> Texture:
    """Draw a texture; `scale` stretches its wavelengths."""
    wavelengths = np.concatenate([rng.uniform(low, high, count) for low, high, count, _ in _OCTAVES]) * scale
    strengths = np.concatenate([np.full(count, strength) for _, _, count, strength in _OCTAVES])
    directions = rng.normal(size=(len(wavelengths), 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    amplitudes = strengths[:, None] * rng.normal(size=directions.shape)
    phases = rng.uniform(0, 2 * np.pi, (len(wavelengths), 1))
    base = rng.uniform(0.15, 0.85, 3)
    has_checker = rng.random() < _CHECKER_SHARE
    frequency, amplitude = np.pi / (rng.uniform(0.3, 0.6) * scale), rng.uniform(0.1, 0.25)
    return Texture(
        base=base.astype(np.float32),
        waves=(2 * np.pi / wavelengths[:, None] * directions).astype(np.float32),
        phases=phases.astype(np.float32),
        amplitudes=amplitudes.astype(np.float32),
        checker=(float(frequency), float(amplitude) if has_checker else 0.0),
    )
