"""Which depths are similar? CKA, angles and block influence between depths, cosines between streams.

States are compared in the mean over streams, which a plain head reads.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels import geometry
from depthscope.diagnostics.kernels import similarity as kernel
from depthscope.diagnostics.metrics.declaration import OURS, Range, metric
from depthscope.diagnostics.quantities.registry import quantity, ratio
from depthscope.diagnostics.quantities.states import MeanStates, States
from depthscope.diagnostics.quantities.tokens import for_each_count

# Numbers in the unit vectors of one block of tokens over all depths: 2 MB of float64, which stay in the cache of a core.
BLOCK = 250_000


def _between_depths(values: np.ndarray, dims: tuple[str, ...], mean_states: MeanStates) -> xr.Variable:
    """Values (..., L, L); NaN where either depth is not finite."""
    return xr.Variable((*dims, "depth", "other_depth"), np.where(mean_states.finite_pairs, values, np.nan))


@quantity
def cka_table(mean_states: MeanStates, estimator: tuple[str, ...]) -> xr.Variable:
    """CKA of every depth with every other, by estimator and kind of token."""
    tables = mean_states.over_kinds(partial(_cka, estimator=estimator))
    return _between_depths(tables, ("tokens", "estimator"), mean_states).transpose("estimator", ...)


def _cka(states: np.ndarray, estimator: tuple[str, ...]) -> np.ndarray:
    """CKA by every requested estimator, (E, L, L), from products that are computed once."""
    depths, num_tokens, _ = states.shape
    if not num_tokens:
        return np.full((len(estimator), depths, depths), np.nan)
    if len(estimator) == 1:
        return kernel.cka_matrix(states, unbiased=estimator == ("unbiased",))[None]
    tables = dict(zip(("biased", "unbiased"), kernel.cka_matrices(states), strict=True))
    return np.stack([tables[name] for name in estimator])


def _cka_of_noise(token_masks: xr.Variable, num_features: int, estimator: tuple[str, ...]) -> xr.Variable:
    """CKA of independent iid noise at that size: 0 when unbiased."""
    count = token_masks.sum(("sample", "token"))
    # The formula needs a token; without one there is no null, whatever it gives.
    biased = for_each_count(count.clip(1), lambda n: kernel.cka_null(int(n), num_features)).where(count > 0)
    of_each = {"biased": biased, "unbiased": 0.0 * biased}
    return xr.Variable.concat([of_each[name] for name in estimator], "estimator")


@metric(
    symbol=r"\mathrm{CKA}",
    dims="estimator tokens depth other_depth",
    label="CKA",
    cite="kornblith2019similarity",
    basis="stream",
    null=_cka_of_noise,
    estimator="biased HSIC₀ or unbiased HSIC₁, which may be negative",
    null_error=0.02,
)
def cka(cka_table: xr.Variable) -> xr.Variable:
    r"""Linear CKA between depths: 1 for the same geometry of tokens.

    .. math:: \mathrm{HSIC}(X, Y) / \sqrt{\mathrm{HSIC}(X, X)\,\mathrm{HSIC}(Y, Y)}

    The biased value of unrelated data is near 1 for few tokens and many features: read it against its null.
    """
    return cka_table


@metric(
    symbol=r"\mathrm{CKA}_{l, l-1}",
    dims="estimator tokens depth",
    label="adjacent CKA",
    cite="kornblith2019similarity",
    basis="stream",
    null=_cka_of_noise,
    estimator="biased HSIC₀ or unbiased HSIC₁, which may be negative",
    null_error=0.02,
    of_steps=True,
    headline=True,
)
def adjacent_cka(cka_table: xr.Variable) -> xr.Variable:
    """Linear CKA of each depth with the one before; undefined at the embedding."""
    table = cka_table.transpose("estimator", "tokens", "depth", "other_depth")
    values = np.full(table.shape[:-1], np.nan)
    values[..., 1:] = np.diagonal(table.values, offset=-1, axis1=-2, axis2=-1)
    return xr.Variable(table.dims[:-1], values)


@metric(
    symbol=r"\arccos(\cos) / \pi",
    dims="tokens depth other_depth",
    cite="gromov2024unreasonable",
    basis="stream",
    null=0.5,
    estimator="mean over tokens",
)
def angular_distance(depth_angles: tuple[xr.Variable, xr.Variable]) -> xr.Variable:
    r"""Mean angle between a token's states at two depths, as a share of π.

    .. math:: \frac{1}{\pi} \arccos \frac{x \cdot y}{\|x\| \|y\|}

    0 for the same direction, ½ for unrelated ones.
    """
    return ratio(*depth_angles)


@quantity
def depth_angles(mean_states: MeanStates) -> tuple[xr.Variable, xr.Variable]:
    """The sum of the angles between a token's states at two depths, as shares of π, and the number of these tokens."""
    sums = mean_states.over_kinds(_angle_sums)  # (tokens, 2, L, L)
    # A number of NaN where a depth is not finite: it leaves no angle.
    total, number = (_between_depths(sums[:, part], ("tokens",), mean_states) for part in (0, 1))
    return total, number


