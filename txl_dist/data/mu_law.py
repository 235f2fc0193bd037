"""Sounds as numbers from 0 to 255, finer where they are quiet (the continuous mu-law of ITU-T G.711, mu = 255)."""

import numpy as np

MU = 255


def mu_law(samples: np.ndarray) -> np.ndarray:
    """Return the levels uint8 [n] of samples from -1 to 1; 0 is level 128."""
    compressed = np.sign(samples) * np.log1p(MU * np.abs(samples)) / np.log1p(MU)
    levels: np.ndarray = np.floor((compressed + 1) / 2 * MU + 0.5).astype(np.uint8)
    return levels


def from_mu_law(levels: np.ndarray) -> np.ndarray:
    """Return the samples float64 [n], from -1 to 1, that levels [n] stand for."""
    compressed = 2 * np.asarray(levels, np.float64) / MU - 1
    samples: np.ndarray = np.sign(compressed) * np.expm1(np.abs(compressed) * np.log1p(MU)) / MU
    return samples
