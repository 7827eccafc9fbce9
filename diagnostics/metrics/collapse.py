"""Do tokens become equal, or the representation flat, through depth? Ranks, cosines and outliers."""

from __future__ import annotations

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels import rank
from depthscope.diagnostics.kernels.geometry.directions import pair_cosines as kernel_pair_cosines
from depthscope.diagnostics.kernels.rank.participation import corrected_ratio
from depthscope.diagnostics.metrics.declaration import OURS, Null, Range, metric
from depthscope.diagnostics.quantities.registry import quantity, ratio, with_attrs
from depthscope.diagnostics.quantities.states import States, by_kind, mask_or_none, select_rows
from depthscope.diagnostics.quantities.token_spectra import noise_ranks, over_spectra
from depthscope.diagnostics.quantities.tokens import Massive, for_each_count

SPECTRAL = "plug-in; within a sequence: mean over sequences"


def _of_noise(name: str) -> Null:
    """The same rank of iid noise at the same number of tokens and features."""

    def expectation(noise_rows: xr.Variable, num_features: int) -> xr.Variable:
        """Independent noise of the same shape by the Marchenko-Pastur law."""
        return for_each_count(noise_rows, lambda n: noise_ranks(n, num_features)[name])

    return expectation


@metric(
    symbol=r"\mathrm{erank}",
    dims="scope tokens centering depth stream",
    cite="roy2007effective",
    basis="stream",
    null=_of_noise("effective_rank"),
    null_cite="marchenko1967distribution",
    estimator=SPECTRAL,
    null_error=0.02,
    headline=True,
    better="higher",
)
def effective_rank(singular_values: xr.Variable) -> xr.Variable:
    r"""Effective rank: how many directions carry the size of the signal.

    .. math:: \mathrm{erank}(X) = \exp H(\sigma / \textstyle\sum\sigma)

    Between 1 and min(N, d). Read it against its null, and with the massive tokens left out: one huge token
    brings it down alone.
    """
    return over_spectra(rank.effective_rank_of, singular_values)


@metric(
    symbol=r"\mathrm{PR}",
    dims="scope tokens centering depth stream",
    cite="chun2026estimating",
    basis="stream",
    null=_of_noise("participation_ratio"),
    null_cite="marchenko1967distribution",
    estimator=SPECTRAL,
    null_error=0.03,
    better="higher",
)
def participation_ratio(singular_values: xr.Variable) -> xr.Variable:
    r"""Participation ratio: how many directions share the variance.

    .. math:: \mathrm{PR} = (\textstyle\sum\lambda)^2 / \sum\lambda^2

    Biased by the finite sample: 1/PR is about 1/N + 1/d + 1/(true value). Without the bias of the sampled tokens it is
    `corrected_participation_ratio`.
    """
    return over_spectra(rank.participation_ratio_of, singular_values)


@quantity
def row_fourth_powers(
    residual_states: States, token_masks: xr.Variable, scope: tuple[str, ...], centering: tuple[str, ...]
) -> xr.Variable:
    """Σ ‖x‖⁴ over the tokens of each sequence and of all pooled, about zero or about their mean."""

    def measure(views: np.ndarray) -> np.ndarray:
        def of_kind(keep: np.ndarray) -> np.ndarray:
            found = [_fourth_powers(views, keep, scope, center=label == "centred") for label in centering]
            return np.stack(found)  # (centering, group, V)

        return np.stack(by_kind(token_masks.values, of_kind)).transpose(3, 0, 1, 2)

    return residual_states.over_depth(measure, ("tokens", "centering", "group"), by_view=True)


def _fourth_powers(
    views: np.ndarray, keep: np.ndarray, scopes: tuple[str, ...], *, center: bool
) -> np.ndarray:
    """Sums (group, V) over the tokens that count, of views (V, S, T, D)."""
    groups = (
        [keep & (np.arange(len(keep))[:, None] == row) for row in range(len(keep))]
        if "sequence" in scopes
        else []
    )
    groups += [keep] if "data" in scopes else []
    sums = np.zeros((len(groups), len(views)))
    for number, counted in enumerate(groups):
        rows = select_rows(views, counted).astype(np.float64)
        if rows.shape[1]:
            about = rows - rows.mean(axis=1, keepdims=True) if center else rows
            sums[number] = ((about**2).sum(axis=-1) ** 2).sum(axis=-1)
    return sums


def _width(noise_rows: xr.Variable, token_counts: xr.Variable, num_features: int) -> xr.Variable:
    """The number of features: that of noise, however few its tokens."""
    return 0.0 * noise_rows.where(token_counts >= FEWEST_ROWS) + num_features


# The centred correction needs four tokens, and so does the uncentred one here: both are defined for the same samples.
FEWEST_ROWS = 4


