"""On which data are tools compared? Walks over depth, spectra, massive tokens, states of SmolLM2, mixing matrices."""

from __future__ import annotations

from typing import Any

import numpy as np

WIDTH = 768
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


def massive(layers: int, sequences: int, tokens: int, *, width: int, seed: int = 0) -> np.ndarray:
    """A walk (L, B, T, D) on unequal axes; first tokens are massive at all but the first and the last depths."""
    rng = np.random.default_rng(seed)
    steps = rng.standard_normal((layers, sequences, tokens, width), dtype=np.float32)
    states = np.cumsum(steps, axis=0, dtype=np.float32) * np.logspace(0, -1, width, dtype=np.float32)
    middle = slice(layers // 8, layers - max(1, layers // 10))
    # Two features of the first token, as in trained language models (Sun et al. 2024).
    states[middle, :, 0, :2] += np.float32(300.0) * rng.uniform(0.8, 1.2, (sequences, 2)).astype(np.float32)
    return states


def in_order(states: np.ndarray, order: int) -> np.ndarray:
    """Sequences (L, B, T, D) in another order, which changes no similarity."""
    return states[:, np.random.default_rng(order).permutation(states.shape[1])]


def smollm2(sequences: int, tokens: int) -> np.ndarray:
    """Residual states (L, B, T, D) of SmolLM2-135M on Python's documentation, without the last one.

    Raises
    ------
    ImportError
        Where the package with its weights is not installed.
    """
    import torch

    from depthscope.probes.checkpoints.load import load_checkpoint
    from depthscope.probes.checkpoints.text_batch import encode_text, sample_text
    from depthscope.probes.checkpoints.weight_files import CheckpointError

    try:
        loaded = load_checkpoint("smollm2")
    except CheckpointError as error:
        raise ImportError(str(error)) from error
    batch: Any = encode_text(loaded, sample_text(), sequences=sequences, length=tokens)
    with torch.no_grad():
        output = loaded.model(**batch, output_hidden_states=True)
    return torch.stack(output.hidden_states[:-1]).numpy()  # the last one comes after the final norm


def mixing(kind: str, shape: tuple[int, ...], streams: int, *, seed: int = 0) -> np.ndarray:
    """Mixing matrices (*shape, n, n) in float64: near the identity, doubly stochastic, or of unconstrained HC."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((*shape, streams, streams))
    if kind == "HC":
        return np.eye(streams) + 0.3 * noise
    # exp(8) is 3000: the diagonal takes nearly the whole row.
    matrix = np.exp(noise + (8.0 * np.eye(streams) if kind == "near identity" else 0.0))
    # Sinkhorn, plainly: inputs must not come from the kernel under test.
    # Twenty rounds, as in the mHC paper.
    for _ in range(20):
        matrix /= matrix.sum(-2, keepdims=True)
        matrix /= matrix.sum(-1, keepdims=True)
    return matrix


KINDS = ("near identity", "doubly stochastic", "HC")
