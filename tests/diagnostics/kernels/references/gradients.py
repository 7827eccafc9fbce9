"""Gradients by autograd, numpy's covariance and sums over pairs of samples."""

import numpy as np
import torch
from sklearn.metrics.pairwise import cosine_similarity

from depthscope.diagnostics.kernels import gradients
from tests.diagnostics.kernels.formula_data import noise
from tests.diagnostics.kernels.references.reference import FEW, STATES, Reference

MATRICES = STATES + FEW
SCALES = np.array([0.5, 3.0, 1.5, 0.25])


def gradients_of_a_chain():
    """Norms at every depth of rotations times `SCALES`, by autograd."""
    state = torch.tensor(noise(1, 6, seed=40), requires_grad=True)
    states = [state]
    for depth, scale in enumerate(SCALES):
        turn = torch.linalg.qr(torch.tensor(noise(6, 6, seed=41 + depth)))[0]
        states.append(scale * states[-1] @ turn)
        states[-1].retain_grad()
    (states[-1] * torch.tensor(noise(1, 6, seed=50))).sum().backward()
    return np.array([float(torch.linalg.vector_norm(s.grad)) for s in states])


def products_behind(norms):
    """What each depth is multiplied by on the way to the end."""
    del norms
    return np.append(np.cumprod(SCALES[::-1])[::-1], 1.0)


def norms_of_batches(square, trace, few, many):
    """Expected norms at two batch sizes: E‖g_B‖² = |G|² + tr Σ / B."""
    return np.sqrt(square + trace / few), np.sqrt(square + trace / many)


def channels(x):
    variance, mean = torch.var_mean(torch.tensor(x), dim=0, correction=0)
    return float((mean**2).mean()), float(variance.mean())


REFERENCES: dict[str, tuple[Reference, ...]] = {
    "gradients.gradient_norm": (
        Reference(
            "torch.nn.utils.get_total_norm",
            gradients.gradient_norm,
            lambda g: float(torch.nn.utils.get_total_norm([torch.tensor(g)])),
            MATRICES,
        ),
        Reference(
            "numpy's root of the mean square",
            lambda g: gradients.gradient_norm(g, rms=True),
            lambda g: np.sqrt(np.mean(g**2)),
            MATRICES,
        ),
    ),
    "gradients.backward_gain_profile": (
        Reference(
            "scaled rotations, by torch.autograd",
            gradients.backward_gain_profile,
            products_behind,
            [(gradients_of_a_chain(),)],
            batched=False,
        ),
    ),
    "gradients.noise_scale": (
        Reference(
            "McCandlish et al., Appendix A.1, on expected norms",
            lambda few, many: gradients.noise_scale(few, many, batch_small=4, batch_large=64),
            lambda few, many: (0.0 * few + 7.0 / 3.0, 0.0 * few + 7.0, 0.0 * many + 3.0),
            [tuple(np.atleast_1d(v) for v in norms_of_batches(3.0, 7.0, 4, 64))],
        ),
    ),
    "gradients.cosine_across_samples": (
        Reference(
            "sklearn cosine_similarity",
            gradients.cosine_across_samples,
            lambda g: cosine_similarity(g)[np.triu_indices(len(g), 1)].mean(),
            MATRICES,
        ),
    ),
    "gradients.signal_propagation": (
        Reference("torch.var_mean", gradients.signal_propagation, channels, MATRICES),
    ),
}
