"""On which data are tools compared? Walks over depth, spectra, massive tokens."""

from __future__ import annotations

import numpy as np

WIDTH = 1024
OFFSETS = (0.0, 1.0, 100.0, 1e4)


def walk(layers: int, tokens: int, *, offset: float = 0.0, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """States (L, N, D) to which every depth adds; the common offset is in units of their spread at the first depth."""
    rng = np.random.default_rng(seed)
    steps = rng.standard_normal((layers, tokens, width), dtype=np.float32)
    # Signs of equal size: a common offset in every feature.
    direction = rng.choice(np.array([-1.0, 1.0], dtype=np.float32), width)
    return np.cumsum(steps, axis=0, dtype=np.float32) + np.float32(offset) * direction


def of_spectrum(singular: np.ndarray, tokens: int, *, seed: int = 0) -> np.ndarray:
    """A matrix (N, D) with these singular values between random orthogonal sides, rounded to float32."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((rows, len(singular))))[0] for rows in (tokens, WIDTH))
    return ((left * singular) @ right.T).astype(np.float32)


def spectra(count: int) -> dict[str, np.ndarray]:
    """Singular values by name, from harmless to collapsed."""
    place = np.arange(1.0, count + 1)
    along = np.linspace(0.0, 1.0, count)
    return {
        "power law 1/i": 1.0 / place,
        "condition 1e4": 1e4**-along,
        "condition 1e8": 1e8**-along,
        "spike 1e5 + 1/i": np.concatenate([[1e5], 1.0 / place[:-1]]),
        "collapse, rest 1e-5": np.concatenate([[1.0], np.full(count - 1, 1e-5)]),
    }
