"""How tokens lie in feature space, and how far a layer moves them."""

from depthscope.diagnostics.kernels.geometry.directions import (
    angular_distance,
    block_influence,
    curvature,
    row_cosine,
    token_cosine,
)
from depthscope.diagnostics.kernels.geometry.intrinsic_dimension import two_nn, two_nn_of
from depthscope.diagnostics.kernels.geometry.massive import massive_activations, massive_tokens
from depthscope.diagnostics.kernels.geometry.power_law import PowerLaw, alpha_req, alpha_req_of
from depthscope.diagnostics.kernels.geometry.smoothness import dirichlet_energy

__all__ = [
    "PowerLaw",
    "alpha_req",
    "alpha_req_of",
    "angular_distance",
    "block_influence",
    "curvature",
    "dirichlet_energy",
    "massive_activations",
    "massive_tokens",
    "row_cosine",
    "token_cosine",
    "two_nn",
    "two_nn_of",
]
