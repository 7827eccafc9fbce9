"""How many operations should a group of metrics take? The leading terms with rough weights, for expected exponents.

S states, C connections, B sequences of T tokens, N = B T, D features, n streams; V = n + 1 views of a state, its mean and its
streams.
"""

from __future__ import annotations

from benchmarks.capture.cases import Sizes

NAMES = {
    "ranks": ("effective_rank", "participation_ratio", "numerical_rank"),
    "geometry": ("token_cosine", "massive_token_fraction", "massive_activation", "dong_residual"),
}
QUESTIONS = {
    "similarity": ("similarity",),
    "mixing": ("mixing", "operators", "contraction", "paths"),
    "gradients": ("gradients",),
}
# Rough weights of ours, in multiplications of a large matrix product, the fastest kind:
EIGEN = 4  # all eigenvalues of a matrix, in products of two such matrices
PASSES = 150  # all passes over one number of a state: memory, not arithmetic, is the limit there
SMALL = 50  # the decompositions of an n × n matrix, in products of two such matrices


def groups() -> dict[str, tuple[str, ...]]:
    """Default metrics by group."""
    from depthscope.diagnostics import CATALOGUE

    chosen = {name: tuple(n for n in metrics if n in CATALOGUE) for name, metrics in NAMES.items()}
    for name, questions in QUESTIONS.items():
        chosen[name] = tuple(
            metric.name for metric in CATALOGUE.values() if metric.default and metric.question in questions
        )
    return chosen


def of(sizes: Sizes) -> dict[str, float]:
    """Operations by group.

    ``sizes``: of an mHC model and its batch.
    """
    # Two connections a layer, and a state after each and after the embedding.
    states, connections = 2 * sizes.layers + 1, 2 * sizes.layers
    n, d, tokens = sizes.streams, sizes.width, sizes.batch * sizes.tokens
    # Metrics look at each stream and at their mean.
    views, passes = states * (n + 1), PASSES * states * (n + 1) * tokens * d
    pooled = spectrum(tokens, d)
    each = sizes.batch * spectrum(sizes.tokens, d)
    # The cheaper of Gram matrices and cross-covariances, as the kernel chooses.
    lower = min(states * tokens**2 * d + states**2 * tokens**2, states**2 * tokens * d**2)
    return {
        "capture": states * tokens * n * d,
        "ranks": views * (pooled + each) + passes,
        "geometry": passes,
        "similarity": lower + states**2 * tokens * d + states * n * tokens**2 * d + passes,
        "mixing": connections**2 * tokens * n**2 + SMALL * connections * tokens * n**3,
        "gradients": states * each + passes,
    }


def spectrum(rows: int, columns: int) -> float:
    """Operations for the spectrum of one matrix: its smaller Gram matrix, and the eigenvalues of that."""
    small, large = sorted((rows, columns))
    return small**2 * large + EIGEN * small**3
