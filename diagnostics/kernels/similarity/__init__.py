"""How similar two representations of the same tokens are, and how similar unrelated ones would look."""

from depthscope.diagnostics.kernels.similarity.cka import cka_from_hsic, cka_null, linear_cka
from depthscope.diagnostics.kernels.similarity.layer_cka import cka_matrices, cka_matrix

__all__ = ["cka_from_hsic", "cka_matrices", "cka_matrix", "cka_null", "linear_cka"]