@metric(
    symbol=r"\mathrm{PR}_{\mathrm{rows}}",
    dims="scope tokens centering depth stream",
    cite="chun2026estimating",
    basis="stream",
    null=_width,
    estimator="ratio of U-statistics over distinct tokens; within a sequence: mean over sequences",
    null_error=0.1,
    headline=True,
    better="higher",
)
def corrected_participation_ratio(
    singular_values: xr.Variable,
    row_fourth_powers: xr.Variable,
    token_counts: xr.Variable,
    centering: tuple[str, ...],
) -> xr.Variable:
    r"""Participation ratio of the population that the tokens were drawn from: without the bias of few tokens.

    .. math:: \frac{\sum_{i \ne j} K_{ii} K_{jj}}{\sum_{i \ne j} K_{ij}^2}, \quad K = X X^\top

    Here uncentred; about the mean its estimate is undone too. It may exceed the number of tokens; NaN where they are too few
    to tell the denominator from zero.
    """
    dims = ("tokens", "group", "centering", "depth", "stream")
    energy = singular_values.transpose(*dims, "component").values ** 2
    trace, square = energy.sum(-1) ** 2, (energy**2).sum(-1)
    diagonal = row_fourth_powers.transpose(*dims).values
    counts = np.nan_to_num(token_counts.transpose("tokens", "group").values)[..., None, None]
    found = np.full(trace.shape, np.nan)
    for at, label in enumerate(centering):
        of_kind = trace[:, :, at], square[:, :, at], diagonal[:, :, at]
        corrected = corrected_ratio(
            *of_kind, np.broadcast_to(counts, of_kind[0].shape), center=label == "centred"
        )
        known = (counts >= FEWEST_ROWS) & (of_kind[1] > of_kind[2] * RESOLVED_SHARE) & (corrected > 0)
        found[:, :, at] = np.where(known, corrected, np.nan)
    return xr.Variable(dims, found)


# Of a denominator below this share of its bias only noise is left; a corrected value is then of any size.
RESOLVED_SHARE = 1.0


def _most_directions(noise_rows: xr.Variable, num_features: int) -> xr.Variable:
    """As many as noise has rows or features."""
    return noise_rows.clip(max=num_features)


@metric(
    symbol=r"\mathrm{rank}_\varepsilon",
    dims="scope tokens centering depth stream",
    cite="golub2013matrix",
    basis="stream",
    null=_most_directions,
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
    symbol=r"r(X)/\|X\|",
    dims="tokens depth stream",
    label="Dong residual",
    scale="log",
    cite="dong2021attention",
    basis="feature",  # the 1-norm and the ∞-norm add up magnitudes of single features
    null="none in closed form: it depends on the feature basis; compare with depth 0",
    estimator="per sequence, mean over sequences",
    headline=True,
    better="higher",
    of_sequences=True,
)
def dong_residual(residual_states: States, token_masks: xr.Variable) -> xr.Variable:
    r"""Relative rank-collapse residual: how far the tokens of a sequence are from being equal.

    .. math:: \sqrt{\|R\|_1 \|R\|_\infty} \big/ \sqrt{\|X\|_1 \|X\|_\infty}, \quad R = X - 1\bar{x}^\top

    0 when all tokens are equal. Attention without skips sends it to 0 doubly exponentially. The paper takes the x̄ that
    makes the norm of R least, here it is the mean: an upper bound of theirs.
    """
    return residual_states.over_sequences(
        lambda views, keep: rank.dong_residual(views, mask=keep), token_masks
    )


@quantity
def pair_cosines(
    residual_states: States, token_masks: xr.Variable, scope: tuple[str, ...], centering: tuple[str, ...]
) -> tuple[xr.Variable, xr.Variable]:
    """The sum of the cosines of all ordered pairs of tokens, and their number, by kind and group of tokens."""

    def measure(views: np.ndarray) -> np.ndarray:
        def of_kind(keep: np.ndarray) -> np.ndarray:
            found = [_pair_cosines(views, keep, scope, center=label == "centred") for label in centering]
            return np.stack(found, axis=1)

        return np.stack(by_kind(token_masks.values, of_kind), axis=1)  # `over_depth` expects the views first

    dims = ("tokens", "centering", "group", "part")
    found = residual_states.over_depth(measure, dims, by_view=True)
    return found.isel(part=0), found.isel(part=1)


def _pair_cosines(
    views: np.ndarray, keep: np.ndarray, scopes: tuple[str, ...], *, center: bool
) -> np.ndarray:
    """Sum and number (V, group, 2) of the tokens that count, of views (V, S, T, D)."""
    found = []
    # Only the scopes that were chosen: the jackknife measures pooled tokens alone.
    if "sequence" in scopes:
        found.append(np.stack(kernel_pair_cosines(views, center=center, mask=mask_or_none(keep)), axis=-1))
    if "data" in scopes:
        rows = select_rows(views, keep)
        # Kernels refuse a matrix without rows, as where every token is massive.
        pooled = kernel_pair_cosines(rows, center=center) if rows.shape[1] else (np.zeros(len(rows)),) * 2
        found.append(np.stack(pooled, axis=-1)[:, None])
    return np.concatenate(found, axis=1)


