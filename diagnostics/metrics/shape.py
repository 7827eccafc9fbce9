"""What shape does the cloud of tokens have? Its spectrum's tail, its dimension, and the path through it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels import geometry, rank
from depthscope.diagnostics.metrics.collapse import SPECTRAL
from depthscope.diagnostics.metrics.declaration import OURS, Null, metric
from depthscope.diagnostics.quantities.registry import quantity
from depthscope.diagnostics.quantities.states import States
from depthscope.diagnostics.quantities.token_spectra import over_spectra
from depthscope.diagnostics.quantities.tokens import for_each_count

PER_SEQUENCE = "per sequence, mean over sequences"

# How many directions count as the top ones. Heuristic.
TOP = 10
# Ranks of the eigenvalues that the power law is fitted to, with weights 1/rank, as in the authors' code.
FIRST, LAST = 4, 100


def _of_noise(measure: Callable[[np.ndarray, int], float]) -> Null:
    """A number of the expected spectrum of iid noise at the same number of tokens and features."""

    @lru_cache(maxsize=4096)
    def of_size(count: float, width: int) -> float:
        if np.isnan(count):
            return float("nan")
        return float(measure(rank.marchenko_pastur(int(count), width).singular_values(), int(count)))

    def expectation(noise_rows: xr.Variable, num_features: int) -> xr.Variable:
        return for_each_count(noise_rows, lambda n: of_size(n, num_features))

    return expectation


@metric(
    symbol=r"\mathrm{rank}_\varepsilon",
    dims="scope tokens centering depth stream",
    cite="golub2013matrix",
    basis="stream",
    null=_of_noise(lambda s, count: float(len(s))),
    estimator=SPECTRAL,
    null_error=0.02,
)
def numerical_rank(singular_values: xr.Variable, token_counts: xr.Variable, num_features: int) -> xr.Variable:
    r"""Numerical rank: how many directions are above the rounding of float32.

    .. math:: \#\{i : \sigma_i > \max(N, d)\, \varepsilon\, \sigma_1\}
    """
    # max(N, d), as in numpy.linalg.matrix_rank.
    sizes = token_counts.clip(min=num_features)

    def measure(s: np.ndarray, size: np.ndarray) -> np.ndarray:
        # float32, which the states are stored in, although the spectrum is computed in float64.
        return rank.numerical_rank_of(s, rtol=float(np.finfo(np.float32).eps) * size[..., None])

    found = xr.apply_ufunc(measure, singular_values.fillna(0.0), sizes, input_core_dims=[["component"], []])
    # Spectra of NaN were replaced by zeros above, whose rank is 0: a value.
    return found.where(singular_values.notnull().all("component") & token_counts.notnull())


@metric(
    symbol=r"\textstyle\sum_{i \le 10} \lambda_i / \sum_i \lambda_i",
    dims="scope tokens centering depth stream",
    cite=OURS,
    basis="stream",
    null=_of_noise(lambda s, count: rank.top_energy_of(s, TOP)),
    estimator=SPECTRAL,
    null_error=0.03,
)
def top_energy(singular_values: xr.Variable) -> xr.Variable:
    r"""Share of the energy in the ten strongest directions.

    .. math:: \textstyle\sum_{i \le 10} \lambda_i / \sum_i \lambda_i, \quad \lambda = \sigma^2
    """
    return over_spectra(lambda s: rank.top_energy_of(s, TOP), singular_values)


# A quantity, so that the exponent and its error come from one fit.
@quantity
def power_law(singular_values: xr.Variable) -> tuple[xr.Variable, xr.Variable]:
    """Exponent of every spectrum and its standard error."""
    alpha, error = xr.apply_ufunc(
        lambda s: geometry.alpha_req_of(s, first=FIRST, last=LAST)[:2],
        singular_values.fillna(0.0),
        input_core_dims=[["component"]],
        output_core_dims=[[], []],
    )
    return alpha, error


@metric(
    symbol=r"\alpha",
    dims="scope tokens centering depth stream",
    label="α-ReQ",
    cite="agrawal2022alpha",
    basis="stream",
    null=_of_noise(lambda s, count: geometry.alpha_req_of(s, first=FIRST, last=LAST).alpha),
    estimator=f"least squares in log-log with weights 1/rank over the eigenvalues {FIRST} to {LAST}; {SPECTRAL}",
    null_error=0.15,
)
def alpha_req(power_law: tuple[xr.Variable, xr.Variable]) -> xr.Variable:
    r"""Power-law exponent of the spectrum: how fast the variance falls from direction to direction.

    .. math:: \lambda_i \propto i^{-\alpha}

    Agrawal et al. 2022 find it near 1 in good representations: that range is theirs, of image encoders and their fit, and no
    limit here. Larger: few directions hold the variance, smaller: it spreads as noise does. NaN where fewer than three
    eigenvalues are in the range. Centred is the published form.
    """
    return power_law[0]


@metric(
    symbol=r"\Delta\alpha",
    dims="scope tokens centering depth stream",
    label="α-ReQ error",
    cite="agrawal2022alpha",
    basis="stream",
    null="0 for an exact power law; noise has none, so its fit is poor",
    estimator=f"standard error of the slope over the eigenvalues {FIRST} to {LAST}; {SPECTRAL}",
    smooth=False,
)
def alpha_req_error(power_law: tuple[xr.Variable, xr.Variable]) -> xr.Variable:
    """Standard error of the power-law exponent: how well a power law describes the spectrum."""
    return power_law[1]


def _energy_of_noise(token_masks: xr.Variable) -> xr.Variable:
    """(N − 1)/N, mean over sequences."""
    # The mean over N independent tokens has 1/N of their energy.
    count = token_masks.sum("token").astype(float)
    return (1.0 - 1.0 / count.where(count > 0)).mean("sample")


@metric(
    label="Dirichlet energy",
    symbol=r"\mathcal{E}(X)",
    dims="tokens depth stream",
    cite=OURS,
    basis="stream",
    null=_energy_of_noise,
    estimator=PER_SEQUENCE,
    of_sequences=True,
)
def dirichlet_energy(residual_states: States, token_masks: xr.Variable) -> xr.Variable:
    r"""Relative Dirichlet energy: the share of a sequence's energy that is not common to its tokens.

    .. math:: \mathrm{tr}(X^\top L X) / \|X\|_F^2, \quad L = I - 11^\top / N

    0 when all tokens are equal (oversmoothed), near 1 when they have no common part. The energy itself, without the
    division, is that of Cai & Wang 2020 (2006.13318) for the graph in which all tokens are linked.
    """
    return residual_states.over_sequences(
        lambda views, keep: geometry.dirichlet_energy(views, mask=keep), token_masks
    )


@metric(
    symbol=r"\overline{\angle}(v_k, v_{k+1})",
    dims="tokens depth stream",
    units="rad",
    cite="skean2025layer",
    basis="stream",
    # Two successive steps share x_{k+1} with opposite signs: of independent tokens their cosine is −1/2.
    null=2.0 * np.pi / 3.0,
    estimator=PER_SEQUENCE,
    null_error=0.01,
    of_sequences=True,
)
def curvature(residual_states: States, token_masks: xr.Variable) -> xr.Variable:
    r"""Curvature of the path of tokens: the mean angle between its successive steps.

    .. math:: \angle(v_k, v_{k+1}), \quad v_k = x_{k+1} - x_k

    0 for a straight path, π for one that goes back and forth; independent tokens turn by 2π/3.
    """
    return residual_states.over_sequences(
        lambda views, keep: geometry.curvature(views, mask=keep), token_masks
    )


@lru_cache(maxsize=256)
def _dimension_of_size(count: int, width: int) -> float:
    if count == 0:
        return float("nan")
    # No closed form is known at finite size. Four clouds halve the error of one draw.
    clouds = np.random.default_rng(0).standard_normal((4, count, width))
    return float(np.mean([geometry.two_nn(cloud) for cloud in clouds]))


def _dimension_of_noise(token_masks: xr.Variable, num_features: int) -> xr.Variable:
    """That of iid noise of the same size, drawn with a fixed seed: less than the number of features."""
    counts = token_masks.sum(("sample", "token"))
    return for_each_count(counts, lambda n: _dimension_of_size(int(n), num_features))


@metric(
    symbol=r"d_{\mathrm{TwoNN}}",
    dims="tokens depth stream",
    cite="facco2017estimating",
    basis="stream",
    null=_dimension_of_noise,
    estimator="all tokens pooled, repeated ones once; the largest tenth of the ratios left out",
    default=False,  # it costs the square of the number of tokens
    null_error=0.05,
)
def intrinsic_dimension(
    neighbour_dimensions: tuple[xr.Variable, xr.Variable, xr.Variable],
) -> tuple[xr.Variable, xr.Variable]:
    r"""Intrinsic dimension of the cloud of tokens, from the two nearest neighbours of each.

    .. math:: -\ln(1 - F(\mu)) = d \ln \mu, \quad \mu = r_2 / r_1

    Its standard error leaves out one sequence at a time, for tokens of one sequence depend on each other. It does not cover
    the bias of few tokens in many dimensions, which `intrinsic_dimension_bias` states.
    """
    return neighbour_dimensions[:2]


# Between these the logarithm of what is measured is interpolated in that of the dimension.
DIMENSIONS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# Fewer give a dimension with an error of a third of it.
FEWEST_TOKENS = 10
# More tokens change the bias by little, and cost their square.
MOST_TOKENS = 2000


def _matched_dimension(measured: float, count: float) -> float:
    """The dimension of a normal cloud of so many tokens that measures so much; NaN where none of `DIMENSIONS` does."""
    if not (np.isfinite(measured) and measured > 0 and count >= FEWEST_TOKENS):
        return float("nan")
    # Two significant digits, so that a cloud is drawn for all depths of about as many distinct tokens.
    digits = int(np.floor(np.log10(count))) - 1
    tokens = min(int(round(count / 10**digits) * 10**digits), MOST_TOKENS)
    below: tuple[int, float] | None = None
    for dimension in DIMENSIONS:
        value = _dimension_of_size(tokens, dimension)
        if value >= measured:
            if below is None:
                # Less than a line measures, as by chance.
                return float(dimension)
            share = np.log(measured / below[1]) / np.log(value / below[1])
            return float(below[0] * (dimension / below[0]) ** share)
        below = dimension, value
    return float("nan")


@metric(
    symbol=r"d_{\mathrm{TwoNN}} - d",
    dims="tokens depth stream",
    label="bias of the intrinsic dimension",
    cite=OURS,
    basis="stream",
    null="that of noise is its intrinsic dimension less its number of features",
    estimator="normal clouds of as many distinct tokens, at most 2000, drawn with a fixed seed, in 1 to 256 dimensions",
    default=False,
    smooth=False,
)
def intrinsic_dimension_bias(
    neighbour_dimensions: tuple[xr.Variable, xr.Variable, xr.Variable],
) -> xr.Variable:
    r"""Bias of the intrinsic dimension; what it is short of that of a normal cloud which measures the same.

    .. math:: d_{\mathrm{TwoNN}} - d, \quad \mathbb{E}[d_{\mathrm{TwoNN}}(\mathcal{N}(0, I_d), N)] = d_{\mathrm{TwoNN}}

    Neighbours of few tokens in many dimensions are far apart, where the density is not constant: 500 normal tokens in 32
    dimensions measure about 22. It assumes that the cloud is as round as a normal one. NaN for fewer than ten distinct
    tokens, and where 256 dimensions measure less.
    """
    measured, _, count = neighbour_dimensions
    matched = xr.apply_ufunc(np.vectorize(_matched_dimension, otypes=[float]), measured, count)
    return measured - matched


@metric(
    symbol=r"\overline{\mathrm{kurt}}(x)",
    dims="depth stream",
    scale="log",
    cite="sun2024massive",
    basis="feature",
    null=3.0,
    null_error=0.1,  # 3 (d − 1)/(d + 1) of d features
    estimator="mean over real tokens",
)
def feature_kurtosis(residual_states: States) -> xr.Variable:
    r"""Kurtosis of the features of a token: how much of its energy is in few of them.

    .. math:: \frac{1}{d} \textstyle\sum_j z_j^4, \quad z = (x - \bar{x}) / \mathrm{std}(x)

    3 for many normal features, up to about their number where one is massive. NaN for a token of equal features.
    """

    def measure(views: np.ndarray) -> np.ndarray:
        tokens = residual_states.rows(views).astype(np.float64)
        deviations = tokens - tokens.mean(axis=-1, keepdims=True)
        variance = (deviations**2).mean(axis=-1)
        # 0/0 of equal features is NaN, and no warning.
        fourth = (deviations**4).mean(axis=-1) / np.where(variance > 0, variance, np.nan) ** 2
        return fourth.mean(axis=-1)

    return residual_states.over_depth(measure)


@metric(
    symbol=r"\#\{x = 0\} / N d",
    dims="depth stream",
    cite=OURS,
    basis="feature",
    null=0.0,
    estimator="over all real tokens and features",
)
def zero_fraction(residual_states: States) -> xr.Variable:
    """Share of the entries of the states that are exactly 0: of sparse activations, dead features and lost branches."""
    return residual_states.over_depth(lambda views: (residual_states.rows(views) == 0).mean(axis=(-2, -1)))
