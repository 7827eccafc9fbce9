"""How tokens lie in feature space, and how far a layer moves them."""

from depthscope.diagnostics.kernels.geometry.directions import (
    angular_distance,
    block_influence,
    row_cosine,
    token_cosine,
)
from depthscope.diagnostics.kernels.geometry.massive import massive_activations, massive_tokens

__all__ = [
    "angular_distance",
    "block_influence",
    "massive_activations",
    "massive_tokens",
    "row_cosine",
    "token_cosine",
]
