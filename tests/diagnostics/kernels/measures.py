"""What is measured? Every kernel of one or two matrices, with its value in 50 digits."""

import numpy as np
import torch

from depthscope.diagnostics.kernels import geometry, gradients, rank, similarity
from tests.diagnostics.kernels import exact


def both(of_x):
    """A measure of one matrix, in the place of one of two."""
    return lambda x, y, **options: of_x(x, **options)


def stacked(*layers):
    """Layers as one array of their kind; lists as a list."""
    if isinstance(layers[0], list):
        return list(layers)
    return np.stack(layers) if isinstance(layers[0], np.ndarray) else torch.stack(layers)


def table(of, *options):
    """The same as the table of two layers by a function of pairs."""
    return lambda x, y: np.array([[of(p, q, *options) for q in (x, y)] for p in (x, y)], dtype=object)


# Ours and the exact one, both of two matrices; those of one matrix forget the other.
ONE = {
    "singular_values": (rank.singular_values, exact.singular_values),
    "effective_rank": (rank.effective_rank, exact.effective_rank),
    "entropy_rank": (rank.entropy_rank, exact.entropy_rank),
    "participation_ratio": (rank.participation_ratio, exact.participation_ratio),
    "stable_rank": (rank.stable_rank, exact.stable_rank),
    "numerical_rank": (
        lambda x, **k: rank.numerical_rank(x, rtol=1e-9, **k),
        lambda x: exact.numerical_rank(x, 1e-9),
    ),
    "token_cosine": (geometry.token_cosine, exact.token_cosine),
}
ALONE = {
    "participation_ratio of pairs": (
        lambda x, **k: rank.participation_ratio(x, correct="rows", **k),
        exact.participation_ratio_of_pairs,
    ),
    "dong_residual": (rank.dong_residual, exact.dong_residual),
    "massive_activations": (geometry.massive_activations, exact.massive_activations),
    "massive_tokens": (geometry.massive_tokens, exact.massive_tokens),
    "gradient_norm": (gradients.gradient_norm, exact.gradient_norm),
    "channel_variance": (gradients.channel_variance, exact.channel_variance),
}
PAIRS = {
    "row_cosine": (geometry.row_cosine, exact.row_cosine),
    "angular_distance": (geometry.angular_distance, exact.angular_distance),
    "block_influence": (geometry.block_influence, exact.block_influence),
    "linear_cka": (similarity.linear_cka, exact.linear_cka),
    "unbiased linear_cka": (
        lambda x, y, **k: similarity.linear_cka(x, y, unbiased=True, **k),
        lambda x, y: exact.linear_cka(x, y, exact.song),
    ),
}
# Of layers or batches, which share one mask or none.
LAYERS = {
    "cka_matrix": (lambda x, y, **k: similarity.cka_matrix(stacked(x, y), **k), table(exact.linear_cka)),
    "unbiased cka_matrix": (
        lambda x, y, **k: similarity.cka_matrix(stacked(x, y), unbiased=True, **k),
        table(exact.linear_cka, exact.song),
    ),
    "unbiased of cka_matrices": (
        lambda x, y, **k: similarity.cka_matrices(stacked(x, y), **k)[1],
        table(exact.linear_cka, exact.song),
    ),
}
MEASURES = {
    **{name: tuple(map(both, pair)) for name, pair in (ONE | ALONE).items()},
    **{
        f"centred {name}": (
            both(lambda x, f=ours, **k: f(x, center=True, **k)),
            both(lambda x, f=theirs: f(exact.centred(x))),
        )
        for name, (ours, theirs) in ONE.items()
    },
    **PAIRS,
    **LAYERS,
}
# What is measured in units of the input, and what no common factor changes.
OF_UNITS = (
    *("singular_values", "centred singular_values", "massive_activations", "massive_tokens", "gradient_norm"),
    *("channel_variance",),
)
UNIT_FREE = [name for name in MEASURES if name not in OF_UNITS]


def measured(name, x, y, **options):
    """A measure of two matrices; the parts of a tuple as one array."""
    found = MEASURES[name][0](x, y, **options)
    return np.stack([np.asarray(v) for v in found]) if isinstance(found, tuple) else np.asarray(found)
