"""How many directions a matrix uses: spectral ranks, rank collapse, and what iid noise would give.

Every spectral rank comes twice: ``effective_rank(x)`` on matrices and ``effective_rank_of(s)`` on singular
values, so that one decomposition serves all. On any matrix
rank ≥ effective rank ≥ entropy rank ≥ participation ratio ≥ stable rank.
"""

from depthscope.diagnostics.kernels.rank.deficiency import (
    dong_residual,
    numerical_rank,
    numerical_rank_of,
    stable_rank,
    stable_rank_of,
)
from depthscope.diagnostics.kernels.rank.entropy import (
    effective_rank,
    effective_rank_of,
    entropy_rank,
    entropy_rank_of,
)
from depthscope.diagnostics.kernels.rank.noise import MarchenkoPastur, marchenko_pastur
from depthscope.diagnostics.kernels.rank.participation import participation_ratio, participation_ratio_of
from depthscope.diagnostics.kernels.rank.spectrum import singular_values

__all__ = [
    "MarchenkoPastur",
    "dong_residual",
    "effective_rank",
    "effective_rank_of",
    "entropy_rank",
    "entropy_rank_of",
    "marchenko_pastur",
    "numerical_rank",
    "numerical_rank_of",
    "participation_ratio",
    "participation_ratio_of",
    "singular_values",
    "stable_rank",
    "stable_rank_of",
]
