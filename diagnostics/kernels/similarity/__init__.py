"""How similar two representations of the same tokens are, and how similar unrelated ones would look."""

from depthscope.diagnostics.kernels.similarity.cka import cka_from_hsic, cka_null, hsic1, linear_cka
from depthscope.diagnostics.kernels.similarity.layer_cka import (
    cka_matrices,
    cka_matrix,
    minibatch_cka,
)
from depthscope.diagnostics.kernels.similarity.neighbours import cknna, mutual_knn
from depthscope.diagnostics.kernels.similarity.pairwise import procrustes

__all__ = [
    "cka_from_hsic",
    "cka_matrices",
    "cka_matrix",
    "cka_null",
    "cknna",
    "hsic1",
    "linear_cka",
    "minibatch_cka",
    "mutual_knn",
    "procrustes",
]