def _angle_sums(states: np.ndarray) -> np.ndarray:
    """Sums of angles and numbers of tokens (2, L, L), over those of states (L, N, D) with a direction at both depths."""
    depths, num_tokens, width = states.shape
    sums = np.zeros((2, depths, depths))
    block = max(1, BLOCK // (depths * width))
    for start in range(0, num_tokens, block):
        # Tokens first, so that one product gives the cosines of all depths; in float64, for near 1 an error of ε in a
        # cosine is one of √(2ε) in the angle.
        part = np.moveaxis(states[:, start : start + block], 0, 1).astype(np.float64)
        length = np.linalg.norm(part, axis=-1, keepdims=True)
        unit = part / np.where(length > 0, length, 1.0)
        sums += angle_sums(unit, length[..., 0] > 0)
    return sums


def angle_sums(unit: np.ndarray, directed: np.ndarray) -> np.ndarray:
    """The same of unit vectors (N, L, D), of those tokens that have a direction (N, L) at both depths."""
    both = directed[:, :, None] & directed[:, None, :]
    angles = np.arccos(np.clip(unit @ unit.swapaxes(1, 2), -1.0, 1.0)) / np.pi
    total = np.where(both, angles, 0.0).sum(axis=0)
    np.fill_diagonal(total, 0.0)  # arccos of 1 less a rounding error is 1e-8, not 0
    return np.stack([total, both.sum(axis=0)])


@metric(
    symbol=r"1 - \cos(x_{l-1}, x_l)",
    dims="tokens depth",
    cite="men2024shortgpt",
    basis="stream",
    null=1.0,
    estimator="mean over tokens",
    of_steps=True,
)
def block_influence(mean_turns: xr.Variable) -> xr.Variable:
    """Block influence: how far the step to a depth turns the states, 1 − cos; undefined at the embedding.

    0 for a step that does nothing but scale. Independent unit branches give 1 − √(l/(l+1)).
    """
    return mean_turns


@quantity
def mean_turns(mean_states: MeanStates) -> xr.Variable:
    """Mean of 1 − cos between a token's state and the one before, by kind of token and depth."""
    values = mean_states.over_kinds(_influences)
    values[:, 1:][:, ~(mean_states.finite[1:] & mean_states.finite[:-1])] = np.nan
    return xr.Variable(("tokens", "depth"), values)


def _influences(states: np.ndarray) -> np.ndarray:
    values = np.full(len(states), np.nan)
    at_once = max(1, BLOCK // max(1, 4 * states[0].size))  # of which four are held in float64
    for first in range(0, len(states) - 1 if states.shape[1] else 0, at_once):
        steps = states[first : first + at_once + 1]
        values[first + 1 : first + len(steps)] = geometry.block_influence(steps[:-1], steps[1:])
    return values


@metric(
    symbol=r"\overline{\cos}(x_i, x_j)",
    dims="depth",
    # As in the verdict `copied_streams`: an angle of 3° between any two streams.
    healthy=Range(high=0.999, source=OURS),
    cite="zhu2024hyper",
    basis="stream",
    null=0.0,
    estimator="exact over all pairs of streams, mean over tokens",
    better="lower",
)
def stream_cosine(mean_stream_cosine: xr.Variable) -> xr.Variable:
    """Mean cosine between the streams of a token: 1 where they are copies, as at the embedding."""
    return mean_stream_cosine


@quantity
def mean_stream_cosine(stream_states: States) -> xr.Variable:
    """Mean over tokens of the mean cosine between their streams, by depth."""

    def measure(views: np.ndarray) -> np.ndarray:
        streams = np.moveaxis(stream_states.rows(views[1:]), 0, 1)  # the first view is the mean
        cosines = geometry.token_cosine(streams)
        # A token with a stream of zeros has no cosine; nanmean warns where no token has one.
        mean = np.nanmean(cosines) if np.isfinite(cosines).any() else np.nan
        return np.full(len(views), mean)  # `over_depth` expects a value of each view: below one is taken

    return stream_states.over_depth(measure).isel(stream=0)


@metric(
    symbol=r"\max_{i \ne j} \overline{\cos}(x_i, x_j)",
    dims="depth",
    # As in the verdict `copied_streams`: what is closer differs by the rounding of float32 alone.
    healthy=Range(high=1.0 - 1e-12, source=OURS),
    cite=OURS,
    basis="stream",
    null=0.0,
    estimator="mean over tokens of each pair of streams, then the largest",
    smooth=False,
)
def closest_stream_cosine(stream_pair_cosines: xr.Variable) -> xr.Variable:
    """Cosine of the two streams that are most similar: 1 where any two are copies, which a mean over pairs does not show."""
    return xr.Variable(("depth",), stream_pair_cosines.values.max(axis=1))


@quantity
def stream_pair_cosines(stream_states: States) -> xr.Variable:
    """Mean cosine of every two streams over the tokens whose streams all have a direction, by depth."""
    pairs = np.triu_indices(stream_states.num_streams, 1)

    def measure(views: np.ndarray) -> np.ndarray:
        streams = stream_states.rows(views[1:]).astype(np.float64)  # the first view is the mean
        length = np.linalg.norm(streams, axis=-1, keepdims=True)
        unit = streams / np.where(length > 0, length, np.nan)  # a stream of zeros has no cosine
        cosines = np.einsum("ind,jnd->ijn", unit, unit)[pairs]
        known = np.isfinite(cosines).all(axis=0)
        means = cosines[:, known].mean(axis=1) if known.any() else np.full(len(cosines), np.nan)
        return np.tile(means, (len(views), 1))  # the same for all views, as in `mean_stream_cosine`

    return stream_states.over_depth(measure, ("pair",)).isel(stream=0)