def _cosine_of_noise(token_counts: xr.Variable, centering: tuple[str, ...]) -> xr.Variable:
    """0 for raw noise; removing the mean leaves −1/(N − 1)."""
    # Vectors that sum to zero: the cosines of each with all others sum to −1.
    # Multiplied by zero, not zero: an empty sequence keeps its NaN.
    of_each = {"raw": 0.0 * token_counts, "centred": -1.0 / (token_counts - 1.0).where(token_counts > 1)}
    return xr.Variable.concat([of_each[label] for label in centering], "centering")


@metric(
    symbol=r"\overline{\cos}",
    dims="scope tokens centering depth stream",
    # As in the verdict `common_vector`: an angle of 11° between any two tokens.
    healthy=Range(high=0.98, source=OURS),
    cite="ethayarajh2019contextual",
    basis="stream",
    null=_cosine_of_noise,
    estimator="exact over all pairs of tokens",
    null_error=0.03,
    headline=True,
    better="lower",
)
def token_cosine(pair_cosines: tuple[xr.Variable, xr.Variable]) -> xr.Variable:
    r"""Mean cosine between different tokens: 1 when all point one way.

    .. math:: \frac{\|\sum_i u_i\|^2 - m}{m (m - 1)}, \quad u_i = x_i / \|x_i\|
    """
    return ratio(*pair_cosines)


@metric(
    symbol=r"\sigma^2_{\mathrm{sequences}} / \sigma^2",
    dims="depth stream",
    scale="log",
    cite=OURS,
    basis="stream",
    null="1 for states that are independent of the position",
    estimator="over the positions that at least two sequences have",
    better="higher",
)
def sequence_share(residual_states: States) -> xr.Variable:
    r"""Share of the variance that is between sequences at the same position; 0 where all sequences have become one.

    .. math:: \frac{\overline{\mathrm{Var}_s(u_{s,t})}}{\overline{\|u_{s,t} - \bar{u}\|^2}}, \quad u = x / \|x\|

    Of directions, so that one huge token counts as any other. NaN for a single sequence, and where all states are equal.
    """
    real = residual_states.mask & (residual_states.mask.sum(0) >= 2)
    count, of_position = max(int(real.sum()), 1), np.maximum(real.sum(0), 1)[None, None, :, None]

    def measure(views: np.ndarray) -> np.ndarray:
        views = views.astype(np.float64)  # the square of a large float32 is infinite
        size = np.linalg.norm(views, axis=-1, keepdims=True)
        x = np.where(real[None, :, :, None] & (size > 0), views / np.where(size > 0, size, 1.0), 0.0)
        # All parts over the same tokens: those of the mean about which they vary.
        total, between = (
            np.where(real[None, :, :, None], x - mean, 0.0)
            for mean in (x.sum((1, 2), keepdims=True) / count, x.sum(1, keepdims=True) / of_position)
        )
        variance = (total**2).sum((1, 2, 3))
        return (between**2).sum((1, 2, 3)) / np.where(variance > 0, variance, np.nan)

    return residual_states.over_depth(measure, by_view=True)


@metric(
    symbol=r"p_{\mathrm{massive}}",
    dims="depth stream",
    cite="sun2024massive",
    basis="feature",
    null=0.0,
    estimator="share of all real tokens",
)
def massive_token_fraction(massive: Massive) -> xr.Variable:
    r"""Share of tokens with a massive activation.

    .. math:: |a| > 100 \quad\text{and}\quad |a| > 1000 \cdot \mathrm{median}\,|a|
    """
    return with_attrs(massive.fraction, massive.locations)


@metric(
    symbol=r"\max|a| / \mathrm{median}|a|",
    dims="depth stream",
    scale="log",
    cite="sun2024massive",
    basis="feature",
    null="about 6 for Gaussian activations; it grows with the logarithm of their number",
    estimator="over all real tokens and features",
    smooth=False,  # leaving out the sequence of the maximum moves it by an unknown step
)
def massive_activation(massive: Massive) -> xr.Variable:
    """Largest activation over the median one; normal in trained language models, on a few fixed features."""
    return with_attrs(massive.ratio, massive.locations)


@metric(
    symbol=r"N",
    dims="scope tokens depth stream",
    cite=OURS,
    basis="invariant",
    null="none: it is what the nulls are computed from",
    estimator="count; within a sequence: mean over sequences",
    smooth=False,
    per_step=False,
)
def num_tokens(token_counts: xr.Variable, num_profiles: tuple[int, int]) -> xr.Variable:
    """Number of tokens that each number is computed from."""
    # The masks are the same at every depth, so is the count: repeated, to be read next to the ranks.
    repeated = np.multiply.outer(token_counts.values, np.ones(num_profiles))
    return xr.Variable((*token_counts.dims, "depth", "stream"), repeated)


@quantity
def num_profiles(residual_states: States) -> tuple[int, int]:
    """The number of depths, and of views of the streams."""
    return len(residual_states), len(residual_states.streams)
